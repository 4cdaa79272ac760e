"""Token merging: slot maps, and the one segment mean that carries them out.

Every hard merge of the field is a weighted mean over a slot map: ``slot`` int32 [B|1, N] names the output row that
takes input row i, -1 drops it. The makers here (``bipartite``, ``nearest``, ``windows``) only decide; ``merge_tokens``
executes. A maker's ``order`` int32 [B, n_slots] names, per output row, the input row whose position and labels it
takes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.select import gather_tokens, rank_of, scatter_tokens, unit_rows
from jaxattn.core.types import Array, expect

MODES = ("wavg", "mean", "target_plus_mean")


# ------------------------------------------------------------------------------------------------------------- merging
def slot_sum(x: Array, slot: Array, n_slots: int) -> Array:
    """[B, n_slots, ...] sums of x [B, N, ...] over each slot, in at least float32."""
    expect("slot", f"shape {tuple(slot.shape)}", f"[1|{x.shape[0]}, {x.shape[1]}]",
           slot.ndim == 2 and slot.shape[0] in (1, x.shape[0]) and slot.shape[1] == x.shape[1])  # fmt: skip
    slot = jnp.broadcast_to(jnp.where(slot < 0, n_slots, slot), x.shape[:2])  # a negative index would wrap around
    total = jnp.zeros((n_slots, *x.shape[2:]), jnp.promote_types(x.dtype, jnp.float32))
    return jax.vmap(lambda row, s: total.at[s].add(row.astype(total.dtype), mode="drop"))(x, slot)


def merge_tokens(x: Array, slot: Array, n_slots: int, *, weight: Array | None = None, mode: str = "wavg",
                 targets: Array | None = None) -> Array:
    """Rows of x merged by slot.

    Args:
      x: [B, N, C].  slot: int32 [B|1, N], in [0, n_slots) or -1 (dropped).
      weight: [B|1, N], non-negative; only with "wavg" (default 1): the input tokens that each row stands for.
      mode: "wavg" sum(w x) / sum(w);  "mean" the plain mean of the members;  "target_plus_mean" the slot's target row
        plus the mean of its other members (VisionZip's contextual tokens: a sum, not a mean over all).
      targets: int32 [B|1, n_slots]; the target row of each slot, for "target_plus_mean".
    Returns: [B, n_slots, C] in x's dtype; slots without members are 0.
    """  # fmt: skip
    expect("mode", repr(mode), f"one of {MODES}", mode in MODES)
    expect("x", f"shape {x.shape}", "[batch, tokens, channels]", x.ndim == 3)
    expect("weight", "an array", f"None with mode {mode!r}", weight is None or mode == "wavg")
    b, n, _ = x.shape
    w = jnp.ones((b, n), jnp.promote_types(x.dtype, jnp.float32))
    if weight is not None:
        ok = weight.ndim == 2 and weight.shape[0] in (1, b) and weight.shape[1] == n
        expect("weight", f"shape {weight.shape}", f"[1|{b}, {n}]", ok)
        w = jnp.broadcast_to(weight, (b, n)).astype(w.dtype)
    if mode == "target_plus_mean":
        expect("targets", None, f"int32 [B|1, {n_slots}]", targets is not None)
        ok = targets.ndim == 2 and targets.shape[0] in (1, b) and targets.shape[1] == n_slots
        expect("targets", f"shape {targets.shape}", f"[1|{b}, {n_slots}]", ok)
        targets = jnp.broadcast_to(targets, (b, n_slots))
        is_target = jax.vmap(lambda t: jnp.zeros(n, bool).at[t].set(True))(targets)
        w = jnp.where(is_target, 0.0, w)
    total = slot_sum(x.astype(w.dtype) * w[..., None], slot, n_slots)
    mass = slot_sum(w, slot, n_slots)[..., None]
    out = jnp.where(mass > 0, total / jnp.where(mass > 0, mass, 1.0), 0.0)
    if mode == "target_plus_mean":
        out = out + gather_tokens(x, targets)
    return out.astype(x.dtype)


# ----------------------------------------------------------------------------------------------------- makers of slots
def bipartite(metric: Array, r: int, *, protect_first: int = 0, valid: Array | None = None):
    """Bipartite soft matching of ToMe (arXiv 2210.09461): even rows (a) merge into their most similar odd rows (b).

    Args:
      metric: [B, N, d]; compared by cosine.  r: how many a-rows merge, at most ceil(N / 2) less the protected ones.
      protect_first: the first rows that neither merge nor receive (1: a class token).
      valid: bool [B|1, N]; other rows neither merge nor receive, and their slot is -1.
    Returns:
      slot: int32 [B, N].  order: int32 [B, N - r].
      Output rows are the unmerged a-rows, by descending best similarity (by index when rows are protected, so that
      the class token stays first), then all b-rows.
    The similarity of all a with all b is what the method compares: N / 2 x N / 2 numbers per batch row.
    """
    b, n, _ = metric.shape
    n_a = -(-n // 2)
    most = min(n_a - -(-protect_first // 2), n // 2)
    expect("r", r, f"between 0 and {most} merges of {n} rows, {protect_first} of them protected", 0 <= r <= most)
    valid = jnp.ones((b, n), bool) if valid is None else jnp.broadcast_to(valid, (b, n))
    if n < 2:
        slot = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
        return jnp.where(valid, slot, -1), slot
    best, to = bipartite_edges(metric, protect_first=protect_first, valid=valid)
    # Padding sorts after every real merge and before what must stay: r real merges happen as without padding.
    best = jnp.where(valid[:, ::2], best, -2.0)
    ranked = jnp.argsort(-best, axis=-1, stable=True).astype(jnp.int32)
    gone, stay = ranked[:, :r], ranked[:, r:]
    if protect_first:
        stay = jnp.sort(stay, axis=-1)

    def put(stay, gone, to):
        place = jnp.arange(n_a - r, dtype=jnp.int32)
        slot_a = jnp.zeros(n_a, jnp.int32).at[stay].set(place).at[gone].set(n_a - r + to[gone])
        slot = jnp.zeros(n, jnp.int32).at[::2].set(slot_a)
        return slot.at[1::2].set(n_a - r + jnp.arange(n // 2, dtype=jnp.int32))

    slot = jax.vmap(put)(stay, gone, to)
    odd = jnp.broadcast_to(jnp.arange(1, n, 2, dtype=jnp.int32), (b, n // 2))
    return jnp.where(valid, slot, -1), jnp.concatenate([2 * stay, odd], -1)


def bipartite_edges(metric: Array, *, protect_first: int = 0, valid: Array | None = None):
    """The edge of each even row (a) to its most similar odd row (b), as in ``bipartite``.

    Returns: best [B, ceil(N / 2)], its cosine, -inf for rows that may not merge; to int32, the number of the b-row."""
    b, n, _ = metric.shape
    expect("metric", f"{n} rows", "at least two", n >= 2)
    free = jnp.broadcast_to(jnp.arange(n) >= protect_first, (b, n))
    free = free if valid is None else free & valid
    unit = unit_rows(metric)
    similar = jnp.einsum("bid,bjd->bij", unit[:, ::2], unit[:, 1::2])
    similar = jnp.where(free[:, 1::2][:, None, :] & free[:, ::2][:, :, None], similar, -jnp.inf)
    return similar.max(-1), similar.argmax(-1).astype(jnp.int32)


def bipartite_above(metric: Array, threshold, *, least: int = 0, protect_first: int = 0, valid: Array | None = None):
    """Bipartite matching by a threshold (DyMU, arXiv 2504.17040): an a-row merges where its best similarity is above it.

    Args:
      metric, protect_first, valid: as for ``bipartite``; valid rows stand in front of the others.
      threshold: scalar or [B].  least: rows that merge at any rate, the most similar first; at most floor((N - 1) / 2), and
        so many of the valid rows merge at most.
    Returns:
      slot: int32 [B, N].  order: int32 [B, N - least].  live: bool [B, N - least].
      Output rows are the unmerged a-rows, then all b-rows, both in their order, then padding.
    """
    b, n, _ = metric.shape
    expect("least", least, f"between 0 and {(n - 1) // 2} merges of {n} rows", 0 <= least <= (n - 1) // 2)
    valid = jnp.ones((b, n), bool) if valid is None else jnp.broadcast_to(valid, (b, n))
    best, to = bipartite_edges(metric, protect_first=protect_first, valid=valid)
    rank = rank_of(best)
    most = (valid.sum(-1, keepdims=True) - 1) // 2
    above = best > jnp.reshape(jnp.asarray(threshold, best.dtype), (-1, 1))
    merged = (above | (rank < least)) & (rank < most) & (best > -jnp.inf)
    # Rank of a row among those that go on: a-rows, b-rows, nobody.
    part = jnp.where(valid, jnp.arange(n) % 2, 2).at[:, ::2].max(jnp.where(merged, 2, 0))
    order = jnp.argsort(part, axis=-1, stable=True).astype(jnp.int32)
    place = jnp.argsort(order, axis=-1).astype(jnp.int32)
    live = jnp.arange(n - least) < (part < 2).sum(-1, keepdims=True)
    home = jnp.where(merged, jnp.take_along_axis(place, jnp.minimum(2 * to + 1, n - 1), axis=-1), place[:, ::2])
    slot = place.at[:, ::2].set(home)
    return jnp.where(valid, slot, -1), order[:, : n - least], live


def strided(rest: Array, n_slots: int):
    """Evenly strided rows among those of ``rest`` bool [B, N]: the 0th, s-th, 2s-th ..., s = max(1, count // n_slots).

    Returns: index int32 [B, n_slots], valid bool [B, n_slots] (fewer rows than slots leave the last ones invalid)."""
    count = rest.sum(-1, keepdims=True)
    at = jnp.arange(n_slots) * jnp.maximum(1, count // n_slots)
    nth = jnp.cumsum(rest, axis=-1)
    index = jax.vmap(lambda c, i: jnp.searchsorted(c, i + 1))(nth, at)
    valid = at < count
    return jnp.where(valid, index, 0).astype(jnp.int32), valid


def nearest(metric: Array, targets: Array, rest: Array, *, valid: Array | None = None) -> Array:
    """Slot map that sends each row to its most similar target (contextual tokens of VisionZip, arXiv 2412.04467).

    Args:
      metric: [B, N, d]; compared by cosine.  targets: int32 [B|1, C] rows; a target goes to its own slot.
      rest: bool [B|1, N]; the rows that are assigned. Others are -1.
      valid: bool [B|1, C] of the targets; others receive nothing.
    Returns: int32 [B, N] in [0, C) or -1; ties to the lowest slot.
    """
    b, n, _ = metric.shape
    c = targets.shape[-1]
    targets = jnp.broadcast_to(targets, (b, c))
    valid = jnp.ones((b, c), bool) if valid is None else jnp.broadcast_to(valid, (b, c))
    unit = unit_rows(metric)
    similar = jnp.einsum("bnd,bcd->bnc", unit, gather_tokens(unit, targets))
    similar = jnp.where(valid[:, None, :], similar, -jnp.inf)
    slot = jnp.where(valid.any(-1, keepdims=True) & rest, similar.argmax(-1), -1).astype(jnp.int32)
    own = jnp.arange(c, dtype=jnp.int32)
    return jax.vmap(lambda s, t, ok: s.at[jnp.where(ok, t, n)].set(own, mode="drop"))(slot, targets, valid)


def kmeans(x: Array, rest: Array, n_slots: int, steps: int = 10, *, metric: str = "cosine") -> Array:
    """Slot map of k-means clusters: centres start at evenly strided rows (``strided``), then ``steps`` Lloyd iterations.

    Args:
      x: [B, N, C].  rest: bool [B, N]; the rows that are clustered, others are -1.
      metric: "cosine" (rows are scaled to length 1 first) or "l2".
    Returns: int32 [B, N] in [0, n_slots) or -1; ties to the lowest slot. A cluster that lost its last row keeps its centre.
    """
    expect("metric", repr(metric), "'cosine' or 'l2'", metric in ("cosine", "l2"))
    expect("n_slots", n_slots, f"between 1 and the {x.shape[1]} rows", 1 <= n_slots <= x.shape[1])
    x = unit_rows(x) if metric == "cosine" else x.astype(jnp.promote_types(x.dtype, jnp.float32))
    start, live = strided(rest, n_slots)

    def assign(centres):
        near = jnp.einsum("bnc,bkc->bnk", x, centres) - 0.5 * jnp.sum(centres * centres, -1)[:, None]  # - |x - c|^2 / 2
        near = jnp.where(live[:, None], near, -jnp.inf)
        return jnp.where(rest & live.any(-1, keepdims=True), near.argmax(-1), -1).astype(jnp.int32)

    def step(_, centres):
        slot = assign(centres)
        some = slot_sum(rest.astype(x.dtype), slot, n_slots) > 0
        return jnp.where(some[..., None], merge_tokens(x, slot, n_slots), centres)

    return assign(jax.lax.fori_loop(0, steps, step, gather_tokens(x, start)))


def windows(grid: tuple[int, int], size: int | tuple[int, int]) -> tuple[np.ndarray, int]:
    """Slot map int32 [1, h * w] of the windows of a raster grid (h, w), row by row, and their number.

    Windows at the right and lower edge are smaller where the size does not divide the grid."""
    (h, w), (sh, sw) = grid, (size, size) if isinstance(size, int) else size
    expect("size", size, f"between 1 and the grid {grid}", 1 <= sh <= h and 1 <= sw <= w)
    across = -(-w // sw)
    slot = (np.arange(h) // sh)[:, None] * across + (np.arange(w) // sw)[None, :]
    return slot.reshape(1, -1).astype(np.int32), -(-h // sh) * across


def compact(keep: Array, cap: int):
    """The rows of ``keep`` bool [B, N] in order: index int32 [B, cap] padded with 0, valid bool [B, cap]. Of more than
    ``cap`` rows the first are taken."""
    b, n = keep.shape
    # Counting instead of sorting: a batch split over devices stays split.
    place = jnp.where(keep, jnp.cumsum(keep, axis=-1) - 1, cap)
    rows = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
    valid = jnp.arange(cap) < keep.sum(-1, keepdims=True)
    return scatter_tokens(jnp.zeros((b, cap), jnp.int32), place, rows), valid


__all__ = [
    "bipartite", "bipartite_above", "bipartite_edges", "compact", "kmeans", "merge_tokens", "nearest", "slot_sum", "strided",
    "windows",
]  # fmt: skip
