"""The two forms of plain XLA, heads as an array axis and head by head, and what all bodies make of odd operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxattn as ja
from jaxattn.core import mask as masks
from pallas_kernels import flash as op
from pallas_kernels.flash import cpu, lists, reference, xla
from tests.pallas_kernels.flash.calls import CALLS, call, compare

BODIES = {"reference": reference.flash, "heads together": xla.flash, "head by head": cpu.flash}
LISTS = {
    "grouped heads": dict(n=40, m=61, b=2, h=4, g=2, tile=16, unit=8, k=5, mask=masks.causal(), key_bias=4),
    "few rows, heads side by side": dict(
        n=3, m=61, b=2, h=8, g=4, tile=3, unit=8, k=7, mask=masks.causal(), key_bias=8, padded=2, bounds=True
    ),
    "lists per query head": CALLS["127: a list per query head, score_mod"] | dict(bounds=True),
}


@pytest.mark.parametrize("name", LISTS)
def test_head_by_head_is_the_reference(rng, monkeypatch, name):
    """Whole lists in one softmax, and, where lists are long, several merged."""
    monkeypatch.setattr(cpu, "KEYS", 16 if name == "grouped heads" else cpu.KEYS)
    monkeypatch.setattr(cpu, "SLAB", 256)  # of few rows: two of the seven units in one softmax
    monkeypatch.setattr(cpu, "BESIDE", 2)
    o, opt = call(rng, **LISTS[name])
    compare(cpu.flash, lists.clean(o, opt), opt, 1e-5)


@pytest.mark.parametrize("short", (False, True))
@pytest.mark.parametrize("n", (32, 1))
def test_walks_without_a_test(rng, monkeypatch, n, short):
    """Lists that are whole everywhere are walked without looking, and with care as soon as one entry is not in use: a NaN
    in its unit reaches nobody."""
    monkeypatch.setattr(cpu, "STEPS", 1)
    o, opt = call(rng, n=n, m=40, h=2, g=2, tile=min(n, 8), unit=8, hs=2, k=3)
    o["count"] = jnp.full_like(o["count"], 3)
    o["index"] = jnp.broadcast_to(jnp.asarray([0, 2, 4]), o["index"].shape).astype(jnp.int32)
    if short:
        o["count"] = o["count"].at[0, 1, -1].set(2)
    assert "cond" in str(jax.make_jaxpr(lambda o: cpu.flash(lists.clean(o, opt), opt))(o))
    compare(cpu.flash, lists.clean(o, opt), opt, 1e-5)
    bad = o | {"v": o["v"].at[:, 33].set(jnp.nan)}  # in the third unit
    out, lse = jax.jit(lambda o: cpu.flash(lists.clean(o, opt), opt))(bad)
    hidden = np.zeros((n, 2), bool)
    hidden[-min(n, 8) :, 1] = short
    np.testing.assert_array_equal(np.isfinite(out[0]).all(-1), hidden)


@pytest.mark.parametrize("count", (5, 4, 1, 0))
def test_long_lists_are_tested_from_the_first_group_that_needs_it(rng, monkeypatch, count):
    """Groups of one unit under a causal mask: the first ones are whole, the diagonal is not; and lists that end early."""
    monkeypatch.setattr(cpu, "KEYS", 8)
    o, opt = call(rng, n=16, m=40, h=2, g=1, tile=8, unit=8, mask=masks.causal())
    o["index"] = jnp.broadcast_to(jnp.arange(5), o["index"].shape).astype(jnp.int32)
    o["count"] = o["count"].at[...].set(count)
    assert cpu._plan(o, opt).groups == 5
    compare(cpu.flash, lists.clean(o, opt), opt, 1e-5)


def test_a_mesh_of_cores_changes_nothing(rng):
    """Under a mesh that batch and heads divide over, every device walks its own heads; the result is the unsharded one."""
    o, opt = call(rng, n=32, m=48, b=2, h=4, g=2, tile=16, unit=16, hs=2, k=2, mask=masks.causal())
    whole = op.flash(o, opt)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        program = jax.jit(lambda o: op.flash(o, opt))
        text = str(jax.make_jaxpr(lambda o: op.flash(o, opt))(o))
        assert "shard_map" in text
        for x, y in zip(program(o), whole, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6)


def test_attend_inside_a_shard_map_walks_heads_one_by_one(rng):
    """The public route: no copy of the keys heads first, and the values of the usual form."""
    q, k, v = (jnp.asarray(rng.normal(size=(1, 64, 2, 8)), jnp.float32) for _ in range(3))
    index = jnp.asarray([[[[0, 2], [1, 3]]] * 2], jnp.int32).reshape(1, 2, 2, 2)
    where = ja.Selection(index, jnp.full((1, 2, 2), 2, jnp.int32), unit=16, tile=32)

    def f(q, k, v, where):
        part = ja.attend(q, k, v, where=where, mask=masks.causal())
        return part.out, part.lse

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    heads = PartitionSpec(None, None, "x")
    spread = jax.shard_map(f, mesh=mesh, in_specs=(heads,) * 3 + (PartitionSpec(None, "x"),), out_specs=heads)
    for x, y in zip(jax.jit(spread)(q, k, v, where), f(q, k, v, where), strict=True):
        np.testing.assert_allclose(jnp.where(jnp.isfinite(x), x, -1e4), jnp.where(jnp.isfinite(y), y, -1e4), atol=2e-6)


# ---------------------------------------------------------------------------------------------------------- odd operands
@pytest.mark.parametrize("name", BODIES)
def test_what_is_hidden_may_be_nan(rng, name):
    """NaN and infinities in keys and values reach the rows that see them and no other, in values and gradients."""
    o, opt = call(rng, n=24, m=32, h=2, g=1, tile=8, unit=8, mask=masks.causal())
    o["k_valid"] = jnp.asarray(np.arange(32)[None] != 3)
    o["count"] = jnp.full_like(o["count"], 3)
    bad = {x: o[x].at[:, 3].set(jnp.nan).at[:, 20, :, 0].set(bad) for x, bad in (("k", jnp.inf), ("v", jnp.nan))}
    clean = {x: o[x].at[:, jnp.array([3, 20])].set(0.0) for x in "kv"}
    listed = np.repeat((np.asarray(o["index"]) == 2).any(-1)[0, 0], 8)  # tiles that list the unit of key 20
    sees = listed & (np.arange(24) + 8 >= 20)
    assert 0 < sees.sum() < 24
    weight = jnp.where(jnp.asarray(sees), 0.0, 1.0)[None, :, None]

    def run(o):
        out, lse = BODIES[name](lists.clean(o, opt), opt)
        kept = jnp.where(weight[..., None] > 0, out, 0.0)
        return kept.sum() + jnp.where((weight > 0) & (lse > -jnp.inf), lse, 0.0).sum(), (out, lse)

    program = jax.jit(lambda k, v: jax.value_and_grad(lambda q: run(o | {"q": q, "k": k, "v": v}), has_aux=True)(o["q"]))
    (_, (out, lse)), dq = program(**bad)
    (_, (want, want_lse)), dq_want = program(**clean)
    assert np.isnan(out[:, sees]).all() and np.isnan(lse[:, sees]).all()
    np.testing.assert_allclose(out[:, ~sees], want[:, ~sees], atol=1e-5)
    np.testing.assert_array_equal(jnp.isneginf(lse[:, ~sees]), jnp.isneginf(want_lse[:, ~sees]))
    np.testing.assert_allclose(dq[:, ~sees], dq_want[:, ~sees], atol=1e-5)


def test_few_rows_keep_a_head_s_nan_to_itself(rng, monkeypatch):
    """Heads whose keys are read side by side: one's NaN or infinity is not the others', and a hidden one is nobody's."""
    monkeypatch.setattr(cpu, "SLAB", 128)
    o, opt = call(rng, n=2, m=32, h=4, g=2, tile=2, unit=8)
    o["k_valid"] = jnp.asarray(np.arange(32)[None] != 3)
    assert cpu._plan(o, opt).beside and cpu._plan(o, opt).groups == 4
    bad = o | {"k": o["k"].at[:, 3].set(jnp.nan).at[:, 20, 0, 1].set(jnp.nan), "v": o["v"].at[:, 3, 1].set(jnp.inf)}
    bad["v"] = bad["v"].at[:, 9, 0, 0].set(jnp.nan)
    body = jax.jit(lambda o: cpu.flash(lists.clean(o, opt), opt))
    (out, lse), (want, want_lse) = body(bad), body(o)
    assert np.isnan(out[:, :, :2]).all() and np.isnan(lse[:, :, :2]).all()
    np.testing.assert_allclose(out[:, :, 2:], want[:, :, 2:], atol=1e-6)
    np.testing.assert_allclose(lse[:, :, 2:], want_lse[:, :, 2:], atol=1e-6)


def test_lists_of_nothing_and_indices_outside_the_keys(rng):
    """An empty list gives empty rows; entries outside the 4 units of 29 keys (the last one is short) do not count."""
    o, opt = call(rng, n=16, m=29, h=2, tile=8, unit=8, k=3)
    empty = o | {"index": o["index"][..., :0], "count": jnp.zeros_like(o["count"])}
    odd = o | {"index": jnp.asarray([[[[-1, 3, 4], [99, 0, 1]]]], jnp.int32), "count": jnp.full((1, 1, 2), 3, jnp.int32)}
    even = o | {"index": jnp.asarray([[[[3, 0], [0, 1]]]], jnp.int32), "count": jnp.asarray([[[1, 2]]], jnp.int32)}
    for name, body in BODIES.items():
        out, lse = body(lists.clean(empty, opt), opt)
        assert not out.any() and jnp.isneginf(lse).all(), name
        for x, y in zip(body(lists.clean(odd, opt), opt), body(lists.clean(even, opt), opt), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", ("float16", "float64"))
def test_other_precisions(rng, dtype):
    """float16 is computed in float32 and returned as float16; float64 stays float64."""
    with jax.enable_x64(dtype == "float64"):
        o, opt = call(rng, n=20, m=24, h=2, g=1, tile=8, unit=8, k=2, mask=masks.causal(), dtype=jnp.dtype(dtype))
        o = lists.clean(o, opt)
        want = reference.flash(o, opt)
        for body in (xla.flash, cpu.flash):
            out, lse = body(o, opt)
            assert out.dtype == dtype and lse.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
            tol = 2e-3 if dtype == "float16" else 1e-12
            np.testing.assert_allclose(np.asarray(out, np.float64), np.asarray(want[0], np.float64), atol=tol)
            seen = jnp.isfinite(lse)
            np.testing.assert_allclose(lse[seen], want[1][seen], atol=max(tol, 1e-5) if dtype == "float16" else tol)


def test_a_static_window_lists_small_units():
    """Where small tiles leave much less to compute, they are taken: a window's units hug it, a causal mask's stay large."""
    metas = ja.Meta.of(8192), ja.Meta.of(8192)
    near = ja.core.attend.dense_list(masks.causal() & masks.window(1024), *metas, 8192, 8192)
    far = ja.core.attend.dense_list(masks.causal(), *metas, 8192, 8192)
    assert (near.tile, near.unit, near.index.shape[-1]) == (128, 128, 9)
    assert far.unit > near.unit
