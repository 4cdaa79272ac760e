"""The fast path in plain XLA: online softmax over lists of key tiles, in memory linear in length.

Arrays are arranged as [b, g, r, tiles, rows, ...] with H = g * r, so grouped queries never repeat keys and every loop
keeps batch and heads as array dimensions (a sharded batch or head axis stays sharded). Loops stop at ``count``;
reverse mode owns its loops because a while loop has no transpose.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mesh

# ------------------------------------------------------------------------------------------------------ arrangement


def _heads(x, g: int, r: int):
    """[b, N, h, ...] -> [b, g', r', N, ...] for h in {1, G, H}."""
    x = jnp.moveaxis(x, 2, 1)
    shape = {1: (1, 1), g * r: (g, r), g: (g, 1)}[x.shape[1]] if x.shape[1] != g else (g, 1)
    return x.reshape(x.shape[0], *shape, *x.shape[2:])


def _field(x):
    return x[:, None, None] if x.ndim == 2 else x[:, :, None]


def _tiles(x, size: int, axis: int = 3):
    """Pad ``axis`` to a multiple of ``size`` and split it in (tiles, size)."""
    n = x.shape[axis]
    pad = -n % size
    if pad:
        x = jnp.pad(x, [(0, pad if a == axis else 0) for a in range(x.ndim)])
    return x.reshape(*x.shape[:axis], (n + pad) // size, size, *x.shape[axis + 1 :])


def _units(x, g: int, r: int):
    """Per-unit table [b, Hs, Nq, K, ...] -> [b, g', r', Nq, K, ...]."""
    shape = (g, 1) if x.shape[1] == g else {1: (1, 1), g * r: (g, r)}[x.shape[1]]
    return x.reshape(x.shape[0], *shape, *x.shape[2:])


def _arrange(o: dict, opt):
    """Split operands into differentiable and integer ones, row-wise (by query tile) and key-wise (by unit)."""
    h, g = o["q"].shape[2], o["k"].shape[2]
    r, t, u = h // g, opt.tile, opt.unit
    index, count = _units(o["index"], g, r), _units(o["count"], g, r)
    pad = -index.shape[-1] % opt.step
    index = jnp.pad(index, [(0, 0)] * 4 + [(0, pad)])
    lists = {"index": index, "count": count}
    if o.get("bounds") is not None:
        lists["bounds"] = jnp.pad(_units(o["bounds"], g, r), [(0, 0)] * 4 + [(0, pad), (0, 0)])
    rows = {"q": _tiles(_heads(o["q"], g, r), t)}
    rows["row"] = {k: _tiles(_heads(x, g, r), t) for k, x in o.get("row", {}).items() if opt.score_mod is not None}
    keys = {"k": _tiles(_heads(o["k"], g, r), u), "v": _tiles(_heads(o["v"], g, r), u)}
    keys["key"] = {k: _tiles(_heads(x, g, r), u) for k, x in o.get("key", {}).items() if opt.score_mod is not None}
    if o.get("key_bias") is not None:
        keys["key_bias"] = _tiles(_heads(o["key_bias"], g, r), u)
    per_query = {}  # float tables with a query-tile axis at 3: handed to the loop body tile by tile
    if o.get("bias") is not None:
        bias = o["bias"]
        bias = bias.reshape(bias.shape[0], *((1, 1) if bias.shape[1] == 1 else (g, r)), *bias.shape[2:])
        bias = _tiles(_tiles(bias, t), u, axis=5)  # [b, g, r, Nq, t, Nu, u]
        per_query["bias"] = jnp.moveaxis(bias, 5, 4)  # [b, g, r, Nq, Nu, t, u]
    if o.get("log_weight") is not None:
        per_query["log_weight"] = jnp.pad(_units(o["log_weight"], g, r), [(0, 0)] * 4 + [(0, pad)])
    q_ints = {k: _tiles(_field(x), t) for k, x in o["q_fields"].items()}
    k_ints = {"fields": {k: _tiles(_field(x), u) for k, x in o["k_fields"].items()}, "valid": _tiles(_field(o["k_valid"]), u)}
    shared = index.shape[:3] == (1, 1, 1)
    if not shared:  # gradients scatter per (b, g): give every float leaf those axes
        bb, gg = index.shape[0], index.shape[1]

        def widen(x):
            shape = (max(x.shape[0], bb), max(x.shape[1], gg), *x.shape[2:])
            return jnp.broadcast_to(x, shape)

        keys = jax.tree.map(widen, keys)
        if "bias" in per_query:
            r_axis = (index.shape[2],) if index.shape[2] > 1 else per_query["bias"].shape[2:3]
            bias = widen(per_query["bias"])
            per_query["bias"] = jnp.broadcast_to(bias, (*bias.shape[:2], *r_axis, *bias.shape[3:]))
    return rows, keys, per_query, q_ints, k_ints, lists


def _fetch(x, index):
    """x [b, g, r, Nu, ...], index [b', g', r', c] -> [.., c, ...]: the listed units, batch axes broadcast."""
    if x.shape[3] == 1 and index.shape[3] == 1 and index.shape[:3] == (1, 1, 1):
        return x
    if index.shape[:3] == (1, 1, 1):
        if index.shape[3] == 1:
            return lax.dynamic_index_in_dim(x, index[0, 0, 0, 0], 3)
        return jnp.take(x, index[0, 0, 0], axis=3, mode="clip")

    def pick(x, i):
        return x.at[i].get(mode="promise_in_bounds")

    for axis in (2, 1, 0):
        pick = _over(pick, x.shape[axis], index.shape[axis])
    return pick(x, index)


def _over(f, n: int, m: int):
    if n == 1 and m == 1:
        return lambda x, i: f(x[0], i[0])[None]
    axes = (None if n == 1 else 0, None if m == 1 else 0)
    return lambda x, i: jax.vmap(f, in_axes=axes)(x[0] if n == 1 else x, i[0] if m == 1 else i)


def _put(total, index, tile):
    """Add ``tile`` (shaped as ``_fetch`` returned it) to the listed units of ``total``."""
    if total.shape[3] == 1 and index.shape[3] == 1 and index.shape[:3] == (1, 1, 1):
        return total + tile
    if index.shape[:3] == (1, 1, 1):
        if index.shape[3] == 1:
            i = index[0, 0, 0, 0]
            old = lax.dynamic_index_in_dim(total, i, 3)
            return lax.dynamic_update_slice_in_dim(total, old + tile, i, 3)
        return total.at[:, :, :, index[0, 0, 0]].add(tile)

    def add(total, i, t):
        return total.at[i].add(t)

    if total.shape[2] == 1 and index.shape[2] > 1:  # several query heads list units of one kv head

        def over_r(total, i, t):
            return add(total[0], i.reshape(-1), t.reshape(-1, *t.shape[2:]))[None]
    else:
        over_r = _over3(add, total.shape[2], index.shape[2])
    f = _over3(over_r, total.shape[1], index.shape[1])
    return _over3(f, total.shape[0], index.shape[0])(total, index, tile)


def _over3(f, n: int, m: int):
    if m == 1:
        return lambda x, i, t: jax.vmap(f, in_axes=(0, None, 0))(x, i[0], t)
    return lambda x, i, t: jax.vmap(f)(x, i, t)


# ------------------------------------------------------------------------------------------------------ one tile pair


def _merge_units(x):
    """[b, g, r, c, u, ...] -> [b, g, r, c * u, ...]."""
    return x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], *x.shape[5:])


def _dot(a, b, spec_shared: str, spec_per_row: str, acc):
    """Products against key tiles that carry the r axis (per-query-head lists) or not, or all heads side by side."""
    if b.shape[1] != a.shape[1]:
        return _scores_beside(a, b[0, 0, 0], acc) if spec_shared.endswith("u") else _values_beside(a, b[0, 0, 0], acc)
    scores = spec_shared.endswith("u")
    if a.shape[0] == b.shape[0] == b.shape[2] == 1:  # of one batch row: XLA on CPU is slower with axes it does not need
        if scores and a.size == a.shape[-1]:  # one row: the product with turned keys is fused with their fetching
            s = jnp.dot(a.reshape(1, -1), b[0, 0, 0].T, preferred_element_type=acc)
        else:
            over = (((2,), (2 if scores else 1,)), ((0,), (0,)))
            s = lax.dot_general(_flat(a), b[0, :, 0], over, preferred_element_type=acc)
        return s.reshape(*a.shape[:-1], s.shape[-1])
    if b.shape[2] == 1:
        return jnp.einsum(spec_shared, a, b[:, :, 0], preferred_element_type=acc)
    return jnp.einsum(spec_per_row, a, b, preferred_element_type=acc)


def _flat(x):
    """[1, g, r, t, d] -> [g, r * t, d]."""
    return x.reshape(x.shape[1], -1, x.shape[-1])


def _scores_beside(q, k, acc):
    """q [1, g, r, t, D], k [u, g * D] -> [1, g, r, t, u]: a product with each head's queries in its own channels and zeros
    in the others', so that k is read once and as it lies. Where keys are not finite, 0 times them is not 0: head by head."""
    g, (u, _) = q.shape[1], k.shape
    flat = jnp.moveaxis(q.reshape(g, -1, q.shape[4]), 2, 1)  # [g, D, r * t]
    spread = flat[:, :, None] * jnp.eye(g, dtype=q.dtype)[:, None, :, None]
    s = jnp.dot(k, spread.reshape(k.shape[1], -1), preferred_element_type=acc)
    s = lax.optimization_barrier(s).T.reshape(*q.shape[:4], u)  # XLA would turn the product around, which is slow

    def alone():
        return jnp.einsum("bgrtd,ugd->bgrtu", q, k.reshape(u, g, -1), preferred_element_type=acc)

    return lax.cond(jnp.isfinite(s).all(), lambda: s, alone)


def _values_beside(p, v, acc):
    """p [1, g, r, t, u], v [u, g * E] -> [1, g, r, t, E]: every head's rows times every head's values, whose own are kept."""
    g, rows = p.shape[1], p.shape[2] * p.shape[3]
    every = jnp.dot(p.reshape(-1, p.shape[4]), v, preferred_element_type=acc).reshape(g, rows, g, -1)
    return jnp.stack([every[x, :, x] for x in range(g)]).reshape(*p.shape[:4], -1)


def _logits(diff: dict, ints: dict, opt, acc):
    """Logits [b, g, r, t, c * u] of one query tile against ``c`` units, before masking."""
    q, exact = diff["q"], diff["q"].dtype == acc  # half precision would round a scaled q
    q = q * opt.scale if exact else q
    s = _dot(q, _merge_units(diff["k"]), "bgrtd,bgud->bgrtu", "bgrtd,bgrud->bgrtu", acc)
    s = s if exact else s * opt.scale
    if opt.score_mod is not None:
        row = {k: x[..., None] for k, x in diff["row"].items()}
        key = {k: _merge_units(x)[..., None, :] for k, x in diff["key"].items()}
        s = opt.score_mod(s, ints["q"], ints["k"], row, key).astype(acc)
    if "key_bias" in diff:
        s = s + _merge_units(diff["key_bias"])[..., None, :].astype(acc)
    if "bias" in diff:
        bias = jnp.moveaxis(diff["bias"], 3, 4)  # [b, g, r, c, t, u] -> [b, g, r, t, c, u]
        s = s + bias.reshape(*bias.shape[:4], -1).astype(acc)
    if "log_weight" in diff:
        s = s + jnp.repeat(diff["log_weight"], opt.unit, axis=-1)[..., None, :].astype(acc)
    if "broken" in ints:
        s = jnp.where(_merge_units(ints["broken"])[..., None, :], jnp.nan, s)
    return s


def finite(diff: dict, v, ints: dict):
    """The inputs with 0 in place of what is not finite in keys and values, and a note of the keys it stood in: rows that
    see one get NaN, and to others it is nothing, where 0 x NaN would reach them too."""
    k, g = diff["k"], diff["q"].shape[1]
    sound = lambda x: jnp.isfinite(x).all(-1) if k.shape[1] == g else _finite_beside(x, g)  # noqa: E731
    broken = ~(sound(k) & sound(v))
    k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (k, v))
    return diff | {"k": k}, v, ints | {"broken": broken}


def _finite_beside(x, g: int):
    """x [1, 1, 1, c, u, g * E] -> bool [1, g, 1, c, u]."""
    return jnp.moveaxis(jnp.isfinite(x.reshape(*x.shape[3:5], g, -1)).all(-1), 2, 0)[None, :, None]


def _visible(ints: dict, opt):
    """bool, broadcastable to [b, g, r, t, c * u]."""
    ok = _merge_units(ints["valid"])[..., None, :] & jnp.repeat(ints["live"], opt.unit, axis=-1)[..., None, :]
    if "bounds" in ints:
        offset = jnp.arange(opt.unit)
        inside = (offset >= ints["bounds"][..., :1]) & (offset < ints["bounds"][..., 1:])
        ok = ok & inside.reshape(*inside.shape[:-2], -1)[..., None, :]
    if opt.mask is not None:
        ok = ok & opt.mask.test(ints["q"], ints["k"])
    return ok


def captured(keys: dict):
    """Key arrays as loops should capture them: () -> keys. The r axis of one is put back inside the loop, because XLA on
    CPU lays an array with such an axis out anew for a while loop: a copy of a whole layer of the cache."""
    held = jax.tree.map(lambda x: x.reshape(*x.shape[:2], *x.shape[3:]) if x.shape[2] == 1 else x, keys)
    return lambda: jax.tree.map(lambda x, whole: x.reshape(whole.shape), held, keys)


def _step_inputs(i, j, rows, keys, per_query, q_ints, k_ints, lists, opt):
    """Everything one (query tile i, step j) reads: (diff, v, ints, index)."""
    take = functools.partial(lax.dynamic_index_in_dim, index=i, axis=3, keepdims=False)
    at = j * opt.step
    chunk = lambda x, axis: lax.dynamic_slice_in_dim(x, at, opt.step, axis)  # noqa: E731
    index = chunk(take(lists["index"]), 3)
    keys = keys()
    units = keys["k"].shape[3]
    real, index = index < units, jnp.minimum(index, units - 1)  # an expanded selection may list units past the end
    fetch = lambda x: _fetch(x, index)  # noqa: E731
    diff = jax.tree.map(take, rows)
    fetched = jax.tree.map(fetch, keys)
    v = fetched.pop("v")
    diff |= fetched
    if "bias" in per_query:
        diff["bias"] = _fetch(take(per_query["bias"]), index)
    if "log_weight" in per_query:
        diff["log_weight"] = chunk(take(per_query["log_weight"]), 3)
    ints = {
        "q": {k: take(x)[..., :, None] for k, x in q_ints.items()},
        "k": {k: _merge_units(fetch(x))[..., None, :] for k, x in k_ints["fields"].items()},
        "valid": fetch(k_ints["valid"]),
        "live": real & (at + jnp.arange(opt.step) < take(lists["count"])[..., None]),
    }
    if "bounds" in lists:
        ints["bounds"] = chunk(take(lists["bounds"]), 3)
    return *finite(diff, v, ints), index


def _loop(i, lists, opt, body, carry):
    """Run ``body(j, carry)`` over the steps of query tile i, stopping at the largest count."""
    steps = lists["index"].shape[4] // opt.step
    if steps == 1:
        return body(0, carry)
    most = lax.dynamic_index_in_dim(lists["count"], i, 3, keepdims=False).max()
    return lax.fori_loop(0, (most + opt.step - 1) // opt.step, body, carry)


# --------------------------------------------------------------------------------------------------------- forward


def nothing(shape, dv: int, acc):
    """(largest logit, mass, weighted values) of rows [b, g, r, t] that have seen no key."""
    return jnp.full(shape, -jnp.inf, acc), jnp.zeros(shape, acc), jnp.zeros((*shape, dv), acc)


def accumulate(carry, s, ok, v, opt, acc):
    """``nothing``'s triple after keys with logits ``s`` [b, g, r, t, k] and values ``v``. ``ok``: bool, which are visible,
    or None for all; ``carry``: of the keys before, or None."""
    add = lambda p: _dot(p.astype(v.dtype), v, "bgrtu,bgud->bgrtd", "bgrtu,bgrud->bgrtd", acc)  # noqa: E731
    if opt.normalizer == "none":
        top, mass, total = nothing(s.shape[:-1], 1, acc) if carry is None else carry
        return top, mass, total + add(s if ok is None else jnp.where(ok, s, 0.0))
    s = s if ok is None else jnp.where(ok, s, -jnp.inf)
    new = s.max(-1) if carry is None else jnp.maximum(carry[0], s.max(-1))
    safe = jnp.where(new > -jnp.inf, new, 0.0)
    p = jnp.exp(s - safe[..., None])
    if carry is None:
        return new, p.sum(-1), add(p)
    top, mass, total = carry
    shrink = jnp.exp(top - safe)
    return new, mass * shrink + p.sum(-1), total * shrink[..., None] + add(p)


def finish(carry, opt):
    """(out, lse) from ``nothing``'s triple."""
    top, mass, total = carry
    if opt.normalizer == "none":
        return total, jnp.zeros_like(mass)
    seen = mass != 0
    safe = jnp.where(seen, mass, 1.0)
    return total / safe[..., None], jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(safe), -jnp.inf)


def _unarrange(x, b: int, n: int):
    """[Nq, b, g, r, t, ...] -> [b, N, H, ...]."""
    x = jnp.moveaxis(x, 0, 3)  # [b, g, r, Nq, t, ...]
    x = x.reshape(b, x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])
    return jnp.moveaxis(x, 1, 2)[:, :n]


def _over_tiles(f, n_tiles: int):
    if n_tiles == 1:
        return jax.tree.map(lambda x: x[None], f(0))
    return lax.map(f, jnp.arange(n_tiles))


def _forward(o: dict, opt):
    (b, n, h, _), (g, dv) = o["q"].shape, o["v"].shape[2:]
    acc = jnp.promote_types(o["q"].dtype, jnp.float32)
    rows, keys, *others = _arrange(o, opt)
    arranged, lists = (rows, captured(keys), *others), others[-1]
    shape = (b, g, h // g, opt.tile)

    def tile(i):
        def body(j, carry):
            diff, v, ints, _ = _step_inputs(i, j, *arranged, opt)
            return accumulate(carry, _logits(diff, ints, opt, acc), _visible(ints, opt), _merge_units(v), opt, acc)

        out, lse = finish(_loop(i, lists, opt, body, _mesh.varying(nothing(shape, dv, acc), o)), opt)
        return out.astype(o["v"].dtype), lse

    out, lse = _over_tiles(tile, rows["q"].shape[3])
    return _unarrange(out, b, n), _unarrange(lse, b, n)


# -------------------------------------------------------------------------------------------------------- backward


def pull_back(o: dict, opt, per_row: dict, found: dict, pair):
    """The gradient loop over tile pairs, for any function of the logits.

    ``per_row``: arrays [b, g, r, Nq, t, ...] that ``pair`` reads for its query tile. ``found``: zeros [b, g, r, t, ...] of
    row sums that it adds to. ``pair(row, s, ok, v, index) -> (ds, dv or None, row sums)`` gets the logits, what is
    visible, and the fetched values. Returns arranged gradients (rows, keys, per_query) and the row sums.
    """
    acc = jnp.promote_types(o["q"].dtype, jnp.float32)
    rows, keys, per_query, *others = _arrange(o, opt)
    arranged, lists = (rows, captured(keys), per_query, *others), others[-1]

    def tile(i, totals):
        take = functools.partial(lax.dynamic_index_in_dim, index=i, axis=3, keepdims=False)
        row = jax.tree.map(take, per_row)
        row_zero = jax.tree.map(lambda x: jnp.zeros_like(take(x), acc), rows)
        table_zero = jax.tree.map(lambda x: jnp.zeros_like(take(x), acc), per_query)

        def body(j, carry):
            d_rows, d_tables, d_keys, sums = carry
            diff, v, ints, index = _step_inputs(i, j, *arranged, opt)
            s, pull = jax.vjp(lambda d: _logits(d, ints, opt, acc), diff)
            ds, dv, more = pair(row, s, _visible(ints, opt), v, index)
            (grads,) = pull(ds.astype(s.dtype))
            d_rows = {"q": d_rows["q"] + grads["q"], "row": jax.tree.map(jnp.add, d_rows["row"], grads["row"])}
            tables = dict(d_tables)
            if "bias" in per_query:
                tables["bias"] = _put(d_tables["bias"], index, grads["bias"].astype(acc))
            if "log_weight" in per_query:
                tables["log_weight"] = lax.dynamic_update_slice_in_dim(
                    d_tables["log_weight"], grads["log_weight"].astype(acc), j * opt.step, 3
                )
            got = {name: grads[name] for name in d_keys if name != "v"}
            added = {k: x for k, x in d_keys.items() if k != "v" or dv is not None}
            got |= {} if dv is None else {"v": dv}
            added = jax.tree.map(lambda total, x: _put(total, index, x.astype(acc)), added, got)
            return d_rows, tables, d_keys | added, jax.tree.map(jnp.add, sums, more)

        init = _mesh.varying((row_zero, table_zero, totals, found), o)
        d_rows, d_tables, totals, sums = _loop(i, lists, opt, body, init)
        return totals, (d_rows, d_tables, sums)

    totals = _mesh.varying(jax.tree.map(lambda x: jnp.zeros(x.shape, acc), keys), o)
    n_tiles = rows["q"].shape[3]
    if n_tiles == 1:
        totals, by_tile = tile(0, totals)
        by_tile = jax.tree.map(lambda x: x[None], by_tile)
    else:
        totals, by_tile = lax.scan(lambda c, i: tile(i, c), totals, jnp.arange(n_tiles))
    d_rows, d_tables, sums = by_tile
    back = functools.partial(jax.tree.map, lambda x: jnp.moveaxis(x, 0, 3))  # the query-tile axis back at 3
    return (back(d_rows), totals, back(d_tables)), sums


def _backward(o: dict, opt, out, lse, d_out, d_lse):
    """Gradients in arranged form: (rows, keys, per_query) trees, as float accumulators."""
    h, g = o["q"].shape[2], o["k"].shape[2]
    acc = jnp.promote_types(o["q"].dtype, jnp.float32)
    spread = lambda x: _tiles(_heads(x, g, h // g), opt.tile)  # noqa: E731
    delta = jnp.sum(d_out.astype(acc) * out.astype(acc), -1) - d_lse
    # rows that see nothing have no visible key below, so a finite stand-in is enough
    per_row = {"do": spread(d_out), "delta": spread(delta), "lse": spread(jnp.where(jnp.isfinite(lse), lse, 0.0))}

    def gradients(row, s, ok, v, index):
        return *pair(row, s, ok, v, opt, acc), {}

    return pull_back(o, opt, per_row, {}, gradients)[0]


def pair(row: dict, s, ok, v, opt, acc):
    """(gradient of the logits ``s``, gradient of the values ``v`` [b, g, r, c, u, dv]) of one tile pair. ``row``: "do",
    "lse" and "delta" of the query tile; ``ok``: bool, which are visible, or None for all."""
    do, vm = row["do"], _merge_units(v)
    see = lambda x, hidden: x if ok is None else jnp.where(ok, x, hidden)  # noqa: E731
    dp = _dot(do, vm, "bgrtd,bgud->bgrtu", "bgrtd,bgrud->bgrtu", acc)
    if opt.normalizer == "none":
        p, ds = see(s, 0.0), see(dp, 0.0)
    else:
        p = jnp.exp(see(s, -jnp.inf) - row["lse"][..., None])
        ds = p * (dp - row["delta"][..., None])
    if do.shape[0] == v.shape[0] == v.shape[2] == 1:
        over = (((1,), (1,)), ((0,), (0,)))  # the small side first: a first operand that is transposed is slow on CPU
        dv = lax.dot_general(_flat(do), _flat(p.astype(do.dtype)), over, preferred_element_type=acc)
        return ds, dv.swapaxes(1, 2).reshape(v.shape)
    spec = "bgrtu,bgrtd->bgud" if v.shape[2] == 1 else "bgrtu,bgrtd->bgrud"
    return ds, jnp.einsum(spec, p.astype(do.dtype), do, preferred_element_type=acc).reshape(v.shape)


def push_floats(floats: dict, ints: dict, opt, grads):
    """Arranged gradients in the layout and dtype of the operands: the transpose of the (linear) arrangement."""
    arranged, pull = jax.vjp(lambda f: _arrange(f | ints, opt)[:3], floats)
    return pull(jax.tree.map(lambda x, g: g.astype(x.dtype), arranged, grads))[0]


FLOATS = ("q", "k", "v", "key_bias", "bias", "log_weight", "row", "key")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _flash(floats: dict, ints: dict, opt):
    return _forward(floats | ints, opt)


def _fwd(floats, ints, opt):
    out, lse = _forward(floats | ints, opt)
    return (out, lse), (floats, ints, out, lse)


def _bwd(opt, saved, cotangents):
    floats, ints, out, lse = saved
    d_out, d_lse = cotangents
    grads = _backward(floats | ints, opt, out, lse, d_out, d_lse)
    return push_floats(floats, ints, opt, grads), None


_flash.defvjp(_fwd, _bwd)


def divide(o: dict) -> tuple[dict, dict]:
    """Operands as (differentiable, integer) dicts."""
    floats = {"row": {}, "key": {}} | {k: x for k, x in o.items() if k in FLOATS and x is not None}
    return floats, {k: x for k, x in o.items() if k not in FLOATS and x is not None}


def flash(o: dict, opt):
    return _flash(*divide(o), opt)
