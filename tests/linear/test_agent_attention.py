"""Agent attention: the released DeiT and Swin layers, its identities, spatially reduced keys, AgentSD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import attend, make_call
from jaxattn.core.pooling import bilinear_resize
from jaxattn.core.types import Ctx, Spec, State
from jaxattn.linear.agent_attention import agent_attend, agent_attention, agent_sd, match, merge_slots, merged
from tests.jaxprs import largest

AGENTS = jax.jit(agent_attend, static_argnames=("scale", "scale2"))
MATCH = jax.jit(match)
SPEC = Spec(dim=16, heads=2, kv_heads=2, head_dim=8, value_dim=8)


def released(io, prefix, cls):
    params = {n: io[f"{prefix}w.{n}_bias"] for n in ("an", "na")}
    params |= {n: io[f"{prefix}w.{n}_bias"].squeeze() for n in ("ah", "aw", "ha", "wa", *(("ac", "ca") if cls else ()))}
    kernel = np.moveaxis(io[f"{prefix}w.dwc.weight"][:, 0], 0, -1)
    return params | {"dwc_kernel": kernel, "dwc_bias": io[f"{prefix}w.dwc.bias"]}


@pytest.mark.parametrize("prefix, x, y, cls", [("", "x", "y", True), ("s.", "x_s", "y_s", False)])
def test_golden_layers(golden, prefix, x, y, cls):
    io = golden("107-agent-attention")
    with jax.enable_x64(True):
        x = jnp.asarray(io[x])
        qkv = x @ io[f"{prefix}w.qkv.weight"].T + io[f"{prefix}w.qkv.bias"]
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, 2, 8), 2, 0)
        params = jax.tree.map(jnp.asarray, released(io, prefix, cls))
        method = agent_attention(4, grid=(6, 6), cls=cls)
        run = jax.jit(lambda p, q, k, v: method.apply(p, State(), make_call(q, k, v), Ctx())[0].out)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, method.init(jax.random.key(0), SPEC))
        out = run(params, q, k, v).reshape(x.shape)
        out = out @ io[f"{prefix}w.proj.weight"].T + io[f"{prefix}w.proj.bias"]
    np.testing.assert_allclose(out, io[y], atol=1e-9)


def test_rows_sum_to_one_and_agents_as_queries(rng):
    q, k, v = rng.normal(size=(3, 2, 12, 2, 8)).astype(np.float32)
    agents = q[:, ::3]
    np.testing.assert_allclose(AGENTS(q, k, np.ones_like(v), agents), 1.0, atol=1e-5)
    s = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, q) * 8**-0.5)
    t = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) * 8**-0.5)
    want = jnp.einsum("bhnm,bhmj,bjhd->bnhd", s, t, v)
    np.testing.assert_allclose(AGENTS(q, k, v, q), want, atol=1e-5)
    # As a layer: one agent per token, zero biases, no convolution.
    method = agent_attention(9, grid=(3, 3))
    zero = jax.tree.map(jnp.zeros_like, method.init(jax.random.key(0), SPEC))
    q, k, v = q[:, :9], k[:, :9], v[:, :9]
    out = jax.jit(lambda q, k, v: method.apply(zero, State(), make_call(q, k, v), Ctx())[0].out)(q, k, v)
    np.testing.assert_allclose(out, AGENTS(q, k, v, q), atol=1e-5)


def test_reduced_keys_and_bfloat16(rng):
    method = agent_attention(4, grid=(4, 6), kv_grid=(2, 3))
    again = agent_attention(4, grid=[4, 6], kv_grid=[2, 3])
    assert method == again and hash(method) == hash(again)
    params = method.init(jax.random.key(1), SPEC)
    q = rng.normal(size=(2, 24, 2, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 6, 2, 8)).astype(np.float32)
    run = jax.jit(lambda p, q, k, v: method.apply(p, State(), make_call(q, k, v), Ctx())[0].out)
    # The convolution alone: V resized to the grid, then filtered; here a filter that passes the centre.
    centre = jnp.zeros((3, 3, 16)).at[1, 1].set(1.0)
    plain, passed = (run(params | {"dwc_kernel": kernel}, q, k, v) for kernel in (0 * centre, centre))
    resized = bilinear_resize(v.reshape(2, 2, 3, 16), (4, 6)).reshape(2, 24, 2, 8)
    np.testing.assert_allclose(passed - plain, resized, atol=1e-5)
    out = run(params, *(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert out.dtype == jnp.bfloat16 and np.isfinite(np.asarray(out, np.float32)).all()
    with pytest.raises(ValueError, match="grid"):
        method.apply(params, State(), make_call(q[:, :20], k, v), Ctx())
    with pytest.raises(ValueError, match="agents"):
        agent_attention(5, grid=(4, 6))


def test_merging_joins_the_most_similar(rng):
    x = rng.normal(size=(2, 16, 5)).astype(np.float32)
    kept = np.array([0, 2, 8, 10])
    x[0, 5] = 3 * x[0, 8]  # the most similar pair
    similarity, nearest, is_kept = MATCH(x, kept)
    assert nearest[0, 5] == 2 and np.argmax(np.where(is_kept, -2, similarity[0])) == 5
    slot = np.asarray(merge_slots(similarity, nearest, is_kept, 7))
    assert all(set(row) == set(range(9)) for row in slot)
    np.testing.assert_array_equal(slot[:, kept], [[5, 6, 7, 8]] * 2)
    assert slot[0, 5] == slot[0, 8]
    mean = merged(x[:, :, None], slot, 9)
    np.testing.assert_allclose(mean[0, slot[0, 5], 0], x[0, slot[0] == slot[0, 5]].mean(0), rtol=1e-5)
    none = merge_slots(similarity, nearest, is_kept, 0)
    assert all(sorted(row) == list(range(16)) for row in np.asarray(none))


def test_agent_sd(rng):
    x = rng.normal(size=(2, 64, 16)).astype(np.float32)
    q, k, v = rng.normal(size=(3, 2, 64, 2, 8)).astype(np.float32)
    ctx = Ctx(hidden=x, key=jax.random.key(0))

    def run(**how):
        method = agent_sd((8, 8), **how)
        assert method == agent_sd((8, 8), **how)
        return jax.jit(lambda q, k, v: method.apply({}, State(), make_call(q, k, v), ctx)[0].out)(q, k, v)

    # Nothing merged, one agent per cell: agent attention itself.
    similarity, nearest, is_kept = MATCH(x, np.arange(64).reshape(8, 8)[::4, ::4].ravel())
    agents = merged(q, merge_slots(similarity, nearest, is_kept, 51), 13)
    want = AGENTS(q, k, v, agents, scale=8**-0.5, scale2=8**-0.15) + 0.075 * v
    np.testing.assert_allclose(run(ratio=0.0, stride=4), want, atol=1e-5)
    # Too many agents to gain: plain attention, here to unmerged tokens.
    np.testing.assert_allclose(run(ratio=0.0, agent_ratio=0.3), attend(q, k, v).out, atol=1e-5)
    for random in (False, True):
        out = np.asarray(run(ratio=0.5, agent_ratio=0.9, stride=4, random=random))
        assert np.isfinite(out).all() and len(np.unique(out[0, :, 0, 0])) == 32  # merged tokens share their output
    small = agent_sd((4, 4)).apply({}, State(), make_call(q, k, v), ctx)[0].out  # another resolution is dense
    np.testing.assert_allclose(small, attend(q, k, v).out, atol=1e-6)


def test_cost_is_linear_in_tokens():
    q = jnp.zeros((1, 1024, 2, 8))
    for method in (agent_attention(49, grid=(32, 32)), agent_sd((32, 32), stride=8, agent_ratio=0.95)):
        params = method.init(jax.random.key(0), SPEC) if hasattr(method, "init") else {}
        ctx = Ctx(hidden=jnp.zeros((1, 1024, 16)))
        run = lambda q, k, v, m=method, p=params, c=ctx: m.apply(p, State(), make_call(q, k, v), c)[0].out  # noqa: E731
        elements, _, shape = largest(run, q, q, q)
        assert elements <= 2 * 64 * 1024, shape
