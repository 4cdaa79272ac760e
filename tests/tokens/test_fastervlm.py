import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import tokens
from jaxattn.core import statistics
from jaxattn.core.attend import make_call
from jaxattn.core.types import Ctx, Meta, State, Tokens, split
from jaxattn.tokens.fastervlm import fastervlm_scores

B, H, N, D, K = 2, 3, 20, 8, 7
RNG = np.random.default_rng(0)


def test_cls_attention_of_a_layer():
    """Top-K of the head-mean of the CLS row, its own column left out, from q and k without the map."""
    q, k = (RNG.normal(size=(B, N + 1, H, D)).astype(np.float32) * 2 for _ in range(2))
    p = np.asarray(jax.nn.softmax(np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(D), axis=-1))
    want = p[:, :, 0, 1:].mean(1)
    np.testing.assert_allclose(fastervlm_scores(p[:, :, 0]), want, atol=1e-7)
    program, params = split(tokens.fastervlm(keep=K))
    x = RNG.normal(size=(B, N, 4)).astype(np.float32)

    @jax.jit
    def run(params, q, k):
        first = jnp.zeros((B, N + 1)).at[:, 0].set(1.0)
        found = statistics.received(make_call(q, k, k), None, first)[0].mean(1)[:, 1:]
        return program.apply(params, State(), Tokens(x, Meta.of(N)), {"cls": found}, Ctx())

    out, _, aux = run(params, q, k)
    np.testing.assert_allclose(aux["scores"], want, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(out.meta.pos)[:, :K], np.sort(np.argsort(-want, -1)[:, :K], -1))


def test_what_it_asks_for():
    (need,) = tokens.fastervlm(keep=4, layer=-3).needs()
    assert (need.at, need.rows, need.what, need.over_heads) == ("vision.-3", "cls", "received", "mean")
