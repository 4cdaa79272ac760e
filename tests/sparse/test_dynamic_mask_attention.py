"""Dynamic mask attention: the released Doge layer and its gradients, exact choice per row, caches, tiles, variants."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import attend, make_call
from jaxattn.core.mask import causal, window
from jaxattn.core.types import Ctx, Meta, Spec, State, View, split
from jaxattn.sparse.dynamic_mask_attention import dynamic_mask_attention, importance
from tests.jaxprs import largest

dma = importlib.import_module("jaxattn.sparse.dynamic_mask_attention")  # the package exports the factory


def apply(method, params, call):
    program, operands = split(method)
    return program.apply({**operands, **params}, State(), call, Ctx())[0].out


def delta_of(v, params, form="paper"):
    return importance(v, params["A"], params["dt"], form)


def kept_reference(delta, seen, width):
    """[B, G, N, M]: the width largest delta of each row of ``seen`` [N, M], ties to the first."""
    table = np.where(seen, delta[:, :, None], -np.inf)
    order = np.argsort(-table, axis=-1, kind="stable")[..., :width]
    keep = np.zeros(table.shape, bool)
    np.put_along_axis(keep, order, True, -1)
    return keep & seen


def reference(q, k, v, delta, keep):
    """Dense attention with delta [B, G, M] added to the logits of the keys in keep [B, G, N, M]."""
    r = q.shape[2] // k.shape[2]
    s = np.einsum("bnhd,bmhd->bhnm", q, k.repeat(r, 2)) * q.shape[-1] ** -0.5 + delta.repeat(r, 1)[:, :, None]
    s = np.where(keep.repeat(r, 1), s, -np.inf)
    p = np.exp(s - np.maximum(s.max(-1, keepdims=True), -1e30))
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-30)
    return np.einsum("bhnm,bmhd->bnhd", p, v.repeat(r, 2))


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(3)
    q = rng.normal(size=(2, 40, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 40, 2, 8)).astype(np.float32)
    params = {"A": np.float32([0.8, -0.5]), "dt": rng.normal(size=(16, 2)).astype(np.float32)}
    return q, k, v, params


def test_golden_layer_and_gradients(golden):
    io = golden("060-dynamic-mask-attention")
    weights = ("A", *(n + "_weight" for n in ("q_proj", "k_proj", "v_proj", "dt_proj", "o_proj", "q_norm", "k_norm")))

    def layer(w, x):
        def heads(name, count):
            y = (x @ w[name + "_proj_weight"].T).reshape(2, 20, count, 8)
            if name == "v":
                return y
            y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + io["eps"]) * w[name + "_norm_weight"]
            half = jnp.concatenate([-y[..., 4:], y[..., :4]], -1)
            return y * io["cos"][:, :, None] + half * io["sin"][:, :, None]

        params = {"A": w["A"], "dt": w["dt_proj_weight"].T}
        call = make_call(heads("q", 4), heads("k", 2), heads("v", 2), mask=causal())
        out = apply(dynamic_mask_attention(6), params, call)
        return (out.reshape(2, 20, 32) @ w["o_proj_weight"].T * io["grad_y"]).sum(), (out, call)

    with jax.enable_x64(True):
        w = {n: jnp.asarray(io[n]) for n in weights}
        x = jnp.asarray(io["x"])
        (_, (out, call)), (dw, dx) = jax.jit(jax.value_and_grad(layer, (0, 1), has_aux=True))(w, x)
        y = out.reshape(2, 20, 32) @ w["o_proj_weight"].T
        delta = importance(call.v, w["A"], w["dt_proj_weight"].T)
        call = call.replace(key={"delta": delta})
        keys = dma.joined_keys(call)
        least, last = dma.row_thresholds(causal(), call.q_meta, *keys, 6)
    np.testing.assert_allclose(y, io["y"], atol=5e-6)
    np.testing.assert_allclose(dx, io["grad_x"], atol=1e-5)
    for name in weights:
        np.testing.assert_allclose(dw[name], io["grad_" + name], atol=1e-5, err_msg=name)
    np.testing.assert_allclose(np.moveaxis(delta, 1, 2), io["delta"], rtol=1e-6)
    d, t, p = (np.moveaxis(np.asarray(x), 1, 2) for x in (delta, least, last))
    keep = (d[:, :, None] > t[..., None]) | ((d[:, :, None] == t[..., None]) & (np.arange(20) <= p[..., None]))
    np.testing.assert_array_equal(keep & np.tri(20, dtype=bool), io["bias_keep"])


@pytest.mark.parametrize("ties", [False, True])
def test_rows_keep_the_largest_visible(small, ties, monkeypatch):
    monkeypatch.setattr(dma, "ROWS", 16)  # several tiles of rows and of keys, the last ones ragged
    monkeypatch.setattr(dma, "KEYS", 7)
    q, k, v, params = small
    delta = np.asarray(delta_of(v, params))
    delta = np.round(delta * 2) / 2 if ties else delta
    valid = np.arange(40) >= np.array([[3], [0]])
    meta, key = Meta.of(40, valid=valid), {"delta": jnp.asarray(delta)}
    call = make_call(q, k, v, mask=causal() & window(25), key=key, k_meta=meta)
    away = np.arange(40)[:, None] - np.arange(40)
    seen = ((away >= 0) & (away < 25))[None, None] & valid[:, None, None]
    for width in (1, 5, 30):
        keep = kept_reference(np.moveaxis(delta, 1, 2), seen, width)
        np.testing.assert_array_equal(keep.sum(-1), np.broadcast_to(np.minimum(seen.sum(-1), width), keep.shape[:3]))
        want = reference(q, k, v, np.moveaxis(delta, 1, 2), keep)
        np.testing.assert_allclose(apply(dynamic_mask_attention(width), params, call), want, atol=1e-5)


def test_neutral_importance_is_dense_attention(small):
    q, k, v, params = small
    out = apply(dynamic_mask_attention(40), params | {"A": np.zeros(2, np.float32)}, make_call(q, k, v, mask=causal()))
    np.testing.assert_allclose(out, attend(q, k, v, mask=causal()).out, atol=1e-5)


def test_dropped_keys_have_zero_gradient(small):
    q, k, v, params = small
    delta = np.asarray(delta_of(v, params))
    keep = kept_reference(np.moveaxis(delta, 1, 2), np.tri(40, dtype=bool), 3)
    weight = np.random.default_rng(0).normal(size=q.shape).astype(np.float32)

    def loss(k, v, delta, params):
        key = {"delta": delta} if delta is not None else {}
        return (apply(dynamic_mask_attention(3), params, make_call(q, k, v, mask=causal(), key=key)) * weight).sum()

    dk, dv, dd = jax.grad(loss, (0, 1, 2))(k, v, jnp.asarray(delta), params)
    unused = ~np.moveaxis(keep.any(2), 1, 2)
    assert unused.any()
    for x in (dk, dv, dd[..., None]):
        assert not np.asarray(x)[unused].any() and np.asarray(x)[~unused].any()
    dp = jax.grad(loss, 3)(k, v, None, params)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in jax.tree.leaves(dp))


def test_decoding_over_a_cache_is_the_last_row(small):
    q, k, v, params = small
    for how in ({}, {"mode": "relu", "form": "log"}, {"block_smooth": 8}):
        method = dynamic_mask_attention(12, **how)
        full = apply(method, params, make_call(q, k, v, mask=causal()))
        side = method.side(params, None, k, v)["delta"]
        order = np.random.default_rng(1).permutation(39)  # cached rows lie anywhere: positions say where they belong
        meta = Meta.of(39, pos=order[None].astype(np.int32))
        view = View(k[:, order], v[:, order], meta, key={"delta": side[:, order]})
        new = Meta.of(1, pos=np.array([[39]], np.int32))
        call = make_call(q[:, 39:], k[:, 39:], v[:, 39:], mask=causal(), q_meta=new, k_meta=new, past=(view,))
        np.testing.assert_allclose(apply(method, params, call), full[:, 39:], atol=1e-5)
        assert method == dynamic_mask_attention(12, **how) and hash(method) == hash(dynamic_mask_attention(12, **how))


def test_variants(small):
    q, k, v, params = small
    call = make_call(q, k, v, mask=causal())
    log = np.moveaxis(np.asarray(delta_of(v, params, "log")), 1, 2)
    paper = np.moveaxis(np.asarray(delta_of(v, params)), 1, 2)
    np.testing.assert_allclose(np.exp(log), paper, rtol=1e-5)
    seen = np.tri(40, dtype=bool)
    relu = apply(dynamic_mask_attention(mode="relu", form="log"), params, call)
    positive = seen & (log > 0)[:, :, None]
    np.testing.assert_allclose(relu, reference(q, k, v, log, positive), atol=1e-5)
    assert not np.asarray(relu)[:, :, 2:].any()  # A < 0: no key of these heads counts, and rows without keys are 0
    keep = kept_reference(paper, seen, 20).reshape(2, 2, 40, 5, 8)
    smooth = np.repeat(keep.sum(-1) * 2 > 8, 8, -1) & seen
    out = apply(dynamic_mask_attention(20, block_smooth=8), params, call)
    np.testing.assert_allclose(out, reference(q, k, v, paper, smooth), atol=1e-5)


def test_tiles_without_a_kept_key_are_skipped(small, monkeypatch):
    monkeypatch.setattr(dma, "TILE", 8)
    q, k, v, params = small
    delta = np.full((2, 40, 2), 0.5, np.float32) - np.arange(40)[:, None] * 1e-3
    delta[:, 8:16] += 1  # late rows keep keys of the second tile only
    call = make_call(q, k, v, mask=causal(), key={"delta": jnp.asarray(delta)})
    least, _ = dma.row_thresholds(causal(), call.q_meta, *dma.joined_keys(call), 8)
    where = dma.active_tiles(call, least)
    np.testing.assert_array_equal(where.count[0, 0], [1, 2, 1, 1, 1])
    np.testing.assert_array_equal(where.index[0, 0, 2:, 0], 1)
    keep = kept_reference(np.moveaxis(delta, 1, 2), np.tri(40, dtype=bool), 8)
    out = apply(dynamic_mask_attention(8), params, call)
    np.testing.assert_allclose(out, reference(q, k, v, np.moveaxis(delta, 1, 2), keep), atol=1e-5)


def test_width_is_an_operand_and_bfloat16_is_finite(small):
    q, k, v, _ = small
    params = dynamic_mask_attention().init(jax.random.key(0), Spec(kv_heads=2, head_dim=8, value_dim=8))
    assert params["A"].shape == (2,) and params["dt"].shape == (16, 2)
    traces = []

    @jax.jit
    def run(params, q, k, v):
        traces.append(1)
        return program.apply(params, State(), make_call(q, k, v, mask=causal()), Ctx())[0].out

    outs = []
    for width in (4, 40):
        program, operands = split(dynamic_mask_attention(width))
        outs.append(run({**operands, **params}, *(x.astype(jnp.bfloat16) for x in (q, k, v))))
    assert len(traces) == 1 and outs[0].dtype == jnp.bfloat16
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in outs) and (outs[0] != outs[1]).any()
    with pytest.raises(ValueError, match="form"):
        dynamic_mask_attention(form="square")
    with pytest.raises(ValueError, match="past"):
        view = View(k, v, Meta.of(40))
        apply(dynamic_mask_attention(), params, make_call(q, k, v, mask=causal(), past=(view,)))


def test_memory_is_linear_in_the_gradient():
    q, params = jnp.zeros((1, 2048, 1, 8)), {"A": jnp.zeros(1), "dt": jnp.zeros((8, 1))}
    run = lambda p, *a: apply(dynamic_mask_attention(64), p, make_call(*a, mask=causal())).sum()  # noqa: E731
    elements, _, shape = largest(jax.grad(run, (0, 1, 2, 3)), params, q, q, q)
    assert elements <= dma.ROWS * dma.KEYS, shape
