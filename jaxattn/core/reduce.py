"""From a choice of rows to the rows that go on: what every token transform shares after it has scored.

A choice is a table ``keep`` bool [B, N]. Two executions, one meaning: mode "keep" gathers the chosen rows into a static
number of rows (real speed), mode "mask" leaves every row in its place and clears ``meta.valid`` (counts that change
without recompiling, training, the oracle in tests). Both give the same values at surviving rows, since whatever reads a
position reads it from Meta. ``slot`` int32 [B, N0] says which row now carries original row i (-1: none); it composes
over successive transforms.

Positions after a cut: ``meta.pos`` (order in time) never changes for kept rows. ``positions="original"`` leaves
``meta.rope`` alone too; ``"fresh"`` renumbers it contiguously from the first valid rotary position, as implementations
do that rebuild ``position_ids`` after a drop. Renumbering rows that lie between others (an image inside a prompt) is a
property of the whole sequence: see :func:`fresh`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.labels import KIND_NEWLINE
from jaxattn.core.record import Capacity
from jaxattn.core.select import forbid, gather_meta, gather_tokens, per_group, rank_of, scatter_tokens
from jaxattn.core.slots import compact
from jaxattn.core.types import Array, Meta, Tokens, bucket, expect

MODES = ("keep", "mask")
POSITIONS = ("original", "fresh")


# -------------------------------------------------------------------------------------------------------- budgets
def check_budget(keep, mode: str = "keep", positions: str = "original", *, least: int = 1) -> None:
    """The arguments common to all factories with a budget, as errors that name the argument."""
    whole = isinstance(keep, int) and not isinstance(keep, bool) and keep >= least
    expect("keep", repr(keep), f"a whole number of rows, at least {least}", whole)
    expect("mode", repr(mode), "'keep' or 'mask'", mode in MODES)
    expect("positions", repr(positions), "'original' or 'fresh'", positions in POSITIONS)


def rows_left(keep: int, n: int, mode: str, extra: int = 0) -> int:
    """Static number of rows that leave a transform which keeps ``keep`` of ``n`` rows and ``extra`` others.

    In mode "keep" it is the capacity of the budget's bucket (the rows above the budget are invalid), the same for a
    record and for its program; in mode "mask" it is ``n``. A record that asks for more rows than there are is an
    error; a program only knows its capacity, which may exceed ``n``.
    """
    if not isinstance(keep, Capacity):
        expect("keep", keep, f"at most the {n - extra} rows there are to choose from", keep <= n - extra)
    return n if mode == "mask" else min(bucket(keep) + extra, n)


def count_of(params: dict, n: int) -> Array:
    """The budget as an array; checked against the ``n`` rows to choose from where it is known."""
    keep = params["keep"]
    if isinstance(keep, (int, np.integer, np.ndarray)):
        expect("keep", int(keep), f"at most the {n} rows there are to choose from", int(keep) <= n)
    return jnp.asarray(keep, jnp.int32)


# ------------------------------------------------------------------------------------------------- evidence and choice
def evidence_rows(evidence: dict, name: str, tokens: Tokens, *, heads: bool = False) -> Array:
    """``evidence[name]``, checked: [B, N], a value per row that the transform acts on, or [B, H, N] with ``heads``."""
    expect("evidence", sorted(evidence) or "none", f"the entry {name!r}", name in evidence)
    x, (b, n) = evidence[name], tokens.x.shape[:2]
    ok = x.ndim == 2 + heads and x.shape[-1] == n and x.shape[0] == b
    expect(f"evidence[{name!r}]", f"shape {tuple(x.shape)}", f"[{b}, H, {n}]" if heads else f"[{b}, {n}]", ok)
    return x


def valid_rows(tokens: Tokens) -> Array:
    """bool [B, N]."""
    return jnp.broadcast_to(tokens.meta.valid, tokens.x.shape[:2])


def label(tokens: Tokens, name: str) -> Array:
    """int32 [B, N] label of the rows."""
    labels = tokens.meta.labels
    expect("tokens.meta.labels", sorted(labels) or "none", f"the label {name!r}", name in labels)
    return jnp.broadcast_to(labels[name], tokens.x.shape[:2])


def newline_rows(tokens: Tokens) -> Array:
    """bool [B, N]: rows that end a line of patches (label "kind" == KIND_NEWLINE); they survive every budget."""
    return label(tokens, "kind") == KIND_NEWLINE


def choose(scores: Array, count, valid: Array, *, always: Array | None = None, crop: Array | None = None,
           crops: int = 1) -> Array:
    """bool [B, N]: the ``count`` valid rows of largest score, ties to the lowest index.

    Args:
      scores: [B, N].  count: int32 scalar or [B].  valid: bool [B, N].
      always: bool [B, N]; rows kept besides the count.
      crop: int32 [B, N] in [0, crops); each of the ``crops`` crops then keeps ``count // crops`` rows of its own.
    """  # fmt: skip
    free = valid if always is None else valid & ~always
    scores = forbid(scores, ~free)
    count = jnp.asarray(count, jnp.int32)
    if crops == 1:
        keep = rank_of(scores) < count[..., None]
    else:
        keep = per_group(scores, crop, jnp.broadcast_to((count // crops)[..., None], (*scores.shape[:-1], crops)))
    keep &= free
    return keep if always is None else keep | (always & valid)


# ----------------------------------------------------------------------------------------------------- the rows go on
def dispose(tokens: Tokens, keep: Array, rows: int, mode: str = "keep", positions: str = "original") -> Tokens:
    """Carry out a choice: ``keep`` bool [B, N], at most ``rows`` True per batch row, in the given mode."""
    if mode == "mask":
        return reduce_mask(tokens, keep, positions=positions)
    index, valid = compact(keep, rows)
    return reduce_keep(tokens, index, valid, positions=positions)


def picked(picks: Array, count: Array, valid: Array) -> Array:
    """bool [B, N]: the valid rows among the first ``count`` of ``picks`` int32 [B, k], in their order: of a greedy run, the
    run of the smaller budget."""
    n = valid.shape[1]
    picks = jnp.where(jnp.arange(picks.shape[1]) < count, picks, n)
    return jax.vmap(lambda p: jnp.zeros(n, bool).at[p].set(True, mode="drop"))(picks) & valid


def follow_rows(values: Array, keep: Array, rows: int, mode: str = "keep") -> Array:
    """Values [B, N, ...] of the rows, as values of the rows that ``dispose`` leaves with the same arguments."""
    return values if mode == "mask" else gather_tokens(values, compact(keep, rows)[0])


def original_rows(tokens: Tokens) -> Array:
    """int32 [B, N]: the first original row that each row carries (its own number where nothing was reduced before); the
    number of original rows for rows that carry none."""
    b, n = tokens.x.shape[:2]
    if tokens.slot is None:
        return jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
    n0 = tokens.slot.shape[1]

    def one(slot):
        return jnp.full(n + 1, n0, jnp.int32).at[jnp.where(slot < 0, n, slot)].min(jnp.arange(n0, dtype=jnp.int32))[:n]

    return jax.vmap(one)(tokens.slot)


def reduce_keep(tokens: Tokens, index: Array, valid: Array | None = None, *, positions: str = "original") -> Tokens:
    """Rows ``index`` int32 [B, K] (ascending where ``valid`` bool [B, K]) of x, meta and slot map."""
    b, n = tokens.x.shape[:2]
    valid = jnp.ones(index.shape, bool) if valid is None else valid
    meta = gather_meta(tokens.meta, index)
    meta = meta.replace(valid=meta.valid & valid)
    if positions == "fresh":
        (meta,) = fresh(meta, start=_first(tokens.meta))
    place = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=jnp.int32), index.shape)
    went = scatter_tokens(jnp.full((b, n), -1, jnp.int32), jnp.where(meta.valid, index, n), place)
    return Tokens(gather_tokens(tokens.x, index), meta, _compose(tokens.slot, went))


def reduce_mask(tokens: Tokens, keep: Array, *, positions: str = "original") -> Tokens:
    """Every row stays in its place; rows outside ``keep`` bool [B, N] become invalid."""
    valid = tokens.meta.valid & keep
    meta = tokens.meta.replace(valid=valid)
    if positions == "fresh":
        (meta,) = fresh(meta, start=_first(tokens.meta))
    went = jnp.where(valid, jnp.arange(keep.shape[1], dtype=jnp.int32), -1)
    return Tokens(tokens.x, meta, _compose(tokens.slot, went))


def reduce_merge(tokens: Tokens, x: Array, slot: Array, index: Array, valid: Array, *,
                 positions: str = "original") -> Tokens:
    """Tokens after a merge.

    Args:
      x: [B, K, C] merged rows.  slot: int32 [B, N], the merged row of each row, -1 for rows that went nowhere.
      index: int32 [B, K], the row whose Meta (position, labels) each merged row takes.  valid: bool [B, K].
      positions: "fresh" makes the order of the merged rows their order in time: the positions ``pos`` that the rows of
        ``index`` held are dealt out again in ascending order.
    """  # fmt: skip
    meta = gather_meta(tokens.meta, index)
    meta = meta.replace(valid=meta.valid & valid)
    if positions == "fresh":
        big = jnp.iinfo(jnp.int32).max
        order = jnp.sort(jnp.where(meta.valid, meta.pos, big), axis=-1)
        # Valid rows may stand anywhere: the i-th of them takes the i-th position.
        nth = jnp.maximum(jnp.cumsum(meta.valid, axis=-1) - 1, 0)
        meta = meta.replace(pos=jnp.where(meta.valid, jnp.take_along_axis(order, nth, axis=-1), meta.pos))
        (meta,) = fresh(meta, start=_first(tokens.meta))
    went = jnp.where(valid_rows(tokens), slot, -1).astype(jnp.int32)
    return Tokens(x, meta, _compose(tokens.slot, went))


def fresh(*metas: Meta, start=0) -> tuple[Meta, ...]:
    """The Metas of one sequence with contiguous rotary positions: ``start`` + the rank of ``pos`` among all valid rows.

    Several Metas (say of the image rows and of the text rows) are renumbered jointly, so text that follows a pruned
    image moves up. Positions of several axes get the same number on each. Invalid rows are numbered last.
    """
    b = max(x.shape[0] for m in metas for x in (m.pos, m.valid))
    pos = [jnp.broadcast_to(m.pos, (b, m.n)) for m in metas]
    valid = [jnp.broadcast_to(m.valid, (b, m.n)) for m in metas]
    order = jnp.where(jnp.concatenate(valid, 1), jnp.concatenate(pos, 1), jnp.iinfo(jnp.int32).max)
    rank = jnp.argsort(jnp.argsort(order, axis=-1, stable=True), axis=-1).astype(jnp.int32)
    start = jnp.asarray(start)
    ends = np.cumsum([m.n for m in metas])[:-1]
    out = []
    for meta, r in zip(metas, jnp.split(rank, ends, axis=1), strict=True):
        if meta.rope is not None and meta.rope.ndim == 3:
            r = jnp.broadcast_to(r[..., None], (b, meta.n, meta.rope.shape[-1]))
        r = r + (start[..., None] if r.ndim == start.ndim + 1 else start)
        out.append(meta.replace(rope=r if meta.rope is None else r.astype(meta.rope.dtype)))
    return tuple(out)


def _first(meta: Meta) -> Array:
    """[B|1, 1] or [B|1, 1, A]: the rotary position of the first valid row in time."""
    pos = jnp.where(meta.valid, meta.pos, jnp.iinfo(jnp.int32).max)
    first = jnp.argmin(pos, axis=-1)[:, None]
    rope = jnp.asarray(meta.pos if meta.rope is None else meta.rope)
    rope = jnp.broadcast_to(rope, (first.shape[0], *rope.shape[1:]))
    return gather_tokens(rope, first)


def _compose(slot: Array | None, went: Array) -> Array:
    """Slot map after a step that sent row i to ``went[i]``."""
    if slot is None:
        return went
    return jnp.where(slot >= 0, jnp.take_along_axis(went, jnp.maximum(slot, 0), axis=1), -1)


__all__ = [
    "check_budget", "choose", "count_of", "dispose", "evidence_rows", "follow_rows", "fresh",
    "label", "newline_rows", "original_rows", "reduce_keep", "reduce_mask", "reduce_merge", "rows_left", "valid_rows",
]  # fmt: skip
