"""Selection in plain XLA: chunks of units merged into a running top-k, and the derivative of the chosen scores."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.indexer import reference
from pallas_kernels.indexer.top_k import top_k

CHUNK = 1 << 15  # units per step where K is small
SCORES = 1 << 22  # scores of a step: what a tile of queries is cut for
GATHERED = 1 << 23  # numbers gathered at a time in reverse mode


def _padded(x, axis: int, size: int):
    n = x.shape[axis]
    return x if n % size == 0 else jnp.pad(x, [(0, -n % size if a == axis else 0) for a in range(x.ndim)])


def _tiles(x, axis: int, size: int):
    """[..., n, ...] -> [tiles, ..., size, ...]."""
    x = _padded(x, axis, size)
    x = x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x, n: int):
    """[tiles, b, l, size, ...] -> [b, l, n, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :n]


def blocks_of(side: dict, size: int) -> dict:
    """The facts of runs of ``size`` queries or units: whether one is valid, and their common ranges."""
    valid = _padded(side["valid"], 2, size)
    cut = lambda x: x.reshape(*x.shape[:2], -1, size)  # noqa: E731
    far = jnp.iinfo(jnp.int32).max // 4
    ends = {}
    for name, fill, reduce in (("low", far, jnp.min), ("high", -far, jnp.max)):
        ends[name] = {x: reduce(cut(jnp.where(valid, _padded(a, 2, size), fill)), -1) for x, a in side[name].items()}
    return {"valid": cut(valid).any(-1), **ends}


def reach(opt, q: dict, k: dict, rows: int, units: int):
    """int32 [b, l, blocks of rows, 2]: the runs of ``units`` units, from the first to behind the last, that hold some
    eligible unit. ``q``, ``k``: of ``reference.sides``."""
    may = reference.eligible(opt, blocks_of(q, rows), blocks_of(k, units))
    at = jnp.arange(1, may.shape[-1] + 1)
    stop = jnp.where(may, at, 0).max(-1)
    start = jnp.where(may, at - 1, may.shape[-1]).min(-1)
    return jnp.stack([jnp.minimum(start, stop), stop], -1).astype(jnp.int32)


def _forward(o: dict, opt):
    q, _, weight = reference.by_list(o, opt)
    (b, lists, _, n, _), units = q.shape, o["k"].shape[1]
    kept = min(opt.k, units)
    chunk = min(units, max(CHUNK, 8 * kept))
    rows = min(n, max(1, SCORES // (b * q.shape[1] * q.shape[2] * chunk)))
    q_side, k_side = reference.sides(o, opt)
    # One range of chunks for the whole batch: loops keep it as an array dimension.
    span = reach(opt, q_side, k_side, rows, chunk)
    span = jnp.stack([span[..., 0].min((0, 1)), span[..., 1].max((0, 1))], -1)
    k, k_side = _padded(o["k"], 1, chunk), jax.tree.map(lambda x: _padded(x, 2, chunk), k_side)
    row_arrays = {"q": _tiles(q, 3, rows), "side": jax.tree.map(lambda x: _tiles(x, 2, rows), q_side), "span": span}
    if weight is not None:
        row_arrays["weight"] = _tiles(weight, 3, rows)

    def tile(x):
        def merge(j, carry):
            values, index = carry
            take = lambda a, axis=2: lax.dynamic_slice_in_dim(a, j * chunk, chunk, axis)  # noqa: E731
            keys = jnp.moveaxis(take(k, 1), 2, 1)  # heads before units in a chunk only: all keys need no copy
            s = reference.scores(opt, x["q"], keys, x.get("weight"))
            seen = reference.eligible(opt, x["side"], jax.tree.map(take, k_side)) & (s == s)
            # What was kept comes first, so that equal scores keep their order.
            values, at = top_k(jnp.concatenate([values, jnp.where(seen, s, -jnp.inf)], -1), kept)
            old = jnp.take_along_axis(index, jnp.minimum(at, kept - 1), axis=-1)
            return values, jnp.where(at < kept, old, j * chunk + at - kept)

        shape = b, lists, rows, kept
        init = jnp.full(shape, -jnp.inf, jnp.promote_types(q.dtype, jnp.float32)), jnp.zeros(shape, jnp.int32)
        return lax.fori_loop(x["span"][0], x["span"][1], merge, init)

    values, index = lax.map(tile, row_arrays)
    index = jnp.where(values > -jnp.inf, index, units)
    return reference.ascending(_join(index, n), _join(values, n), units)


def divide(o: dict) -> tuple[dict, dict]:
    """Operands as (differentiable, integer) dicts."""
    floats = {x: o[x] for x in ("q", "k", "weight") if o.get(x) is not None}
    return floats, {x: a for x, a in o.items() if x not in ("q", "k", "weight")}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def differentiable(floats: dict, ints: dict, opt, forward):
    """``forward(operands, options)`` with the derivative of the values that it returns."""
    return forward(floats | ints, opt)


def _fwd(floats, ints, opt, forward):
    index, count, values = forward(floats | ints, opt)
    return (index, count, values), (floats, index, count)


def _bwd(opt, forward, saved, cotangents):
    floats, index, count = saved
    q, k, weight = reference.by_list(floats, opt)
    (b, lists, r, n, d), g, kept = q.shape, k.shape[1], index.shape[-1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    rows = min(n, max(1, GATHERED // (b * lists * kept * d)))
    used = jnp.arange(kept) < count[..., None]
    d_values = jnp.where(used, cotangents[2], 0.0)
    xs = {"q": _tiles(q, 3, rows), "index": _tiles(index, 2, rows), "d_values": _tiles(d_values, 2, rows)}
    if weight is not None:
        xs["weight"] = _tiles(weight, 3, rows)

    def tile(dk, x):
        index = x["index"].reshape(b, g, -1)
        take = jax.vmap(jax.vmap(lambda a, i: a.at[i].get(mode="promise_in_bounds")))
        keys = take(k, index).reshape(b, lists, rows, kept, d)

        def values(q, keys, weight):
            precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
            s = jnp.einsum("blrnd,blnkd->blrnk", q, keys, preferred_element_type=wide, precision=precision) * opt.scale
            return reference.reduced(opt, s, None if weight is None else weight[..., None].astype(wide))

        _, pull = jax.vjp(values, x["q"], keys, x.get("weight"))
        dq, d_keys, d_weight = pull(x["d_values"].astype(wide))
        put = jax.vmap(jax.vmap(lambda a, i, e: a.at[i].add(e)))
        dk = put(dk, index, d_keys.astype(wide).reshape(b, g, -1, d))
        return dk, {"q": dq} | ({} if weight is None else {"weight": d_weight})

    dk, found = lax.scan(tile, jnp.zeros(k.shape, wide), xs)

    def back(x):  # [tiles, b, l, r, rows, ...] -> [b, n, H, ...]
        x = jnp.moveaxis(x, 0, 3)
        x = x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :n]
        return jnp.moveaxis(x, 3, 1).reshape(b, n, lists * r, *x.shape[4:])

    grads = {x: back(a) for x, a in found.items()} | {"k": jnp.moveaxis(dk, 1, 2)}
    return {x: a.astype(floats[x].dtype) for x, a in grads.items()}, None


differentiable.defvjp(_fwd, _bwd)


def select(o: dict, opt):
    return differentiable(*divide(o), opt, _forward)
