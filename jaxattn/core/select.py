"""Every choice from scores: top-k, coverage, thresholds, protection, greedy loops; and the one gather of tokens.

Ties go to the lowest index. Kept indices ascend where order carries meaning (``keep_top``); everything is static-shaped:
a count below the capacity is expressed by a ``valid`` mask, never by a smaller array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.mask import tile_intervals
from jaxattn.core.pooling import mean_pool
from jaxattn.core.types import Array, Meta, Selection, expect
from pallas_kernels import indexer


def top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """(values, index) [..., k] of the k largest entries of the last axis, largest first, ties to the lowest index. Rows
    that are cut over devices stay there."""
    expect("k", k, f"between 1 and the {scores.shape[-1]} entries", 1 <= k <= scores.shape[-1])
    return indexer.top_k(scores, k)


def keep_top(scores: Array, k: int, *, count=None) -> tuple[Array, Array]:
    """Indices of the k largest entries in ascending order, for one row or a batch of rows.

    Args:
      scores: [..., M]; -inf marks entries that must not be kept while others are left.
      k: static capacity, 1 <= k <= M.  count: int32 [...] or scalar, how many of the k to use (default all).
    Returns:
      index int32 [..., k] ascending among the valid ones, padded with 0; valid bool [..., k], valid entries first.
    """
    values, index = top_k(scores, k)
    valid = values > -jnp.inf
    if count is not None:
        valid &= jnp.arange(k) < jnp.asarray(count)[..., None]
    index = jnp.sort(jnp.where(valid, index, scores.shape[-1]), axis=-1)
    valid = index < scores.shape[-1]
    return jnp.where(valid, index, 0).astype(jnp.int32), valid


def protect(scores: Array, rows: Array) -> Array:
    """Scores with ``rows`` (bool) raised to +inf: chosen before all others."""
    return jnp.where(rows, jnp.inf, scores)


def forbid(scores: Array, rows: Array) -> Array:
    """Scores with ``rows`` (bool) lowered to -inf: never chosen."""
    return jnp.where(rows, -jnp.inf, scores)


def rank_of(scores: Array) -> Array:
    """int32 rank of each entry of the last axis, 0 for the largest; ties to the lowest index."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def coverage_count(p: Array, gamma, *, rule: str = "until") -> Array:
    """How many of the largest entries of non-negative ``p`` [..., M] are needed to cover the mass ``gamma``.

    rule: "until" the smallest count whose sum reaches gamma; "within" the largest count whose sum is <= gamma;
    "beyond" one more than "within" (FlexPrefill's token count).
    """
    csum = jnp.cumsum(jnp.sort(p, axis=-1)[..., ::-1], axis=-1)
    if rule == "until":
        return jnp.minimum(jnp.sum(csum < gamma, axis=-1) + 1, p.shape[-1])
    expect("rule", rule, "'until', 'within' or 'beyond'", rule in ("within", "beyond"))
    return jnp.sum(csum <= gamma, axis=-1) + (rule == "beyond")


def top_p(p: Array, gamma, *, rule: str = "until") -> Array:
    """bool [..., M]: the largest entries that cover ``gamma`` of the mass under ``rule`` (see coverage_count)."""
    return rank_of(p) < coverage_count(p, gamma, rule=rule)[..., None]


def per_group(scores: Array, group: Array, quota: Array) -> Array:
    """bool [..., M]: in each group the ``quota[g]`` largest entries.

    Args: scores [..., M]; group int32 [..., M] in [0, Q); quota int32 [..., Q].
    """
    order = jnp.argsort(-scores, axis=-1, stable=True)
    g = jnp.take_along_axis(jnp.broadcast_to(group, scores.shape), order, axis=-1)
    onehot = jax.nn.one_hot(g, quota.shape[-1], dtype=jnp.int32)  # [..., M, Q]: M x groups, never M x M
    place = jnp.take_along_axis(jnp.cumsum(onehot, axis=-2), g[..., None], axis=-1)[..., 0] - 1
    keep = place < jnp.take_along_axis(jnp.broadcast_to(quota, (*g.shape[:-1], quota.shape[-1])), g, axis=-1)
    inverse = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(keep, inverse, axis=-1)


def greedy(gain, update, state, n: int, k: int, *, forbidden: Array | None = None) -> Array:
    """k steps of argmax over candidates, the loop behind every greedy selector.

    Args:
      gain: state -> [n] gain of each candidate.  update: (state, chosen index) -> state.  state: any pytree.
      n: candidates.  k: picks, at most n.  forbidden: bool [n], never picked.
    Returns: int32 [k] in order of picking; first index on ties. Vectorise over batches with ``jax.vmap``.
    """
    expect("k", k, f"between 1 and the {n} candidates", 1 <= k <= n)

    def step(carry, _):
        state, taken = carry
        j = jnp.argmax(jnp.where(taken, -jnp.inf, gain(state))).astype(jnp.int32)
        return (update(state, j), taken.at[j].set(True)), j

    taken = jnp.zeros(n, bool) if forbidden is None else forbidden
    return jax.lax.scan(step, (state, taken), None, length=k)[1]


def unit_rows(x: Array) -> Array:
    """Rows of x with length 1 in at least float32; zero rows stay zero, with zero gradient."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))


def diverse(x: Array, k: int, *, first, weight: Array | None = None, combine: str = "max",
            forbidden: Array | None = None) -> Array:
    """int32 [k]: greedy picks that are unlike those picked before, in their order.

    Args:
      x: [N, D], compared by cosine; only a row of similarities per pick is built.  first: int32 scalar, the first pick.
      weight: [N] or None; each step takes argmax weight * (1 - b).
      combine: "max", b the largest cosine to any pick (k-center); "sum", b the sum of cosines (max-sum; no weight).
      forbidden: bool [N], never picked while others are left.
    """  # fmt: skip
    expect("combine", repr(combine), "'max' or 'sum'", combine in ("max", "sum"))
    expect("weight", "an array", "None with combine 'sum'", weight is None or combine == "max")
    n, x = x.shape[0], unit_rows(x)
    blank = jnp.full(n, -1.0 if combine == "max" else 0.0, x.dtype)

    def gain(state):
        b, started = state
        later = -b if weight is None else weight * (1 - b)
        return jnp.where(started, later, jnp.where(jnp.arange(n) == first, jnp.inf, 0.0))

    def update(state, j):
        near = jnp.matmul(x, x[j], precision="highest")
        b = state[0]
        return (jnp.maximum(b, near) if combine == "max" else b + near), jnp.asarray(True)

    return greedy(gain, update, (blank, jnp.asarray(False)), n, k, forbidden=forbidden)


def gather_tokens(x: Array, index: Array) -> Array:
    """x [B, N, ...], index int32 [B, K] -> [B, K, ...]. A batched gather, so a sharded batch stays sharded."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, index)


def gather_meta(meta: Meta, index: Array) -> Meta:
    """Rows ``index`` [B, K] of every field of a Meta (in every kv head alike)."""

    def take(x, axis=-1):
        x = jnp.moveaxis(jnp.asarray(x), axis, 1)
        x = gather_tokens(jnp.broadcast_to(x, (index.shape[0], *x.shape[1:])), index)
        return jnp.moveaxis(x, 1, axis)

    plain = jax.tree.map(take, meta.replace(rope=None))
    if meta.rope is None:
        return plain
    axes = 2 if meta.pos.ndim == 3 else 1  # axes before the rows' own: [B, G] or [B]
    per_axis = meta.rope.ndim > axes + 1
    return plain.replace(rope=take(meta.rope, -2 if per_axis else -1))


def scatter_tokens(x: Array, index: Array, rows: Array) -> Array:
    """x [B, N, ...] with rows [B, K, ...] written at index int32 [B, K]; an index outside [0, N) is dropped."""
    return jax.vmap(lambda row, i, r: row.at[i].set(r, mode="drop"))(x, index, rows)


def from_mask(active: Array, *, unit: int, tile: int, cap: int | None = None, scores: Array | None = None) -> Selection:
    """A Selection from a table of active units.

    Args:
      active: bool [B|1, Hs, Nq, M units].  cap: static limit of entries per row (default: all units).
      scores: [B|1, Hs, Nq, M]; which to keep where more than ``cap`` are active (default: the lowest indices).
    """
    n = active.shape[-1]
    cap = n if cap is None else min(cap, n)
    if scores is None:
        order = jnp.argsort(~active, axis=-1, stable=True)[..., :cap].astype(jnp.int32)
        count = jnp.minimum(active.sum(-1), cap).astype(jnp.int32)
        index = jnp.where(jnp.arange(cap) < count[..., None], order, 0)
    else:
        index, valid = keep_top(jnp.where(active, scores, -jnp.inf), cap)
        count = valid.sum(-1).astype(jnp.int32)
    return Selection(index, count, unit=unit, tile=tile, distinct=True)


def from_index(index: Array, valid: Array, *, unit: int, tile: int) -> Selection:
    """A Selection from indices [B|1, Hs, Nq, K] with ``valid``: sorted ascending, duplicates counted once."""
    big = jnp.iinfo(jnp.int32).max
    index = jnp.sort(jnp.where(valid, index, big), axis=-1)
    fresh = jnp.concatenate([index[..., :1] < big, (index[..., 1:] != index[..., :-1]) & (index[..., 1:] < big)], -1)
    index = jnp.sort(jnp.where(fresh, index, big), axis=-1)
    index = jnp.where(index < big, index, 0).astype(jnp.int32)
    return Selection(index, fresh.sum(-1).astype(jnp.int32), unit, tile, distinct=True)


def to_mask(where: Selection, units: int) -> Array:
    """bool [B|1, Hs, Nq, units] of a Selection. A table of units, for tests and small problems."""
    live = jnp.arange(where.index.shape[-1]) < where.count[..., None]
    index = jnp.where(live, where.index, units)
    table = jnp.zeros((*index.shape[:-1], units + 1), bool)
    return jnp.put_along_axis(table, index, True, axis=-1, inplace=False)[..., :units]


def expand(where: Selection, factor: int) -> Selection:
    """The same keys in units ``factor`` times smaller, with their bounds, positions and weights.

    The last unit of an uneven length becomes units past the end, which attention skips."""
    expect("factor", factor, f"a divisor of the unit {where.unit}", factor >= 1 and where.unit % factor == 0)
    unit, part = where.unit // factor, jnp.arange(factor)

    def flat(x):  # [..., K, factor] -> [..., K * factor]
        return x.reshape(*x.shape[:-2], -1)

    bounds, pos, weight = where.bounds, where.pos, where.log_weight
    if bounds is not None:
        bounds = jnp.clip(bounds[..., None, :] - part[:, None] * unit, 0, unit)
        bounds = bounds.reshape(*bounds.shape[:-3], -1, 2)
    if pos is not None:
        pos = flat(pos[..., None] + part * unit)
    if weight is not None:
        weight = jnp.repeat(weight, factor, axis=-1)
    index = flat(where.index[..., None] * factor + part).astype(jnp.int32)
    return Selection(index, where.count * factor, unit, where.tile, bounds, pos, weight, where.distinct)


def union(a: Selection, b: Selection) -> Selection:
    """Units in either selection; units and tiles must agree, and neither may weigh or bound its units."""
    for name, s in (("a", a), ("b", b)):
        extra = [f for f in ("bounds", "pos", "log_weight") if getattr(s, f) is not None]
        expect(name, extra, "a selection without bounds, pos and log_weight", not extra)
    expect("b", (b.unit, b.tile), f"unit and tile of a, {(a.unit, a.tile)}", (a.unit, a.tile) == (b.unit, b.tile))
    shape = jnp.broadcast_shapes(a.index.shape[:-1], b.index.shape[:-1])
    parts, valid = [], []
    for s in (a, b):
        k = s.index.shape[-1]
        parts.append(jnp.broadcast_to(s.index, (*shape, k)))
        valid.append(jnp.broadcast_to(jnp.arange(k) < s.count[..., None], (*shape, k)))
    return from_index(jnp.concatenate(parts, -1), jnp.concatenate(valid, -1), unit=a.unit, tile=a.tile)


# ------------------------------------------------------------------------------------------------ from queries and keys


def indexed(q: Array, k: Array, entries: int, *, unit: int = 1, tile: int = 1, mask=None, q_meta: Meta | None = None,
            k_meta: Meta | None = None, unit_keys: Array | None = None, pool: str = "mean", heads: str = "each",
            gate: str | None = None, weight: Array | None = None, scale: float | None = None,
            implementation: str | None = None) -> tuple[Selection, Array]:
    """The units of keys with the largest scores for each tile of queries; no table of scores is built.

    Args:
      q: [B, N, H, D], pooled over tiles.  k: [B, M, G, D], pooled over units.  entries: units per list, at most.
      unit, tile: keys per unit and queries per tile.  pool: "mean" or "max", over valid rows.
      mask: a unit is eligible where the mask may show one of its keys to some query of the tile.
      q_meta, k_meta: Meta; default positions 0..N-1 aligned at the end, as in ``attend``.
      unit_keys: [B, ceil(M / unit), G, D], learned or kept, instead of pooled k (whose values are then not read).
      heads: "each" query head a list; "sum" or "max" of the query heads of a kv head, a list per kv head.
      gate: None or "relu" on the products.  weight: [B, N, H] multiplies them (its mean over a tile does): with
        heads "sum", gate "relu" and one kv head, the lightning indexer of DeepSeek-V3.2 (arXiv:2512.02556).
      scale: multiplies q.k, default D ** -0.5.
    Returns: (where, values float32 [B, Hs, Nq, entries]): the scores of the chosen units, -inf behind ``where.count``,
      differentiable in q, k (or unit_keys) and weight. Ties to the lowest index, as in ``top_k``.
    """  # fmt: skip
    (n, m), units = (q.shape[1], k.shape[1]), -(-k.shape[1] // unit)
    expect("entries", entries, "at least 1", entries >= 1)
    expect("pool", repr(pool), "'mean' or 'max'", pool in ("mean", "max"))
    k_meta = Meta.of(m) if k_meta is None else k_meta
    if q_meta is None:
        q_meta = Meta.of(n, pos=np.arange(n, dtype=np.int32)[None] + max(m - n, 0))
    for name, meta, rows in (("q_meta", q_meta, n), ("k_meta", k_meta, m)):
        expect(name, f"{meta.n} rows", f"{rows} rows, as many as the array it describes", meta.n == rows)
    if unit_keys is not None:
        shape = (k.shape[0], units, *k.shape[2:])
        expect("unit_keys", f"shape {unit_keys.shape}", f"{shape}", unit_keys.shape == shape)
    keys = _pooled(k, unit, k_meta.valid, pool) if unit_keys is None else unit_keys
    operands = {"q": _pooled(q, tile, q_meta.valid, pool), "k": keys}
    if weight is not None:
        operands["weight"] = _pooled(weight[..., None], tile, q_meta.valid, "mean")[..., 0].astype(jnp.float32)
    names = mask.fields() if mask is not None else frozenset()
    for side, meta, size in (("q", q_meta, tile), ("k", k_meta, unit)):
        valid = jnp.asarray(meta.valid)
        valid = jnp.pad(valid, [(0, 0)] * (valid.ndim - 1) + [(0, -meta.n % size)])
        operands[f"{side}_valid"] = valid.reshape(*valid.shape[:-1], -1, size).any(-1)
        ends = tile_intervals(meta, names, size, side)
        for i, end in enumerate(("low", "high")):
            operands[f"{side}_{end}"] = {x: _per_tile(a[i]) for x, a in ends.items()}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = indexer.Options(entries, mask, heads, gate, scale)
    index, count, values = indexer.select(operands, options, implementation)
    return Selection(index, count, unit, tile, distinct=True), values


def _per_tile(x):
    """[B|1, G|1, n, 1] or [B|1, G|1, 1, n] -> [B|1, n] or [B|1, G, n]."""
    x = jnp.asarray(x).reshape(*x.shape[:2], -1)
    return x[:, 0] if x.shape[1] == 1 else x


def _pooled(x, size: int, valid, how: str):
    """[B, N, H, D] -> [B, ceil(N / size), H, D] over the rows that ``valid`` [B|1, N] or [B|1, G, N] marks."""
    if size == 1:
        return x
    seen = jnp.asarray(valid)
    seen = seen[..., None] if seen.ndim == 2 else jnp.repeat(jnp.moveaxis(seen, 1, 2), x.shape[2] // seen.shape[1], axis=2)
    seen = seen[..., None]
    if how == "max":
        low = jnp.pad(jnp.where(seen, x, -jnp.inf), [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * 2, constant_values=-jnp.inf)
        top = low.reshape(x.shape[0], -1, size, *x.shape[2:]).max(2)
        return jnp.where(top > -jnp.inf, top, 0)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total, share = mean_pool(jnp.where(seen, x, 0).astype(wide), size), mean_pool(seen.astype(wide), size)
    return (total / jnp.where(share > 0, share, 1)).astype(x.dtype)
