from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens
from jaxattn.nn.block import BlockConfig
from models import stack
from models.bind import bind_stack

RNG = np.random.default_rng(0)


def tower(g, layers):
    """The golden encoder: parameters of a stack, its block, its rows."""
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
             "v": "self_attn.v_proj", "o": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}  # fmt: skip

    def leaf(name, kind):
        rows = np.stack([g[f"w.{i}.{names[name]}.{kind}"] for i in range(layers)])
        return rows.swapaxes(1, 2) if kind == "weight" and rows.ndim == 3 else rows

    dense = lambda n: {"kernel": leaf(n, "weight"), "bias": leaf(n, "bias")}  # noqa: E731
    norm = lambda n: {"scale": leaf(n, "weight"), "bias": leaf(n, "bias")}  # noqa: E731
    params = {"norm1": norm("norm1"), "norm2": norm("norm2"), "attn": {n: dense(n) for n in "qkvo"},
              "mlp": {n: dense(n) for n in ("up", "down")}}  # fmt: skip
    block = BlockConfig(16, 2, 2, 8, 32, norm="layer", eps=1e-5, activation="quick_gelu", gated=False, qkv_bias=True,
                        out_bias=True, mlp_bias=True, causal=False)  # fmt: skip
    return {"layers": params}, block


@partial(jax.jit, static_argnums=(1,))
def run(params, program, arrays, x):
    n = x.shape[1] - 1
    streams = stack.streams_of({"special": (x[:, :1], Meta.of(1)), "vision": (x[:, 1:], Meta.of(n))})
    return stack.run(params, program, arrays, streams, phase="train").streams


def prune(g, record):
    layers = len(g["lengths_after_layer"])
    params, block = tower(g, layers)
    program, operands, _ = bind_stack(block, layers, "vision", reduce={"": record})
    return run(params, program, {"operands": operands}, g["x"])


def test_golden(golden):
    """The published loop, through the library's tower: which patches are left, and what they have become."""
    g = golden("flowcut")
    keep = int(g["target"]) - 1
    with jax.enable_x64(True):
        out = prune(g, tokens.flowcut(keep))
        fixed = prune(g, tokens.flowcut(keep, lengths=(27, 16)))
    for streams in (out, fixed):
        assert streams.x.shape == g["out"].shape
        np.testing.assert_array_equal(streams.meta.pos[:, 1:], g["keep_indices"])
        np.testing.assert_allclose(streams.x, g["out"], rtol=0, atol=1e-8)
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(streams.slots["vision"])[0] >= 0), g["keep_indices"][0])


def test_schedule():
    record = tokens.flowcut(64)
    assert record.sites(24) == tuple(range(2, 23, 2)) and record.sites(8) == (2, 4, 6)
    cuts = [cut for _, cut in record.schedule(8)]
    assert [c.remaining for c in cuts] == [4, 2, 0] and [(c.first, c.layer) for c in cuts] == [(0, 1), (2, 3), (4, 5)]
    assert [c.rows(576) for c in cuts] == [576, 576, 64]
    assert [c.rows(576) for _, c in tokens.flowcut(64, lengths=(300, 100)).schedule(8)] == [300, 100, 64]
    with pytest.raises(ValueError, match="lengths: expected counts that do not rise"):
        tokens.flowcut(64, lengths=(100, 300))


def test_counts():
    left = jax.jit(tokens.flowcut_left, static_argnums=2)
    n, target = 36, 8
    level, one = np.full((1, n), 1 / n, np.float32), np.eye(1, n, dtype=np.float32)
    for remaining in (4, 2):
        assert int(left(level, target, remaining)[0]) == n, "even attention says nothing: nobody leaves"
        assert int(left(one, target, remaining)[0]) == n - round((n - target) / np.sqrt(remaining))
    assert int(left(level, target, 0)[0]) == target
    some = np.arange(n)[None] < 20
    assert int(left(np.where(some, level, 9), target, 4, valid=some)[0]) == 20


def test_scores_and_their_memory():
    """One cut over two layers: c = score, then half and half."""
    b, n, h, d = 2, 12, 2, 4
    cls = RNG.dirichlet(np.ones(n + 1), size=(2, b, h)).astype(np.float32)
    v = RNG.normal(size=(2, b, n + 1, h, d)).astype(np.float32)
    scores = []
    for a, values in zip(cls, v, strict=True):
        sem = np.exp(np.einsum("bhd,bnhd->bhn", values[:, 0], values))
        sem = (sem / sem.sum(-1, keepdims=True))[..., 1:].mean(1)
        rel = a[..., 1:].mean(1)
        norm = np.abs(values.mean(2)).sum(-1)[:, 1:]
        scores.append((rel / rel.sum(-1, keepdims=True) + sem / sem.sum(-1, keepdims=True)) * norm)
        np.testing.assert_allclose(tokens.flowcut_scores(a, values), scores[-1], rtol=2e-5)
    (_, cut), *_ = tokens.flowcut(4).schedule(4)
    assert cut.layer == 1 and cut.remaining == 0
    facts = {}
    for i in range(2):
        sem = jax.nn.softmax(jnp.einsum("bhd,bnhd->bhn", v[i, :, 0], v[i]), -1)[..., 1:].mean(1)
        facts |= {f"relation.{i}": cls[i][..., 1:].mean(1), f"semantic.{i}": sem, f"values.{i}": v[i][:, 1:]}
    tok = Tokens(np.zeros((b, n, 1), np.float32), Meta.of(n))
    out, state, aux = cut.apply({"keep": jnp.int32(4)}, State(), tok, facts, Ctx())
    want = 0.5 * scores[0] + 0.5 * scores[1]
    np.testing.assert_allclose(aux["scores"], want, rtol=2e-5)
    np.testing.assert_array_equal(out.meta.pos, np.sort(np.argsort(-want, -1)[:, :4], -1))
    np.testing.assert_allclose(state.shared, np.take_along_axis(want, np.asarray(out.meta.pos), -1), rtol=2e-5)
