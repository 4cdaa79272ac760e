"""Lightning attention: MiniMax-M1's released layer, decoding, the decay schedule, relative positions, SGLU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import make_call
from jaxattn.core.mask import causal, same
from jaxattn.core.types import Ctx, Meta, Spec, State, View, init_params
from jaxattn.linear.lightning_attention import (
    alibi_slopes,
    layer_slopes,
    lightning_attention,
    lightning_attention_2,
    sglu,
    simple_rms_norm,
)  # fmt: skip

SPEC = Spec(layers=4, dim=16, heads=2, kv_heads=2, head_dim=8, value_dim=8, batch=2)


@pytest.fixture(scope="module")
def io(golden):
    return golden("112-lightning-attention")


def projected(io, x):
    """q, k, v [B, N, H, D] of the released layer, which packs q | k | v head by head."""
    qkv = (x @ io["w.qkv_proj.weight"].T).reshape(*x.shape[:2], 2, 24)
    return np.split(qkv, 3, axis=-1)


@jax.jit
def layer(params, state, x, q, k, v):
    method = lightning_attention(chunk=4)
    part, state, _ = method.apply(params, State(state), make_call(q, k, v), Ctx(layer=jnp.int32(1), x=x, spec=SPEC))
    return part.out.reshape(*x.shape[:2], -1), state.layer


def test_golden_layer_and_its_decoding(io):
    params = {"norm": io["w.norm.weight"], "gate": io["w.output_gate.weight"].T}
    start = lightning_attention().init_state(SPEC).layer[0]
    y, state = layer(params, start, io["x"], *projected(io, io["x"]))
    np.testing.assert_allclose(y @ io["w.out_proj.weight"].T, io["y"], atol=1e-5)
    np.testing.assert_allclose(state, io["kv"], atol=1e-5)
    _, before = layer(params, start, io["x"][:, :10], *projected(io, io["x"][:, :10]))
    y1, after = layer(params, before, io["x"][:, 10:], *projected(io, io["x"][:, 10:]))
    np.testing.assert_allclose(y1 @ io["w.out_proj.weight"].T, io["y_last"], atol=1e-5)
    np.testing.assert_allclose(after, io["kv_last"], atol=1e-5)


def test_golden_core(io):
    q, k, v = (np.moveaxis(io[n], 1, 2) for n in "qkv")
    slope = io["slope"].ravel()
    np.testing.assert_allclose(layer_slopes(2, 1, 4), slope, rtol=1e-5)
    for s, expected in ((slope, "core"), (0 * slope, "core_nodecay")):
        out, _ = lightning_attention_2(q, k, v, s, chunk=4)
        np.testing.assert_allclose(out, np.moveaxis(io[expected], 1, 2), atol=1e-5)


def test_core_is_the_quadratic_form_with_gradients(rng):
    q, k, v = rng.normal(size=(3, 1, 37, 3, 4)).astype(np.float32)
    slope = np.array([0.7, 0.05, 0.0], np.float32)

    def quadratic(q, k, v):
        away = np.arange(37)[:, None] - np.arange(37)
        decay = np.where(away >= 0, np.exp(-slope[:, None, None] * np.maximum(away, 0)), 0.0)
        return jnp.einsum("bhts,bshe->bthe", jnp.einsum("bthd,bshd->bhts", q, k) * decay, v)

    weight = rng.normal(size=(1, 37, 3, 4)).astype(np.float32)
    want = jax.value_and_grad(lambda *a: (quadratic(*a) * weight).sum(), (0, 1, 2))(q, k, v)
    for chunk in (8, 128):
        run = jax.jit(lambda *a, c=chunk: (lightning_attention_2(*a, slope, chunk=c)[0] * weight).sum())
        got = jax.value_and_grad(run, (0, 1, 2))(q, k, v)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def test_slopes():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    np.testing.assert_allclose(layer_slopes(4, 5, 6) / alibi_slopes(4), 1e-5, rtol=1e-3)
    np.testing.assert_allclose(layer_slopes(4, 0, 6), alibi_slopes(4) * (1 + 1e-5))


def test_lrpe_reads_differences_of_positions(rng):
    method = lightning_attention(norm=None, gate=None, decay=None, lrpe=True)
    params = method.init(jax.random.key(0), SPEC)
    q, k, v = rng.normal(size=(3, 2, 9, 2, 8)).astype(np.float32)
    assert method.init_state(SPEC).layer.shape == (4, 2, 2, 16, 8)

    def out(start):
        meta = Meta.of(9, pos=np.arange(start, start + 9)[None])
        call = make_call(q, k, v, q_meta=meta, k_meta=meta)
        return method.apply(params, State(), call, Ctx())[0].out

    np.testing.assert_allclose(out(0), out(50), atol=2e-4)
    silu = jax.nn.silu
    away = (np.arange(9)[:, None] - np.arange(9))[..., None, None] * params["theta"]
    weights = jnp.einsum("bthd,bshd,tshd->bhts", silu(q), silu(k), jnp.cos(away)) * np.tri(9)
    np.testing.assert_allclose(out(0), jnp.einsum("bhts,bshe->bthe", weights, silu(v)), atol=2e-4)


def test_every_variant_runs_and_padding_is_nothing(rng):
    x = rng.normal(size=(2, 7, 16)).astype(np.float32)
    q, k, v = rng.normal(size=(3, 2, 7, 2, 8)).astype(np.float32)
    valid = np.ones((2, 7), bool)
    valid[0, :3] = False
    padded = make_call(q, k, v, k_meta=Meta.of(7, valid=valid))
    for how in ({"norm": "layer"}, {"norm": "srms", "gate": "low_rank"}, {"gate": "linear", "silu_values": False}):
        method = lightning_attention(decay="head", **how)
        again = lightning_attention(decay="head", **how)
        assert method == again and hash(method) == hash(again)
        params = init_params(method, SPEC)
        run = jax.jit(lambda v, m=method, p=params: m.apply(p, State(), padded.replace(v=v), Ctx(x=x))[0].out)
        a, b = run(v), run(np.where(valid[..., None, None], v, 5.0))
        np.testing.assert_array_equal(a, b)
        low = method.apply(params, State(), make_call(*(t.astype(jnp.bfloat16) for t in (q, k, v))), Ctx(x=x))[0].out
        assert low.dtype == jnp.bfloat16 and np.isfinite(np.asarray(low, np.float32)).all()
        if "gate" in params:
            closed = method.apply(params | {"gate": 0 * params["gate"]}, State(), make_call(q, k, v), Ctx(x=x))[0].out
            assert (np.abs(closed).max() == 0) == (method.gate == "linear")


def test_padding_on_the_right_and_packing(rng):
    method = lightning_attention(norm=None, gate=None, decay="head")
    q, k, v = rng.normal(size=(3, 2, 12, 2, 8)).astype(np.float32)
    start = method.init_state(SPEC).layer[0]

    @jax.jit
    def run(call):
        part, state, _ = method.apply({}, State(start), call, Ctx())
        return part.out, state.layer

    short, state = run(make_call(q[:, :7], k[:, :7], v[:, :7], mask=causal()))
    out, padded = run(make_call(q, k, v, mask=causal(), k_meta=Meta.of(12, valid=np.arange(12)[None] < 7)))
    np.testing.assert_allclose(out[:, :7], short, atol=1e-5)
    np.testing.assert_allclose(padded, state, atol=1e-5)
    other, _ = run(make_call(q[:, 7:], k[:, 7:], v[:, 7:], mask=causal()))
    meta = Meta.of(12, segment=np.where(np.arange(12) < 7, 1, 2)[None])
    out, _ = run(make_call(q, k, v, mask=causal() & same("segment"), q_meta=meta, k_meta=meta))
    np.testing.assert_allclose(out, np.concatenate([short, other], 1), atol=1e-5)


def test_channel_mixer_and_norm(rng):
    x = rng.normal(size=(3, 6)).astype(np.float32)
    w = [rng.normal(size=s).astype(np.float32) for s in ((6, 5), (6, 5), (5, 6))]
    np.testing.assert_allclose(sglu(2 * x, *w), 4 * sglu(x, *w), rtol=1e-5)
    np.testing.assert_allclose((simple_rms_norm(x) ** 2).mean(-1), 1.0, rtol=1e-4)


def test_errors(rng):
    q, k, v = rng.normal(size=(3, 1, 2, 2, 4)).astype(np.float32)
    with pytest.raises(ValueError, match="gate"):
        lightning_attention(gate="tanh")
    plain = lightning_attention(norm=None, gate=None)
    with pytest.raises(ValueError, match="past"):
        plain.apply({}, State(), make_call(q, k, v, past=(View(k, v, Meta.of(2)),)), Ctx())
    with pytest.raises(ValueError, match="mask"):
        plain.apply({}, State(), make_call(q, k, v, mask=causal("frame")), Ctx())
    with pytest.raises(ValueError, match="ctx.spec"):
        plain.apply({}, State(), make_call(q, k, v), Ctx())
