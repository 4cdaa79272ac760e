"""Slots: the storage that every cache policy is written on.

A cache is W slots per layer, batch row and kv head. Keys, values, Meta, side rows and statistics of a slot move
together. Inside the layer loop slots are only read; what a step leaves behind is a pending record (``Whole``,
``Append`` or ``Swap``), and one ``commit`` writes the pending records of all layers, so a decoding step holds one copy
of the cache and a few rows.

Letters: L layers (absent inside the layer loop), B batch, G kv heads, H query heads, W slots, N new rows. A policy
whose heads all keep the same rows stores facts about them once: the axis written ``1|G`` is then 1.
"""

from __future__ import annotations

from dataclasses import field

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.core.select import keep_top
from jaxattn.core.types import Array, Meta, Spec, View, data, expect


@data
class Slots:
    """Rows of a cache.

    Attributes:
      k, v: [L, B, G, W, D], [L, B, G, W, Dv].
      meta: Meta, fields [L, B, 1|G, W]; an empty slot is not valid. ``rope`` is kept only by policies that re-rotate.
      used: int32 [L]; slots written so far, where a policy only appends.
      side: {name: [L, B, 1|G|H, W]}; what methods keep beside a key.
      stats: {name: [L, B, 1|G, W]}; what the policy keeps about a slot; "rank": its place in time among the valid ones.
    """

    k: Array
    v: Array
    meta: Meta
    used: Array
    side: dict[str, Array] = field(default_factory=dict)
    stats: dict[str, Array] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.k.shape[-2]


@data
class Whole:
    """Pending: the complete new slots of the layer (after a prompt or a chunk)."""

    slots: Slots


@data
class Append:
    """Pending: rows to be written behind the used slots; ``stats``: those that change in every slot, whole."""

    rows: Slots
    stats: dict[str, Array] = field(default_factory=dict)


@data
class Swap:
    """Pending: one row per head written at ``slot`` int32 [L, B, 1|G] (W: nowhere); ``stats``: of all slots, whole."""

    rows: Slots
    slot: Array
    stats: dict[str, Array] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------- making slots


def empty(spec: Spec, width: int, *, per_head: bool = False, stats: dict | None = None) -> Slots:
    """Slots of ``spec.layers`` layers without a row. stats: {name: dtype}. per_head: stats and Meta are per kv head."""
    expect("spec.length", width, "at least one row", width >= 1)
    shape = (spec.layers, spec.batch, spec.kv_heads, width)
    heads = (*shape[:2], spec.kv_heads if per_head else 1, width)
    meta = Meta(jnp.zeros(heads, jnp.int32), jnp.zeros(heads, bool))
    stats = {name: jnp.zeros(heads, dtype) for name, dtype in (stats or {}).items()}
    dtype = jnp.dtype(spec.dtype)
    return Slots(jnp.zeros((*shape, spec.head_dim), dtype), jnp.zeros((*shape, spec.value_dim or spec.head_dim), dtype),
                 meta, jnp.zeros(spec.layers, jnp.int32), {}, stats)  # fmt: skip


def rows_of(k: Array, v: Array, meta: Meta, side: dict, *, heads: int = 1, rope: bool = False, **stats) -> Slots:
    """New rows as slots: k, v [B, N, G, D], meta [B|1, N], side {name: [B, N, 1|G|H]} -> Slots of one layer.

    heads: G for a policy that keeps facts per kv head, else 1.  stats: {name: [B, heads, N]}.
    rope: keep the rows' rotary positions, for policies that store keys before rotation and rotate at true positions.
    """
    b, n = k.shape[:2]

    def spread(x):  # [B|1, N, ...] -> [B, heads, N, ...]
        x = jnp.asarray(x)
        return jnp.broadcast_to(x[:, None], (b, heads, n, *x.shape[2:]))

    kept = (meta.pos if meta.rope is None else meta.rope) if rope else None
    meta = jax.tree.map(spread, meta.replace(rope=kept))
    side = {name: jnp.broadcast_to(jnp.moveaxis(x, 1, 2), (b, x.shape[2], n)) for name, x in side.items()}
    return Slots(k.swapaxes(1, 2), v.swapaxes(1, 2), meta, jnp.int32(n), side, stats)


def _axes(slots: Slots) -> Slots:
    """For every leaf but ``used``, its axis of slots, counted from the end."""
    last = lambda tree: jax.tree.map(lambda x: -1, tree)  # noqa: E731
    meta = last(slots.meta)
    if slots.meta.rope is not None and slots.meta.rope.ndim > slots.meta.pos.ndim:
        meta = meta.replace(rope=-2)
    return Slots(-2, -2, meta, None, last(slots.side), last(slots.stats))


def _map(f, slots: Slots, *more: Slots) -> Slots:
    """f(axis, leaf, ...) over all leaves but ``used``, which stays the first argument's."""
    bare = [s.replace(used=None) for s in (slots, *more)]
    return jax.tree.map(f, _axes(slots), *bare).replace(used=slots.used)


def alike(rows: Slots, slots: Slots) -> Slots:
    """``rows`` with exactly the facts that ``slots`` keep; where absent: size 1, rope pos, label 0, side row 0."""
    pos = rows.meta.pos
    labels = {x: rows.meta.labels.get(x, jnp.zeros_like(pos)) for x in slots.meta.labels}
    size = rows.meta.size
    expect("meta.size", "rows with sizes", "rows that stand for one token each, as those cached before",
           slots.meta.size is not None or size is None)  # fmt: skip
    if slots.meta.size is not None and size is None:
        size = jnp.ones(pos.shape, slots.meta.size.dtype)
    rope = None
    if slots.meta.rope is not None:
        rope = pos if rows.meta.rope is None else rows.meta.rope
        if rope.ndim < slots.meta.rope.ndim:  # one position on every axis, as of text
            rope = jnp.broadcast_to(rope[..., None], (*rope.shape, slots.meta.rope.shape[-1]))
    blank = lambda x: jnp.zeros((*x.shape[:-1], pos.shape[-1]), x.dtype)  # noqa: E731
    side = {x: _per_head(rows.side.get(x, blank(a)), a.shape[-2], -2) for x, a in slots.side.items()}
    return rows.replace(meta=Meta(pos, rows.meta.valid, rope, size, labels), side=side)


# --------------------------------------------------------------------------------------------------- reading, moving


def view_of(slots: Slots, *, valid: Array | None = None, rope: Array | None = None, **more) -> View:
    """The View of one layer's slots. valid, rope: [B, 1|G, W] in place of the stored ones; more: fields of View."""
    meta = slots.meta
    meta = meta if valid is None else meta.replace(valid=valid)
    meta = meta if rope is None else meta.replace(rope=rope)
    heads = max(x.shape[1] for x in jax.tree.leaves(meta))

    def fact(x):  # [B, 1|G, W, ...] -> [B, W, ...], or [B, G, W, ...] where heads differ
        return x[:, 0] if heads == 1 else jnp.broadcast_to(x, (x.shape[0], heads, *x.shape[2:]))

    side = {name: x.swapaxes(1, 2) for name, x in slots.side.items()}
    return View(slots.k.swapaxes(1, 2), slots.v.swapaxes(1, 2), jax.tree.map(fact, meta), side, **more)


def widen(slots: Slots, width: int) -> Slots:
    """The same rows in ``width`` slots; those added are empty."""
    extra = width - slots.width
    expect("width", width, f"at least the {slots.width} rows to store", extra >= 0)

    def pad(axis, x):
        return jnp.pad(x, [(0, extra if a == x.ndim + axis else 0) for a in range(x.ndim)])

    return _map(pad, slots)


def join(a: Slots, b: Slots) -> Slots:
    """The slots of ``a`` and, behind them, the rows of ``b``, as facts of the same heads."""
    both = _map(lambda axis, x, y: jnp.concatenate([x, y.astype(x.dtype)], axis), a, alike(b, a))
    return both.replace(used=a.used + b.used)


def _per_head(index: Array, n: int, axis: int) -> Array:
    """An index for 1 or G heads, for n heads (kv heads or query heads)."""
    return index if index.shape[axis] == n else jnp.repeat(index, n // index.shape[axis], axis=axis)


def take(slots: Slots, index: Array, valid: Array) -> Slots:
    """Slots ``index`` int32 [L, B, 1|G, M], of which ``valid`` [L, B, 1|G, M] are rows: everything moves together."""

    def gather(axis, x):
        lead, heads = index.ndim - 1, max(x.shape[index.ndim - 2], index.shape[-2])
        x = jnp.broadcast_to(x, (*x.shape[: lead - 1], heads, *x.shape[lead:]))
        f = lambda row, i: row.at[i].get(mode="promise_in_bounds")  # noqa: E731
        for _ in range(lead):  # batched over layers, batch and heads: sharded axes stay sharded
            f = jax.vmap(f)
        return f(x, _per_head(index, heads, -2))

    out = _map(gather, slots)
    valid = _per_head(valid, out.meta.valid.shape[-2], -2)
    return out.replace(meta=out.meta.replace(valid=out.meta.valid & valid))


def rank_in_time(pos: Array, valid: Array) -> Array:
    """int32 [..., W]: place of each valid row in order of ``pos``, ties in order of slots; -1 for the others."""
    order = jnp.argsort(jnp.where(valid, pos, jnp.iinfo(jnp.int32).max), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    return jnp.where(valid, rank, -1)


def count(slots: Slots) -> Array:
    """int32 [..., B, 1|G]: rows in use."""
    return slots.meta.valid.sum(-1).astype(jnp.int32)


def next_ranks(slots: Slots, meta: Meta) -> Array:
    """int32 [B, N]: ranks of the new rows, behind those cached (all heads hold equally many); -1 if not valid."""
    first = count(slots)[:, 0, None]
    pos, valid = (jnp.broadcast_to(x, (first.shape[0], x.shape[-1])) for x in (meta.pos, meta.valid))
    return jnp.where(valid, rank_in_time(pos, valid) + first, -1)


def per_kv_head(x: Array, kv_heads: int, how: str = "sum") -> Array:
    """[B, H, M] scores of query heads -> [B, G, M] over the heads that share a kv head; how: "sum" | "max" | "mean"."""
    x = x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])
    return {"sum": jnp.sum, "max": jnp.max, "mean": jnp.mean}[how](x, axis=2)


def compact(slots: Slots, score: Array, width: int, limit: Array | int) -> Slots:
    """At most ``limit`` rows with the largest scores, in ``width`` slots, their ranks closed up.

    Args:
      score: [B, 1|G, W], +inf for rows that are protected.  width: static.  limit: int32, scalar or [B, 1|G].
    """
    score = jnp.where(slots.meta.valid, score, -jnp.inf)
    index, valid = keep_top(score, min(width, slots.width), count=jnp.minimum(limit, width))
    kept = widen(take(slots, index, valid), width)
    rank = rank_in_time(kept.stats["rank"], kept.meta.valid)
    return kept.replace(stats={**kept.stats, "rank": rank})


def drop(slots: Slots, gone: Array) -> Slots:
    """Slots with the rows ``gone`` (bool, as meta.valid) emptied and the ranks closed up."""
    valid = slots.meta.valid & ~gone
    rank = rank_in_time(slots.stats["rank"], valid)
    return slots.replace(meta=slots.meta.replace(valid=valid), stats={**slots.stats, "rank": rank})


# ------------------------------------------------------------------------------------------------------ one step


def swap(slots: Slots, rows: Slots, score: Array, limit: Array | int, **stats) -> Swap:
    """One row in and, where more than ``limit`` rows would stay, one row out: an argmin and no sort.

    Args:
      slots, rows: of one layer; rows of width 1.
      score: [B, 1|G, W + 1], the new row's last; the lowest leaves, of equal ones the youngest; +inf protects.
      stats: {name: ([B, 1|G, W] of the slots, [B, 1|G] of the new row)}; "rank" is kept here.
    """
    valid, rank, w = slots.meta.valid, slots.stats["rank"], slots.width
    comes = jnp.broadcast_to(rows.meta.valid, (*valid.shape[:2], 1))
    n = valid.sum(-1, keepdims=True) + comes
    everyone = jnp.concatenate([valid, comes], -1)
    ranks = jnp.concatenate([jnp.where(valid, rank, -1), jnp.where(comes, n - 1, -1)], -1).astype(jnp.int32)
    full = n > jnp.minimum(limit, w)
    score = jnp.where(everyone, score, jnp.inf)
    lowest = everyone & (score == score.min(-1, keepdims=True))
    out = jnp.argmax(jnp.where(lowest, ranks, -1), -1, keepdims=True)
    gone = jnp.where(full, jnp.take_along_axis(ranks, out, -1), n)
    slot = jnp.where(full, out, jnp.argmin(valid, -1, keepdims=True))  # the first empty slot
    slot = jnp.where(comes, slot, w).astype(jnp.int32)
    here = jnp.arange(w) == slot
    rank = jnp.where(here, n - 1 - full, rank - (comes & (rank > gone))).astype(jnp.int32)
    stats = {name: jnp.where(here, new[..., None].astype(old.dtype), old) for name, (old, new) in stats.items()}
    return Swap(rows.replace(stats={}), slot[..., 0], {**stats, "rank": rank})


def _write_behind(x: Array, new: Array, used: Array, axis: int) -> Array:
    put = lambda x, new, at: lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), at, axis)  # noqa: E731
    return jax.vmap(put)(x, new, used) if used.ndim else put(x, new, used)


def behind(x: Array, new: Array, used: Array) -> Array:
    """A statistic [..., W] with the new rows' values [..., N] written behind the used slots."""
    return _write_behind(x, jnp.broadcast_to(new, (*x.shape[:-1], new.shape[-1])), used, -1)


def grow(slots: Slots, rows: Slots, phase: str, **stats) -> Whole | Append:
    """What a policy that never evicts leaves behind. ``stats``: those of all slots, new rows included."""
    if phase != "prefill":
        return Append(rows, stats)
    whole = widen(rows, slots.width)
    return Whole(whole.replace(stats={**whole.stats, **stats}))


def commit(slots: Slots, pending: Whole | Append | Swap) -> Slots:
    """Write what the layers left behind; in place where the slots are donated."""
    if isinstance(pending, Whole):
        return pending.slots
    kept = {name: x for name, x in slots.stats.items() if name not in pending.stats}
    rows = alike(pending.rows, slots)
    old = slots.replace(stats=kept)
    if isinstance(pending, Append):
        new = _map(lambda axis, x, y: _write_behind(x, y, slots.used, axis), old, rows)
        return new.replace(used=slots.used + pending.rows.used, stats={**new.stats, **pending.stats})

    def write(axis, x, y):
        f = lambda x, y, i: x.at[i].set(y.astype(x.dtype), mode="drop")  # noqa: E731
        for _ in range(pending.slot.ndim):
            f = jax.vmap(f)
        return f(x, jnp.squeeze(y, axis), _per_head(pending.slot, x.shape[pending.slot.ndim - 1], -1))

    new = _map(write, old, rows)
    return new.replace(stats={**new.stats, **pending.stats})


__all__ = [
    "Append", "Slots", "Swap", "Whole", "alike", "behind", "commit", "compact", "count", "drop", "empty", "grow",
    "join", "next_ranks", "per_kv_head", "rank_in_time", "rows_of", "swap", "take", "view_of", "widen",
]  # fmt: skip
