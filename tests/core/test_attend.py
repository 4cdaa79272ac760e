"""``attend``: the fast path against the reference in values and every gradient, and the algebra of Parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import attend as attention
from jaxattn.core import mask as masks
from jaxattn.core import statistics
from jaxattn.core.attend import attend, attend_call, make_call, merge, mix
from jaxattn.core.select import expand, from_mask, gather_meta
from jaxattn.core.types import Meta, Part, Selection, View, contract

# These programs run once, on small arrays: compiling them is what the tests wait for.
CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@contract
class Softcap:
    """cap * tanh(logits * row gain / cap) + key shift, where query and key share a parity of position."""

    cap: float = 3.0

    def fields(self):
        return frozenset({"pos"})

    def __call__(self, logits, q, k, row, key):
        capped = self.cap * jnp.tanh(logits * row["gain"] / self.cap) + key["shift"]
        return jnp.where((q["pos"] - k["pos"]) % 2 == 0, capped, logits)


@contract
class Scale:
    """Gains of classes from their masses: g_c = slope_c * mass_c + 1."""

    groups: int = 3

    def __call__(self, masses, args):
        return args["slope"] * masses + 1.0


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "TILE", 32)
    monkeypatch.setattr(attention, "UNIT", 48)


def tensor(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def finite(x):
    return jnp.where(jnp.isfinite(x), x, 0.0)


def close(a, b, tol=2e-5, message=""):
    scale = max(1.0, float(jnp.abs(finite(b)).max(initial=0.0)))
    np.testing.assert_array_equal(jnp.isfinite(a), jnp.isfinite(b), err_msg=message)
    np.testing.assert_allclose(finite(a) / scale, finite(b) / scale, atol=tol, err_msg=message)


def agree(rng, f, g, floats, tol=2e-5):
    """f and g: floats -> pytree; equal outputs and equal gradients."""
    shapes = jax.tree.leaves(jax.eval_shape(f, floats))
    weights = [tensor(rng, *s.shape) for s in shapes]

    def run(f):
        def loss(floats):
            out = f(floats)
            return sum(jnp.sum(finite(x) * w) for x, w in zip(jax.tree.leaves(out), weights, strict=True)), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=CHEAP)(floats)
        return out, grads

    (a, ga), (b, gb) = run(f), run(g)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        close(x, y, tol, "value")
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ga), jax.tree.leaves(gb), strict=True):
        assert jnp.isfinite(x).all(), path
        close(x, y, 5 * tol, f"gradient {path}")
    return a, ga


def qkv(rng, b, n, m, h, g, d, dv):
    return dict(q=tensor(rng, b, n, h, d), k=tensor(rng, b, m, g, d), v=tensor(rng, b, m, g, dv))


# One compilation where an eager call would make dozens; Metas passed to it are traced.
quick = jax.jit(attend, static_argnames=("mask", "score_mod", "normalizer", "scale", "implementation"))


def implementations(build):
    """The same call by both paths: ``build(floats) -> keyword arguments of attend``."""
    return [lambda x, i=i: attend(**build(x), implementation=i) for i in ("xla", "reference")]


# ------------------------------------------------------------------------------------------------- values and gradients
@jax.jit
def plain(q, k, v, seen=None, bias=0.0):
    """Softmax attention from the definition."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1]) + bias
    s = s if seen is None else jnp.where(seen, s, -jnp.inf)
    return jnp.einsum("bhnm,bmhe->bnhe", jax.nn.softmax(s, -1), v), jnp.moveaxis(jax.nn.logsumexp(s, -1), 1, 2)


LENGTHS = [(1, 1, 2, 1), (1, 129, 4, 2), (17, 17, 2, 2), (127, 129, 4, 1), (1000, 1000, 2, 1)]


@pytest.mark.parametrize(("n", "m", "h", "g"), LENGTHS)
def test_causal_attention_is_the_definition(rng, small_tiles, n, m, h, g):
    x = qkv(rng, 2 if n < 500 else 1, n, m, h, g, 4, 3)
    seen = np.arange(m)[None] <= np.arange(n)[:, None] + m - n

    def fast(x):
        part = attend(**x, mask=masks.causal())
        return part.out, part.lse

    agree(rng, fast, lambda x: plain(**x, seen=seen), x)


def test_every_float_operand_by_both_paths(rng, small_tiles):
    n, m, h, g = 70, 100, 4, 2
    x = qkv(rng, 2, n, m, h, g, 8, 5) | dict(
        bias=tensor(rng, 1, h, n, m), key_bias=tensor(rng, 2, m, g), shift=tensor(rng, 1, m, h),
        gain=tensor(rng, 2, n, h), sink=tensor(rng, h), gate=tensor(rng, 2, n, h, 1),
    )  # fmt: skip
    k_meta = Meta.of(m, valid=np.arange(m)[None] % 11 != 5)

    def build(x):
        return dict(
            q=x["q"], k=x["k"], v=x["v"], bias=x["bias"], key=dict(bias=x["key_bias"], shift=x["shift"]),
            row=dict(gain=x["gain"]), sink_logit=x["sink"], out_gate=x["gate"], score_mod=Softcap(), k_meta=k_meta,
            mask=masks.causal() & (masks.window(50) | masks.first(4)), scale=0.3,
        )  # fmt: skip

    agree(rng, *implementations(build), x)


@pytest.mark.parametrize(("hs", "b"), [(1, 1), (2, 2), (4, 1), (1, 2)])
def test_selections_of_every_head_layout(rng, hs, b):
    n, m, h, g, unit, tile = 60, 83, 4, 2, 10, 16
    active = rng.random((b, hs, 4, 9)) < 0.4
    active[0, 0, 1] = False
    where = from_mask(jnp.asarray(active), unit=unit, tile=tile)
    bounds = np.sort(rng.integers(0, unit + 1, (*where.index.shape, 2)), -1)
    x = qkv(rng, 2, n, m, h, g, 4, 3) | dict(
        bias=tensor(rng, 1, h, n, m), key_bias=tensor(rng, 1, m, h), weight=tensor(rng, *where.index.shape)
    )

    def build(x):
        w = where.replace(log_weight=x["weight"], bounds=jnp.asarray(bounds))
        rest = dict(bias=x["bias"], key=dict(bias=x["key_bias"]), where=w, mask=masks.causal())
        return dict(q=x["q"], k=x["k"], v=x["v"], **rest)

    agree(rng, *implementations(build), x)
    # the selection alone, against a table of keys
    table = np.repeat(np.repeat(active, tile, 2)[:, :, :n], unit, 3)[..., :m]
    table = np.broadcast_to(np.repeat(table, h // hs, 1), (2, h, n, m))
    got = quick(x["q"], x["k"], x["v"], where=where)
    out, lse = plain(x["q"], x["k"], x["v"], seen=table)
    close(got.lse, lse)
    close(got.out, jnp.where(jnp.isfinite(lse)[..., None], out, 0.0))


def test_a_selection_of_everything_is_dense(rng):
    x = qkv(rng, 1, 21, 35, 2, 1, 4, 3)
    for unit in (1, 8):  # the last unit of 8 is uneven
        everything = from_mask(jnp.ones((1, 1, 5, -(-35 // unit)), bool), unit=unit, tile=5)
        close(quick(**x, where=everything).out, plain(**x)[0])
    # units past the end, as expanding an uneven last unit makes them, are no keys
    fine = expand(from_mask(jnp.ones((1, 1, 5, 5), bool), unit=8, tile=5), 8)
    assert int(fine.index.max()) > 34
    for implementation in ("xla", "reference"):
        part = quick(**x, where=fine, implementation=implementation)
        close(part.out, plain(**x)[0])
        close(part.lse, plain(**x)[1])


def test_rows_that_see_nothing_are_empty(rng, small_tiles):
    x = qkv(rng, 1, 50, 60, 2, 1, 4, 3)
    k_meta = Meta.of(60, valid=np.arange(60)[None] >= 30)
    part, grads = agree(rng, *implementations(lambda x: dict(**x, mask=masks.causal(), k_meta=k_meta)), x)
    blind = 20  # query i sits at key i + 10
    assert (part.out[:, :blind] == 0).all() and jnp.isneginf(part.lse[:, :blind]).all()
    assert (part.out[:, blind:] != 0).all() and jnp.isfinite(part.lse[:, blind:]).all()
    assert (grads["q"][:, :blind] == 0).all() and (grads["k"][:, :30] == 0).all() and (grads["v"][:, :30] == 0).all()


def test_traced_metas_skip_the_same_keys(rng, small_tiles):
    x = qkv(rng, 2, 90, 90, 2, 1, 4, 4)
    seg = np.sort(rng.integers(0, 4, (2, 90)), -1).astype(np.int32)
    mask = masks.causal() & masks.same("seg")
    seen = (seg[:, None, :, None] == seg[:, None, None, :]) & np.tri(90, dtype=bool)

    def fast(x, seg):
        meta = Meta.of(90, seg=seg)
        part = attend(**x, mask=mask, q_meta=meta, k_meta=meta)
        return part.out, part.lse

    for got in (jax.jit(lambda x: fast(x, seg))(x), jax.jit(fast)(x, jnp.asarray(seg))):
        for a, b in zip(got, plain(**x, seen=seen), strict=True):
            close(a, b)


def test_bfloat16_is_near_float32(rng, small_tiles):
    x = qkv(rng, 1, 100, 100, 4, 2, 16, 16)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), x)
    part, want = quick(**low, mask=masks.causal()), quick(**x, mask=masks.causal())
    assert part.out.dtype == jnp.bfloat16 and part.lse.dtype == jnp.float32
    np.testing.assert_allclose(part.out.astype(jnp.float32), want.out, atol=2e-2)
    np.testing.assert_allclose(part.lse, want.lse, atol=2e-2)


def test_float64_stays_float64(rng):
    with jax.enable_x64(True):
        x = {k: jnp.asarray(np.asarray(a), jnp.float64) for k, a in qkv(rng, 1, 20, 20, 2, 1, 4, 4).items()}
        part = quick(**x, mask=masks.causal())
        out, lse = plain(**x, seen=np.tri(20, dtype=bool))
        assert part.out.dtype == part.lse.dtype == jnp.float64
        np.testing.assert_allclose(part.out, out, atol=1e-13)
        np.testing.assert_allclose(part.lse, lse, atol=1e-13)


# -------------------------------------------------------------------------------------------------- terms of a Call
def test_a_sink_logit_is_a_key_without_value(rng):
    x = qkv(rng, 2, 9, 12, 4, 2, 4, 3) | dict(sink=tensor(rng, 4))

    def by_sink(x):
        part = attend(x["q"], x["k"], x["v"], sink_logit=x["sink"])
        return part.out, part.lse

    def by_key(x):
        pad = ((0, 0), (0, 1), (0, 0), (0, 0))
        sink = jnp.broadcast_to(x["sink"][None, :, None, None], (2, 4, 9, 1))
        bias = jnp.concatenate([jnp.zeros((2, 4, 9, 12)), sink], -1)
        return plain(x["q"], jnp.pad(x["k"], pad), jnp.pad(x["v"], pad), bias=bias)

    agree(rng, by_sink, by_key, x)
    # alone in its row, a sink leaves 0 and its own mass
    empty = Meta.of(12, valid=np.zeros((1, 12), bool))

    def alone(s):
        part = attend(x["q"], x["k"], x["v"], k_meta=empty, sink_logit=s)
        return part.lse.sum() + part.out.sum(), part

    (_, part), grad = jax.jit(jax.value_and_grad(alone, has_aux=True))(x["sink"])
    assert (part.out == 0).all()
    close(part.lse, jnp.broadcast_to(x["sink"], (2, 9, 4)))
    close(grad, jnp.full(4, 18.0))


def test_class_gains_are_the_formula_on_the_map(rng):
    b, n, m, h, g, dv = 2, 11, 30, 4, 2, 3
    x = qkv(rng, b, n, m, h, g, 4, dv) | dict(slope=jnp.abs(tensor(rng, h, 3)))
    group = jnp.asarray(rng.integers(0, 3, (1, m, 1)))
    cut = 12

    def fast(x):  # part of the keys as a View: gains follow the masses over all of them
        past = (View(x["k"][:, :cut], x["v"][:, :cut], Meta.of(cut), key=dict(group=group[:, :cut])),)
        call = make_call(
            x["q"], x["k"][:, cut:], x["v"][:, cut:], key=dict(group=group[:, cut:]), past=past, gain=Scale(),
            gain_args=dict(slope=x["slope"]),
        )  # fmt: skip
        part, stats = attend_call(call, stats=("masses",))
        return part.out, stats["masses"]

    def slow(x):
        k, v = (jnp.repeat(a, h // g, axis=2) for a in (x["k"], x["v"]))
        p = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", x["q"], k) / 2, -1)
        one = jax.nn.one_hot(group[0, :, 0], 3)
        mass = jnp.einsum("bhnm,mc->bnhc", p, one)
        gain = x["slope"] * mass + 1
        return jnp.einsum("bhnm,mc,bnhc,bmhe->bnhe", p, one, gain, v), mass

    agree(rng, fast, slow, x)


def test_token_sizes_repeat_keys(rng):
    x = qkv(rng, 1, 5, 6, 2, 1, 4, 4)
    size = np.array([[1, 3, 1, 2, 1, 4]], np.float32)
    times = size[0].astype(int)
    repeated = plain(x["q"], jnp.repeat(x["k"], times, axis=1), jnp.repeat(x["v"], times, axis=1))
    got = quick(**x, k_meta=Meta.of(6, size=size))
    close(got.out, repeated[0])
    close(got.lse, repeated[1])


@pytest.mark.parametrize("normalizer", ["l1", "none"])
def test_other_normalizers(rng, small_tiles, normalizer):
    x = qkv(rng, 2, 40, 100, 4, 2, 4, 3)
    x["q"], x["k"] = jnp.abs(x["q"]), jnp.abs(x["k"])

    def slow(x):
        k, v = (jnp.repeat(a, 2, axis=2) for a in (x["k"], x["v"]))
        s = jnp.einsum("bnhd,bmhd->bhnm", x["q"], k) / 2
        s = jnp.where(np.arange(100) <= np.arange(40)[:, None] + 60, s, 0)
        s = s / s.sum(-1, keepdims=True) if normalizer == "l1" else s
        return jnp.einsum("bhnm,bmhe->bnhe", s, v)

    assert quick(**x, mask=masks.causal(), normalizer=normalizer).lse is None
    agree(rng, lambda x: attend(**x, mask=masks.causal(), normalizer=normalizer).out, slow, x)


# ------------------------------------------------------------------------------------------------- Views and merging
def test_views_are_attention_over_the_concatenation(rng, small_tiles):
    b, n, h, g = 2, 40, 4, 2
    x = qkv(rng, b, n, n, h, g, 4, 3)
    x |= dict(k1=tensor(rng, b, 50, g, 4), v1=tensor(rng, b, 50, g, 3))
    x |= dict(k2=tensor(rng, b, 7, 1, 4), v2=tensor(rng, b, 7, 1, 3))
    own = jnp.asarray(rng.random((b, n, h)) < 0.7)
    pos1 = rng.integers(-9, 40, (b, g, 50)).astype(np.int32)  # each kv head keeps rows of its own

    def fast(x):
        past = (
            View(x["k1"], x["v1"], Meta(pos1, np.ones((b, g, 50), bool))),
            View(x["k2"], x["v2"], Meta.of(7), own=own, heads=jnp.array([1])),
        )
        part, _ = attend_call(make_call(x["q"], x["k"], x["v"], mask=masks.causal(), past=past))
        return part.out, part.lse

    def slow(x):
        pad = lambda a: jnp.concatenate([jnp.zeros_like(a), a], 2)  # noqa: E731  (kv head 0 has no such keys)
        k = jnp.concatenate([x["k"], x["k1"], pad(x["k2"])], 1)
        v = jnp.concatenate([x["v"], x["v1"], pad(x["v2"])], 1)
        i = np.arange(n)[:, None]
        mine = jnp.asarray(np.arange(n)[None] <= i) & jnp.moveaxis(own, 2, 1)[..., None]
        first = np.repeat(pos1, h // g, 1)[:, :, None] <= i
        second = np.broadcast_to((np.arange(7)[None] <= i) & (np.arange(h) >= 2)[:, None, None], (b, h, n, 7))
        return plain(x["q"], k, v, seen=jnp.concatenate([mine, first, second], -1))

    agree(rng, fast, slow, x)


def test_merging_is_a_commutative_monoid_with_the_gradient_of_the_whole(rng):
    x = qkv(rng, 2, 20, 60, 4, 2, 4, 3)
    cuts = [slice(0, 7), slice(7, 41), slice(41, 60)]

    def pieces(x):
        return [attend(x["q"], x["k"][:, c], x["v"][:, c]) for c in cuts]

    def merged(x):
        part = merge(*pieces(x))
        return part.out, part.lse

    agree(rng, merged, lambda x: plain(**x), x)

    @jax.jit
    def orders(x):
        a, b, c = pieces(x)
        nothing = Part(jnp.zeros_like(a.out), jnp.full_like(a.lse, -jnp.inf))
        same = merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, a, b), merge(a, nothing, b, c)
        grad = jax.grad(lambda lse: jnp.sum(merge(Part(a.out, lse), nothing).out))(nothing.lse)
        return merge(a, b, c), same, merge(nothing, nothing), grad

    want, same, empty, grad = orders(x)
    for other in same:
        close(other.out, want.out)
        close(other.lse, want.lse)
    assert (empty.out == 0).all() and jnp.isneginf(empty.lse).all() and (grad == 0).all()


def test_merge_weights_inside_and_gains_outside(rng):
    x = qkv(rng, 1, 6, 10, 2, 2, 4, 3)

    @jax.jit
    def run(x):
        a, b = (attend(x["q"], x["k"][:, c], x["v"][:, c]) for c in (slice(0, 4), slice(4, 10)))
        biased = merge(a, b, log_weight=(jnp.array(0.7), jnp.array(0.0)))
        gained = merge(a, b, gain=(jnp.array(2.0), jnp.array(0.5)))
        return a, b, merge(a, b), biased, gained, mix((a, b), (0.25, 0.75))

    a, b, both, biased, gained, mixed = run(x)
    out, lse = plain(**x, bias=jnp.where(jnp.arange(10) < 4, 0.7, 0.0))
    close(biased.out, out)
    close(biased.lse, lse)
    share = jnp.exp(a.lse - both.lse)[..., None]
    close(gained.out, 2.0 * share * a.out + 0.5 * (1 - share) * b.out)
    close(mixed, 0.25 * a.out + 0.75 * b.out)
    free = (Part(a.out), Part(b.out))
    close(merge(*free).out, a.out + b.out)
    with pytest.raises(ValueError, match="^parts: expected all with lse"):
        merge(a, free[1])


# --------------------------------------------------------------------------------------------------- transformations
def test_vmap_is_a_loop(rng, small_tiles):
    x = {k: jnp.stack([a, 2 * a, -a]) for k, a in qkv(rng, 1, 40, 60, 2, 1, 4, 3).items()}
    seg = jnp.asarray(np.sort(rng.integers(0, 3, (3, 1, 60)), -1))

    def run(x, seg):
        meta = Meta.of(60, seg=seg)
        q_meta = gather_meta(meta, jnp.arange(20, 60)[None])
        part = attend(**x, mask=masks.same("seg") & masks.causal(), q_meta=q_meta, k_meta=meta)
        return part.out.sum() + finite(part.lse).sum()

    f = jax.jit(jax.value_and_grad(run))
    got = jax.jit(jax.vmap(jax.value_and_grad(run)))(x, seg)
    for i in range(3):
        want = f(jax.tree.map(lambda a, i=i: a[i], x), seg[i])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close(a[i], b, 1e-4)


def test_a_call_is_a_jit_argument(rng):
    x = qkv(rng, 1, 8, 8, 2, 1, 4, 3)
    traces = []

    @jax.jit
    def run(call):
        traces.append(1)
        return attend_call(call)[0].out

    for cap in (3.0, 3.0):  # equal records made twice compile once
        call = make_call(
            **x, mask=masks.causal() & masks.window(4), score_mod=Softcap(cap), row=dict(gain=jnp.ones((1, 8, 1))),
            key=dict(shift=jnp.zeros((1, 8, 1))),
        )  # fmt: skip
        run(call)
    assert len(traces) == 1


# --------------------------------------------------------------------------------------------------------- bad input
Z = jnp.zeros((2, 6, 4, 8))
K = jnp.zeros((2, 9, 2, 8))
ONE = Selection(jnp.zeros((1, 1, 2, 1), int), jnp.ones((1, 1, 2), int), unit=3, tile=3)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(q=Z[0]), "q"),
        (dict(q=Z.astype(int)), "q"),
        (dict(q=Z[:, :, :3]), "q"),
        (dict(k=K[:1], v=K[:1]), "k"),
        (dict(k=K[..., :5]), "k"),
        (dict(v=K[:, :8]), "v"),
        (dict(q_meta=Meta.of(5)), "q_meta"),
        (dict(k_meta=Meta.of(6)), "k_meta"),
        (dict(bias=jnp.zeros((2, 4, 6, 8))), "bias"),
        (dict(bias=jnp.zeros((2, 3, 6, 9))), "bias"),
        (dict(bias=jnp.zeros((3, 4, 6, 9))), "bias"),
        (dict(bias=jnp.zeros((6, 9))), "bias"),
        (dict(key=dict(bias=jnp.zeros((2, 8, 2)))), r"key\['bias'\]"),
        (dict(row=dict(gain=jnp.zeros((2, 5, 4)))), r"row\['gain'\]"),
        (dict(where=ONE.replace(index=ONE.index[0])), "where.index"),
        (dict(where=ONE.replace(index=jnp.zeros((3, 1, 2, 1), int))), "where.index"),
        (dict(where=ONE.replace(index=jnp.zeros((1, 3, 2, 1), int))), "where.index"),
        (dict(where=ONE.replace(index=jnp.zeros((1, 1, 3, 1), int))), "where.index"),
        (dict(where=ONE.replace(count=jnp.ones((1, 1, 3), int))), "where.count"),
        (dict(normalizer="relu"), "normalizer"),
        (dict(normalizer="l1", sink_logit=jnp.zeros(4)), "normalizer"),
        (dict(implementation="cuda"), "implementation"),
    ],
)
def test_bad_input_is_named(change, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        attend(**(dict(q=Z, k=K, v=K) | change))


def test_received_sums_of_the_own_keys(rng):
    """With a cached View, a sink, padding and rows that do not see the own keys: the columns of the table."""
    q, k, v, past = (jnp.asarray(rng.normal(size=(1, n, h, 4)), jnp.float32) for n, h in ((5, 2), (5, 1), (5, 1), (3, 1)))
    own = jnp.asarray([True, True, False, True, True])[None, :, None]
    view = View(past, past, Meta.of(3, pos=np.arange(3)[None] - 3), own=own)
    meta = Meta.of(5, valid=np.arange(5)[None] < 4)
    call = make_call(q, k, v, q_meta=meta, past=(view,), mask=masks.causal(), sink_logit=jnp.ones(2))
    part, stats = attend_call(call, stats=("received",))
    s = np.einsum("bnhd,bmxd->bhnm", q, k) / 2
    seen = np.tril(np.ones((5, 5), bool)) & np.asarray(own)[0] & (np.arange(5) < 4)[:, None]
    p = np.where(seen, np.exp(s - np.moveaxis(part.lse, 2, 1)[..., None]), 0.0)
    np.testing.assert_allclose(stats["received"], p.sum(2), atol=1e-6)
    want = statistics.received(call, part.lse, jnp.ones((1, 5)))[0]
    np.testing.assert_allclose(stats["received"], want, atol=1e-6)
    with pytest.raises(ValueError, match="^stats: expected"):
        attend_call(call, stats=("taken",))
