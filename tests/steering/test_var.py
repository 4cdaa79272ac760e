"""VAR: the released maps, from maps and through class gains; frozen sinks, decoding, grouped heads, operands."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import attend_call, make_call
from jaxattn.core.mask import causal
from jaxattn.core.types import Ctx, Meta, Spec, State, View, split
from jaxattn.steering.classes import over_keys, redistribute
from jaxattn.steering.var import massive, var, var_reference

SPEC = Spec(layers=5, heads=6)


@pytest.fixture(scope="module")
def io(golden):
    return golden("010-visual-attention-sink-var")


def facts(io, m):
    image = (np.arange(m) >= io["image_start"]) & (np.arange(m) < io["image_start"] + io["image_len"])
    sink = np.isin(np.arange(m), io["sink_idx"])
    return sink[None], image[None]


def settings(io):
    return dict(rho=float(io["rho"]), summ=float(io["summ"]), keep=float(io["p"]))


def test_golden_maps(io):
    with jax.enable_x64(True):
        found = massive(io["hidden"], tuple(io["sink_dims"]), io["tau"])
        np.testing.assert_array_equal(np.flatnonzero(found), io["sink_idx"])
        sink, image = facts(io, 20)
        _, chosen = var_reference(io["attn_prefill"], sink, image, np.ones((1, 20), bool), **settings(io))
        np.testing.assert_array_equal(chosen, io["selected_prefill_all_queries"])
        after = np.arange(20)[None] >= io["image_start"] + io["image_len"]
        out, chosen = var_reference(io["attn_prefill"], sink, image, after, **settings(io))
        np.testing.assert_allclose(out, io["attn_prefill_out"], atol=1e-10)
        assert 0 < chosen.sum() < chosen.size
        np.testing.assert_array_equal(np.asarray(out)[~chosen], io["attn_prefill"][~chosen])
        sink, image = facts(io, 21)
        out, chosen = var_reference(io["attn_decode"], sink, image, np.ones((1, 1), bool), **settings(io))
        np.testing.assert_array_equal(chosen, io["selected_decode"])
        np.testing.assert_allclose(out, io["attn_decode_out"], atol=1e-10)


@partial(jax.jit, static_argnames=("program", "phase"))
def layer_of(program, params, call, layer, hidden, phase):
    """One layer as the loop runs it: side rows of the new keys, the edited Call, attention."""
    ctx = Ctx(layer=layer, hidden=hidden, phase=phase, spec=SPEC)
    call = call.replace(key=call.key | program.side(params, State(), call.k_meta, ctx))
    call = program.call(params, State(), call, ctx)
    part, stats = attend_call(call, stats=("masses",))
    return part.out, stats["masses"], over_keys(call, lambda meta, key: key["group"] == 2)


def run(method, call, layer=2, hidden=None, exact=None, phase="prefill"):
    program, params = split(method, SPEC)
    return layer_of(program, params | (exact or {}), call, layer, hidden, phase)


DENSE = jax.jit(lambda call: attend_call(call)[0].out)


def of_maps(a, image, **rest):
    """A Call whose probabilities are the map a [1, H, N, M] and whose values show it."""
    _, h, n, m = a.shape
    zeros = np.zeros((1, n, h, 4))
    meta = Meta.of(m, kind=image.astype(np.int32))
    eye = np.broadcast_to(np.eye(m)[None, :, None], (1, m, h, m))
    bias = np.log(np.where(a > 0, a, 1))
    return make_call(zeros, np.zeros((1, m, h, 4)), eye, k_meta=meta, q_meta=meta, mask=causal(), bias=bias, **rest)


def test_golden_through_class_gains(io):
    with jax.enable_x64(True):
        # Operands are float32 in a record; the released numbers are float64.
        exact = {name: np.float64(x) for name, x in settings(io).items()}
        method = var(tuple(io["sink_dims"].tolist()), tau=float(io["tau"]))
        call = of_maps(io["attn_prefill"], facts(io, 20)[1])
        out = run(method, call, hidden=io["hidden"], exact=exact)[0]
        np.testing.assert_allclose(np.moveaxis(out, 2, 1), io["attn_prefill_out"], atol=1e-10)

        # One decoded token: twenty cached keys with frozen flags, and its own.
        sink, image = facts(io, 20)
        a = np.log(io["attn_decode"][0, :, 0]).T[None]  # [1, 21, H]
        eye = np.broadcast_to(np.eye(21)[None, :, None], (1, 21, 6, 21))
        side = {"bias": a[:, :20], "var_sink": sink[..., None].astype(np.float32)}
        past = View(np.zeros((1, 20, 6, 4)), eye[:, :20], Meta.of(20, kind=image.astype(np.int32)), side)
        own = Meta.of(1, pos=np.array([[20]]))  # no label: text
        call = make_call(np.zeros((1, 1, 6, 4)), np.zeros((1, 1, 6, 4)), eye[:, 20:], q_meta=own, k_meta=own,
                         mask=causal(), past=(past,), key={"bias": a[:, 20:]})  # fmt: skip
        out = run(method, call, hidden=io["hidden"][:, :1], exact=exact, phase="decode")[0]
        np.testing.assert_allclose(np.moveaxis(out, 2, 1), io["attn_decode_out"], atol=1e-10)


N, IMAGE = 40, slice(4, 24)


@pytest.fixture(scope="module")
def scene():
    """Random attention of 6 query heads to 3 kv heads, with one text sink and two sinks in the image."""
    rng = np.random.default_rng(5)
    q = 2 * rng.normal(size=(2, N, 6, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, N, 3, 8)).astype(np.float32)
    hidden = rng.normal(size=(2, N, 64)).astype(np.float32)
    hidden[:, [0, 7, 13], 3] = 60
    kind = np.zeros((1, N), np.int32)
    kind[:, IMAGE] = 1
    return q, k, v, hidden, Meta.of(N, kind=kind)


def method(**changes):
    return var((3, 5), **(dict(tau=4.0, rho=0.12, summ=0.5) | changes))


def test_rows_sum_identity_and_untouched_rows(scene):
    q, k, v, hidden, meta = scene
    call = make_call(q, k, v, q_meta=meta, k_meta=meta, mask=causal())
    dense = DENSE(call)
    out = run(method(), call, hidden=hidden)[0]
    changed = np.abs(out - dense).max(-1) > 1e-5
    assert changed.any() and not changed[:, : IMAGE.stop].any() and not changed.all()
    same = (dict(keep=1.0), dict(rho=-1.0), dict(tau=50.0), dict(layers=(3,)), dict(summ=2.0))
    for changes in same:
        np.testing.assert_allclose(run(method(**changes), call, hidden=hidden)[0], dense, atol=1e-5)
    for layer, spared in ((1, True), (3, False), (4, True)):
        out = run(method(), call, layer, hidden=hidden)[0]
        assert (np.abs(out - dense).max() < 1e-5) == spared
    assert np.abs(run(method(except_last=False), call, 4, hidden=hidden)[0] - dense).max() > 1e-3
    # Constant values: every row must stay a mean.
    ones = run(method(), call.replace(v=np.ones_like(v)), hidden=hidden)[0]
    np.testing.assert_allclose(ones, 1.0, atol=1e-5)


def test_equals_the_reference_with_grouped_heads(scene):
    q, k, v, hidden, meta = scene
    call = make_call(q, k, v, q_meta=meta, k_meta=meta, mask=causal())
    out, masses, _ = run(method(), call, hidden=hidden)
    s = np.einsum("bnhd,bmhd->bhnm", q, np.repeat(k, 2, 2)) / 8**0.5
    a = jax.nn.softmax(np.where(np.tri(N, dtype=bool), s, -np.inf))
    sink = np.isin(np.arange(N), [0, 7, 13])[None].repeat(2, 0)
    image = (meta.labels["kind"] == 1).repeat(2, 0)
    after = np.arange(N)[None].repeat(2, 0) >= IMAGE.stop
    edited, chosen = var_reference(a, sink, image, after, rho=0.12, summ=0.5)
    assert 0 < chosen.sum() < after.sum() * 6
    np.testing.assert_allclose(out, np.einsum("bhnm,bmhd->bnhd", edited, np.repeat(v, 2, 2)), atol=2e-5)
    # What sinks lost is (1 - keep) of their mass, and only image keys that are not sinks gained.
    moved = np.asarray(edited - a)
    lost = np.where(np.asarray(chosen), 0.4 * np.asarray(a)[..., [0, 7, 13]].sum(-1), 0)
    np.testing.assert_allclose(-moved[..., [0, 7, 13]].sum(-1), lost, atol=1e-6)
    others = [j for j in range(N) if not image[0, j] and j != 0]
    np.testing.assert_allclose(moved[..., others], 0, atol=1e-7)
    np.testing.assert_allclose(masses.sum(-1), 1, atol=1e-5)


def test_decoding_is_the_last_row_of_prefill(scene):
    q, k, v, hidden, meta = scene
    call = make_call(q, k, v, q_meta=meta, k_meta=meta, mask=causal())
    whole = run(method(), call, hidden=hidden)[0][:, -1:]
    program, params = split(method(), SPEC)
    row = program.side(params, State(), meta, Ctx(layer=2, hidden=jnp.asarray(hidden), phase="prefill"))["var_sink"]
    assert row.dtype == jnp.float32 and row.shape == (2, N, 1) and row.sum() == 6
    last = Meta.of(1, pos=np.array([[N - 1]]))
    # The cache may be permuted, hold fewer rows and split its kv heads.
    order = np.random.default_rng(0).permutation(N - 1)
    views = []
    for heads in ([0, 2], [1]):
        kind = np.broadcast_to(meta.labels["kind"][:, order], (2, N - 1))[:, None].repeat(len(heads), 1)
        pos = np.broadcast_to(order, kind.shape).astype(np.int32)
        shown = Meta(pos, np.ones(pos.shape, bool), labels={"kind": kind})
        views.append(View(k[:, order][:, :, heads], v[:, order][:, :, heads], shown, {"var_sink": row[:, order]},
                          heads=np.array(heads)))  # fmt: skip
    call = make_call(q[:, -1:], k[:, -1:], v[:, -1:], q_meta=last, k_meta=last, mask=causal(), past=tuple(views))
    one, _, image_sinks = run(method(), call, hidden=hidden[:, -1:], phase="decode")
    np.testing.assert_allclose(one, whole, atol=2e-5)
    assert image_sinks.tolist() == [[[2] * 6]] * 2
    bare = call.replace(past=tuple(view.replace(key={}) for view in call.past))
    with pytest.raises(ValueError, match="var_sink"):
        run(method(), bare, hidden=hidden[:, -1:], phase="decode")


def test_redistribution_without_receivers_changes_nothing():
    masses = jnp.array([[0.2, 0.3, 0.5, 0.0], [0.2, 0.3, 0.1, 0.4]])
    gains = redistribute(masses, (1, 2), 3, 0.6)
    np.testing.assert_allclose(gains, [[1, 1, 1, 1], [1, 0.6, 0.6, 1.4]], atol=1e-6)
    assert np.isfinite(jax.grad(lambda m: redistribute(m, (1, 2), 3, 0.6).sum())(masses)).all()


def test_record_operands_and_bfloat16(scene):
    q, k, v, hidden, meta = (x.astype(jnp.bfloat16) if isinstance(x, np.ndarray) else x for x in scene)
    assert method() == method() and hash(method()) == hash(method()) and var("llama-2-7b").dims == (1415, 2533)
    call = make_call(q, k, v, q_meta=meta, k_meta=meta, mask=causal())
    before, found = layer_of._cache_size(), []
    for changes in (dict(keep=1.0), dict(), dict(tau=5.0, rho=0.9, summ=0.1)):
        out = run(method(**changes), call, hidden=hidden)[0]
        assert out.dtype == jnp.bfloat16
        found.append(np.asarray(out, np.float32))
    assert layer_of._cache_size() == before + 1 and np.isfinite(found).all()
    np.testing.assert_allclose(found[0], np.asarray(DENSE(call), np.float32), atol=2e-2)
    assert np.abs(found[1] - found[0]).max() > 3e-2 and np.abs(found[2] - found[1]).max() > 3e-2
    for wrong, name in ((dict(dims="gpt"), "dims"), (dict(dims=()), "dims"), (dict(dims=(1,), keep=2.0), "keep")):
        with pytest.raises(ValueError, match=name):
            var(**wrong)
    with pytest.raises(ValueError, match="dims"):
        run(var((64,)), make_call(q, k, v, q_meta=meta, k_meta=meta), hidden=hidden)
