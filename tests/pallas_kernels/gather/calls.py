"""Calls of the gather operation for the tests of its bodies, and the comparison of a body with the reference."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core import mask as masks
from pallas_kernels.gather import Options, reference
from pallas_kernels.gather.body import divide


def call(rng, *, n, m, b=1, h=1, g=1, d=8, dv=None, unit=1, hs=1, k=None, own=False, pool=False, shared=False, mask=None,
         key_bias=0, log_weight=False, bounds=False, valid=True, rope=None, pos=False, sums=None,
         dtype=jnp.float32, count=None):  # fmt: skip
    """(operands, options) with random ascending lists of ``k`` units (None: every key), some of them short or empty.

    own: a list per query. pool: keys shared by the batch. shared: one list for the batch. rope: a layout."""
    dv, units = dv or d, -(-m // unit)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    bk, bi, rows = 1 if pool else b, 1 if shared else b, n if own else 1
    o = {"q": array(b, n, h, d), "k": array(bk, m, g, d), "v": array(bk, m, g, dv)}
    if k is not None:
        lists = (bi, hs, rows, k)
        o["index"] = jnp.asarray(
            np.stack([np.sort(rng.permutation(units)[:k]) for _ in range(bi * hs * rows)]).reshape(lists), jnp.int32
        )
        counts = rng.integers(0, k + 1, size=lists[:3]) if count is None else np.full(lists[:3], count)
        o["count"] = jnp.asarray(counts, jnp.int32)
        if bounds:
            o["bounds"] = jnp.asarray(np.sort(rng.integers(0, unit + 1, size=(*lists, 2)), -1), jnp.int32)
        if log_weight:
            o["log_weight"] = jnp.asarray(rng.normal(size=lists), jnp.float32)
        if pos:
            o["pos"] = jnp.asarray(rng.integers(-50, 50, size=lists), jnp.int32)
    if valid:
        o["k_valid"] = jnp.asarray(rng.random((b, g, m)) < 0.9)
    if key_bias:
        o["key_bias"] = jnp.asarray(rng.normal(size=(b, m, key_bias)), jnp.float32)
    if mask is not None:
        o["q_fields"] = {"pos": jnp.asarray(np.arange(n)[None] + m - n, jnp.int32)}
        o["k_fields"] = {"pos": jnp.asarray(rng.permutation(m)[None], jnp.int32)}
    if rope:
        o["freqs"] = jnp.asarray(10.0 ** -np.linspace(0, 2, d // 2 - 1), jnp.float32)  # the last pair does not turn
        if not pos or rng.random() < 0.5:
            o["k_rope"] = jnp.asarray(rng.integers(0, 100, size=(b, m)), jnp.int32)
    options = Options(mask, d**-0.5, unit, sums, rope or "half", 1.25 if rope else 1.0)
    return o, options


def compare(body, o, opt, tol, gradients=True):
    """Assert that ``body(o, opt)`` has the reference's values and gradients, of both outputs, up to ``tol`` of each
    tensor's largest entry."""
    floats, ints = divide(o)

    def everything(fn):
        def loss(floats):
            out, lse, sums = fn(floats | ints, opt)
            seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
            weight = lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)  # noqa: E731
            return (out.astype(jnp.float32) * weight(out)).sum() + (seen * weight(seen)).sum(), (out, lse, sums)

        if not gradients:
            out, lse, sums = jax.jit(loss)(floats)[1]
            return {"out": out, "lse": jnp.where(lse == -jnp.inf, -1e4, lse), "sums": sums}
        (_, (out, lse, sums)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
        return {"out": out, "lse": jnp.where(lse == -jnp.inf, -1e4, lse), "sums": sums, "d": grads}

    want, got = everything(reference.gather), everything(body)
    for (path, x), y in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, (path, x.shape, y.shape, x.dtype, y.dtype)
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        np.testing.assert_allclose(y, x, rtol=0, atol=tol * max(np.abs(x).max(), 1e-3), err_msg=str(path))


CALLS = {
    "every key, one query of 4 heads, ragged": dict(n=1, m=129, b=2, h=4, g=1, d=8, dv=5, unit=16, sums="kv", key_bias=1),
    "every key, unrotated": dict(n=3, m=64, b=2, h=4, g=2, rope="half", valid=False, sums="heads"),
    "blocks of kv heads, live ranges, weights": dict(
        n=1, m=100, b=2, h=8, g=2, unit=8, hs=2, k=5, bounds=True, log_weight=True, sums="kv"
    ),
    "pages of a pool, speculative rows": dict(
        n=4, m=96, b=3, h=2, g=1, d=16, unit=16, k=4, pool=True, valid=False, mask=masks.causal()
    ),
    "one list of 17 tokens for the batch": dict(n=2, m=50, b=2, h=2, g=2, hs=2, k=17, shared=True, key_bias=2),
    "tokens per query head, interleaved": dict(n=1, m=127, h=8, g=1, hs=8, k=16, rope="interleaved", pos=True, sums="heads"),
    "token-level top-k, bfloat16": dict(n=17, m=40, b=2, h=8, g=1, d=20, own=True, k=9, valid=False, dtype=jnp.bfloat16),
    "token-level top-k, a list per kv head": dict(
        n=9, m=33, h=4, g=2, hs=2, own=True, k=7, mask=masks.causal(), log_weight=True, rope="half", key_bias=4
    ),
}


def check_hidden(rng, body, lists: bool):
    """What no row sees (invalid, masked) may hold NaN: values and gradients are those of the reference, and those without
    it. A NaN that one of two rows sees stays with that row."""
    o, opt = call(rng, n=2, m=24, h=2, g=1, unit=8, k=2 if lists else None, count=2, mask=masks.causal(), dv=4)
    pos = jnp.arange(24).at[3].set(99)  # behind both queries
    o["k_fields"], o["k_valid"] = {"pos": pos[None].astype(jnp.int32)}, (jnp.arange(24) != 5)[None]
    o["index"] = jnp.array([[[[0, 2]]]], jnp.int32)
    if not lists:
        del o["index"]
    spoiled = o | {
        "k": o["k"].at[:, 5].set(jnp.nan).at[:, 3, :, 1].set(jnp.inf),
        "v": o["v"].at[:, jnp.array([3, 5])].set(jnp.nan),
    }
    compare(body, spoiled, opt, 1e-5)
    run = jax.jit(lambda o: body(o, opt)[:2])
    want = jax.jit(lambda o: reference.gather(o, opt)[:2])(o)
    for x, y in zip(want, run(spoiled), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5)
    out, lse = run(spoiled | {"v": spoiled["v"].at[:, 23].set(jnp.nan)})  # seen by the second query
    assert jnp.isnan(out[:, 1]).all() and jnp.isnan(lse[:, 1]).all()
    np.testing.assert_allclose(out[:, 0], want[0][:, 0], atol=1e-5)
