"""What both kinds of kernels promise beyond plain calls: values in interpret mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxattn.core import mask as masks
from jaxattn.core.attend import attend, merge
from jaxattn.core.types import Meta, Selection
from pallas_kernels import flash as op
from pallas_kernels.flash import gpu, lists, tpu
from tests.pallas_kernels.flash.calls import RICH, call, compare

BODIES = {
    "tpu": functools.partial(tpu.flash, interpret=pltpu.InterpretParams()),
    "gpu": functools.partial(gpu.flash, interpret=True),
}
both = pytest.mark.parametrize("name", BODIES)


@both
def test_weights_of_units_too_small_for_a_kernel_with_live_ranges(rng, name):
    o, opt = call(rng, n=12, h=2, g=2, hs=2, tile=6, unit=3, k=3, bounds=True, mask=masks.causal(), padded=1)
    o["log_weight"] = jnp.asarray(rng.normal(size=o["index"].shape), jnp.float32)
    compare(BODIES[name], o, opt, 1e-5)


@both
def test_a_table_of_biases(rng, name):
    o, opt = call(rng, n=14, m=20, h=2, g=1, tile=8, unit=12, k=2, mask=masks.causal(), padded=2)
    compare(BODIES[name], o | {"bias": jnp.asarray(rng.normal(size=(1, 2, 14, 20)), jnp.float32)}, opt, 1e-5)


@both
def test_pairs_that_are_seen_whole_skip_the_mask(rng, name, monkeypatch):
    """A mask that answers False everywhere, but whose intervals say "all": only whole pairs give values."""
    monkeypatch.setattr(tpu, "KEYS", 16)  # a unit per step: a step of several is whole if all of them are

    class Blind(type(masks.causal())):
        def test(self, q, k):
            return (q["pos"] - k["pos"]) > 2**20

    o, opt = call(rng, n=64, h=2, g=1, tile=16, unit=16, mask=masks.causal())
    o["count"] = jnp.full_like(o["count"], o["index"].shape[3])
    out, lse = jax.jit(lambda o: BODIES[name](o, dataclasses.replace(opt, mask=Blind(None, 1))))(o)
    whole = dataclasses.replace(opt, mask=masks.window(None, 1, "tile"))
    tiles = jnp.arange(64)[None] // 16
    want, _ = op.flash(o | {"q_fields": {"tile": tiles - 1}, "k_fields": {"tile": tiles}}, whole, "reference")
    np.testing.assert_allclose(out, want, atol=1e-5)
    assert not jnp.isfinite(lse[:, :16]).any() and jnp.isfinite(lse[:, 16:]).all()


def test_full_entries_are_those_whose_pairs_are_all_visible(rng):
    mask = RICH & ~masks.first(1)
    for hs, b in ((1, 1), (4, 2)):
        o, opt = call(rng, n=48, b=b, h=4, g=2, hs=hs, tile=8, unit=4, mask=mask, padded=3)
        # labels in runs, so that some tiles hold one value
        for side in ("q_fields", "k_fields"):
            o[side] = {x: a if x == "pos" else jnp.sort(a, -1) for x, a in o[side].items()}
        found = np.asarray(jax.jit(lambda o, opt=opt: lists.full_entries(o, opt, o["k_valid"][:, None]))(o))
        q, k = ({x: np.asarray(a) for x, a in o[side].items()} for side in ("q_fields", "k_fields"))
        ok = mask.test({x: a[..., None] for x, a in q.items()}, {x: a[..., None, :] for x, a in k.items()})
        ok = np.broadcast_to(ok & np.asarray(o["k_valid"])[:, None], (b, 48, 48)).reshape(b, 6, 8, 12, 4).all((2, 4))
        want = np.take_along_axis(np.broadcast_to(ok[:, None], (*found.shape[:3], 12)), np.asarray(o["index"]), -1)
        assert not (found & ~want).any()  # intervals may miss one, never invent one
        assert found.any() and not found.all()


@both
def test_nan_reaches_only_the_rows_that_see_it(rng, name):
    o, opt = call(rng, n=32, h=2, g=2, tile=16, unit=8, mask=masks.causal(), padded=2, key_bias=1)
    o["count"] = jnp.full_like(o["count"], o["index"].shape[3])
    clean = op.flash(o, opt, "reference")[0]
    bad = o | {"k": o["k"].at[0, 20, 0, 3].set(jnp.nan), "v": o["v"].at[0, 24, 0, 3].set(jnp.inf)}
    padding = {"k": jnp.inf, "v": jnp.nan, "key_bias": jnp.nan}
    bad |= {x: bad[x].at[:, 30:].set(value) for x, value in padding.items()}

    def loss(q, k, v):
        out, _ = BODIES[name](bad | {"q": q, "k": k, "v": v}, opt)
        return jnp.where(jnp.isnan(out), 0.0, out)[:, :20].sum(), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*(bad[x] for x in "qkv"))
    np.testing.assert_allclose(out[:, :20], clean[:, :20], atol=1e-5)
    np.testing.assert_allclose(out[:, :, 1], clean[:, :, 1], atol=1e-5)  # the other head
    assert jnp.isnan(out[:, 20:, 0]).all()
    assert jnp.isfinite(grads[0][:, :20]).all()
    assert all(jnp.isfinite(x[:, 30:]).all() for x in grads[1:])


def test_lists_count_a_unit_once_and_ignore_what_is_outside(rng):
    o, opt = call(rng, n=40, tile=8, unit=8, k=5)
    odd = jnp.broadcast_to(jnp.array([3, -1, 3, 1, 99]), o["index"].shape)
    once = jnp.broadcast_to(jnp.array([1, 3, 0, 0, 0]), o["index"].shape)
    weight = jnp.asarray(rng.normal(size=odd.shape), jnp.float32)
    full = jnp.full_like(o["count"], 5)
    first = weight[..., jnp.array([3, 0, 0, 0, 0])]
    want = op.flash(o | {"index": once, "count": full - 3, "log_weight": first}, opt, "reference")
    got = op.flash(o | {"index": odd, "count": full + 7, "log_weight": weight}, opt, "xla")
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    got = op.flash(o | {"index": odd[..., :0], "count": full}, opt, "xla")
    assert not got[0].any() and (got[1] == -jnp.inf).all()
    kept = dataclasses.replace(opt, distinct=True)  # a promise: nothing is looked for
    assert jnp.array_equal(lists.clean(o | {"index": once, "count": full}, kept)["index"], once)
    empty = Selection(jnp.zeros((1, 1, 5, 0), jnp.int32), jnp.zeros((1, 1, 5), jnp.int32), 8, 8)
    assert not attend(o["q"], o["k"], o["v"], where=empty).out.any()


def test_half_precision_on_gpu(rng):
    o, opt = call(rng, n=16, h=2, g=1, tile=8, unit=8, k=2, dtype=jnp.float16, mask=masks.causal())
    out, lse = jax.jit(lambda o: BODIES["gpu"](o, opt))(o)
    want = op.flash(o, opt, "reference")
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out, want[0], atol=5e-3)
    np.testing.assert_allclose(lse, want[1], atol=5e-3)


def test_sinks_gates_and_merging_have_the_dense_gradients(rng, monkeypatch):
    """Two halves of the keys, merged, with a sink and an output gate, against a softmax written out."""
    name = "gpu"  # what is around the kernels is the same for both, and they have the same derivative
    monkeypatch.setitem(op.IMPLEMENTATIONS, name, BODIES[name])
    n, h, g, d = 16, 2, 1, 8
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    args = {"q": array(1, n, h, d), "k": array(1, n, g, d), "v": array(1, n, g, d), "bias": array(1, n, h),
            "sink": array(h), "gate": array(1, n, h, d)}  # fmt: skip
    target, weight = array(1, n, h, d), array(1, n, h)
    half, pos = n // 2, np.arange(n, dtype=np.int32)[None]

    def score(out, lse):
        return (out * target).sum() + (lse * weight).sum()

    def kernels(q, k, v, bias, sink, gate):
        def part(keys, **more):
            meta = Meta.of(half, pos=pos[:, keys])
            where = Selection(jnp.zeros((1, 1, 2, 1), jnp.int32), jnp.ones((1, 1, 2), jnp.int32), half, 8)
            return attend(q, k[:, keys], v[:, keys], mask=masks.causal(), q_meta=Meta.of(n, pos=pos), k_meta=meta, where=where,
                          key={"bias": bias[:, keys]}, implementation=name, **more)  # fmt: skip

        first, second = part(slice(0, half), sink_logit=sink), part(slice(half, n))
        both = merge(first, second)
        return score(both.out * gate, both.lse)

    def dense(q, k, v, bias, sink, gate):
        s = jnp.einsum("bnhd,bmhd->bhnm", q, jnp.repeat(k, h // g, 2)) * d**-0.5 + jnp.moveaxis(bias, 2, 1)[:, :, None]
        s = jnp.where(pos[0][:, None] >= pos[0], s, -jnp.inf)
        s = jnp.concatenate([s, jnp.broadcast_to(sink[None, :, None, None], (1, h, n, 1))], -1)
        out = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(s, -1)[..., :-1], jnp.repeat(v, h // g, 2))
        return score(out * gate, jnp.moveaxis(jax.nn.logsumexp(s, -1), 1, 2))

    got, want = (jax.jit(jax.grad(lambda a, f=f: f(**a)))(args) for f in (kernels, dense))
    for x in args:
        np.testing.assert_allclose(got[x], want[x], atol=1e-5 * float(jnp.abs(want[x]).max()), err_msg=x)
