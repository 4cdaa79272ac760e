"""TokenFLEX: pooling by PyTorch's bins, one projector for all numbers of tokens, a number drawn per step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens
from jaxattn.tokens.tokenflex import gated_project, init_projector, pool_grid
from models.bind import Bound
from models.language import llm
from models.multimodal import vlm
from models.vision import vit

LLM = llm.tiny(vocab=24, layers=2, dim=24, heads=2, kv_heads=2, hidden=16)
CONFIG = vlm.VLMConfig(vit.config(24, 4, 2, 16, 2, hidden=16), LLM, 16, position=True)
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(size=(2, 24, 24, 3)).astype(np.float32)
TEXT = RNG.integers(1, 24, (2, 5)).astype(np.int32)


def test_bins():
    x = RNG.normal(size=(2, 36, 3)).astype(np.float32)
    grid = x.reshape(2, 6, 6, 3)
    np.testing.assert_allclose(pool_grid(x, 36), x, atol=1e-6)
    np.testing.assert_allclose(pool_grid(x, 9).mean(1), x.mean(1), atol=1e-6)
    for n in (4, 8):  # bins that overlap, and more of them than rows
        want = [[grid[:, 6 * i // n:-(-6 * (i + 1) // n), 6 * j // n:-(-6 * (j + 1) // n)].mean((1, 2)) for j in range(n)]
                for i in range(n)]  # fmt: skip
        np.testing.assert_allclose(pool_grid(x, n * n).reshape(2, n, n, 3), np.array(want).transpose(2, 0, 1, 3), atol=1e-6)
    with pytest.raises(ValueError, match="tokens: expected a square number"):
        tokens.tokenflex(keep=12)


def test_the_projector_by_hand():
    p = init_projector(jax.random.key(0), 6, 4, 10)
    x = RNG.normal(size=(2, 9, 6)).astype(np.float32)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    gate = y @ p["gate"]["kernel"]
    want = (gate / (1 + np.exp(-gate)) * (y @ p["up"]["kernel"])) @ p["down"]["kernel"]
    np.testing.assert_allclose(gated_project(p, x), want, atol=1e-4)


@jax.jit
def drawn(params, key):
    record = tokens.tokenflex(sizes=(4, 9, 16), weights=(1, 1, 0))
    x, features = jnp.ones((2, 36, 24)), jnp.asarray(RNG.normal(size=(2, 36, 16)), jnp.float32)
    given = Tokens(x, Meta.of(36), jnp.broadcast_to(jnp.arange(36), (2, 36)))
    run = lambda record, **ctx: record.apply(params, State(), given, {"features": features}, Ctx(phase="train", **ctx))  # noqa: E731
    out, _, told = run(record, key=key)
    return out, told["count"], [run(tokens.tokenflex(keep=n))[0].x for n in (4, 9)]


def test_a_number_per_step():
    params = init_projector(jax.random.key(0), 16, 24, 8)
    seen = set()
    for i in range(8):
        out, count, exact = drawn(params, jax.random.key(i))
        n = int(count)
        seen.add(n)
        assert out.x.shape == (2, 16, 24) and (np.asarray(out.meta.valid).sum(-1) == n).all()
        np.testing.assert_allclose(out.x[:, :n], exact[n == 9], atol=1e-5)
        assert not np.asarray(out.x[:, n:]).any() and (np.asarray(out.slot) < n).all()
    assert seen == {4, 9} and drawn._cache_size() == 1  # a size of weight 0 never comes; one program for all


def test_in_the_model():
    """In place of the projector, positions averaged alike; any number of tokens from the same parameters."""
    base = vlm.init(CONFIG)
    trained = vlm.bind(CONFIG, base, reduce={"project": tokens.tokenflex(keep=16)}).arrays["trained"]

    def see(n, params):
        bound = vlm.bind(CONFIG, params, reduce={"project": tokens.tokenflex(keep=n)}, trained=trained)
        return jax.jit(lambda: vlm.forward(bound, IMAGE, TEXT))()

    out, visual = see(16, base)
    p = trained["sites"]["project"]
    want = gated_project(p, pool_grid(visual.features, 16)) + pool_grid(base["projector"]["pos"][None], 16)
    np.testing.assert_allclose(visual.x, want, atol=1e-5)
    other = {**base, "projector": {**base["projector"], "down": jax.tree.map(jnp.zeros_like, base["projector"]["down"])}}
    np.testing.assert_allclose(see(16, other)[0].logits, out.logits, atol=1e-5)
    more, wider = see(25, base)
    assert wider.x.shape[1] == 25 and np.abs(wider.x[:, :16] - visual.x).max() > 1e-3 and np.isfinite(more.logits).all()
    assert (np.diff(np.asarray(visual.meta.pos)) > 0).all()
    bound = vlm.bind(CONFIG, base, reduce={"project": tokens.tokenflex(sizes=(4, 9))})
    assert jax.eval_shape(lambda: vlm.forward(Bound(*bound), IMAGE, TEXT)[1]).x.shape[1] == 9
    with pytest.raises(ValueError, match="nothing reduced before"):
        vlm.see(vlm.bind(CONFIG, base, reduce={"vision": tokens.uniform(9), "project": tokens.tokenflex(keep=4)}), IMAGE)
