"""Masks: a small closed algebra of predicates ``(query, key) -> bool`` over Meta fields, combined with ``& | ~``.

A mask is a contract (compared by value, usable as a static argument). It is evaluated in two ways, by the same rules on
numpy, jnp and inside kernels: per element (``mask(q, k)``), and per pair of tiles from the interval that each field
covers (``mask.bound``), which says whether a tile pair *may* hold a visible pair and whether it *surely* is all
visible. Fast paths skip tiles by it; a mask never captures an array (tables travel as Meta labels).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxattn.core.types import Meta, contract, expect


class _Algebra:
    """Operators shared by the nodes."""

    def __and__(self, other):
        return _And(self, other)

    def __or__(self, other):
        return _Or(self, other)

    def __invert__(self):
        return _Not(self)

    def __call__(self, q: Meta, k: Meta):
        """bool [B|1, G|1, N, M]: which keys each query may see. Validity of rows is not a mask's business."""
        names = self.fields()
        return self.test(columns(q, names, "q"), columns(k, names, "k"))

    def bound(self, q: dict, k: dict):
        """(may, surely) per tile pair; ``q`` and ``k`` map field names to (lo, hi) arrays that broadcast together."""
        return self.interval(q, k)


def columns(meta: Meta, names, side: str) -> dict:
    """Fields of ``meta`` shaped [B|1, G|1, N, 1] for side "q" and [B|1, G|1, 1, M] for side "k"."""
    return {n: _column(field_of(meta, n), side) for n in names}


def field_of(meta: Meta, name: str):
    if name == "pos":
        return meta.pos
    if name not in meta.labels:
        raise ValueError(f"mask: expected Meta to have the label {name!r}, it has {sorted(meta.labels) or 'none'}")
    return meta.labels[name]


def _column(x, side: str):
    if x.ndim == 2:
        x = x[:, None]
    return x[..., :, None] if side == "q" else x[..., None, :]


@contract
class _And(_Algebra):
    a: object
    b: object

    def fields(self):
        return self.a.fields() | self.b.fields()

    def test(self, q, k):
        return self.a.test(q, k) & self.b.test(q, k)

    def interval(self, q, k):
        (m1, s1), (m2, s2) = self.a.interval(q, k), self.b.interval(q, k)
        return m1 & m2, s1 & s2


@contract
class _Or(_Algebra):
    a: object
    b: object

    def fields(self):
        return self.a.fields() | self.b.fields()

    def test(self, q, k):
        return self.a.test(q, k) | self.b.test(q, k)

    def interval(self, q, k):
        (m1, s1), (m2, s2) = self.a.interval(q, k), self.b.interval(q, k)
        return m1 | m2, s1 | s2


@contract
class _Not(_Algebra):
    a: object

    def fields(self):
        return self.a.fields()

    def test(self, q, k):
        return ~self.a.test(q, k)

    def interval(self, q, k):
        may, surely = self.a.interval(q, k)
        return ~surely, ~may


@contract
class _Window(_Algebra):
    """-right < q[name] - k[name] < left; None is unbounded."""

    left: int | None
    right: int | None
    name: str = "pos"

    def check(self):
        for side in (self.left, self.right):
            expect("window", side, "a whole number of positions or None", side is None or isinstance(side, int))

    def fields(self):
        return frozenset({self.name})

    def _inside(self, lo, hi):
        # lo == hi == the difference per element; the extreme differences of a tile pair otherwise.
        may = surely = (lo <= hi)  # all true, in the array type of the operands
        if self.left is not None:
            may, surely = may & (lo < self.left), surely & (hi < self.left)
        if self.right is not None:
            may, surely = may & (hi > -self.right), surely & (lo > -self.right)
        return may, surely

    def test(self, q, k):
        d = q[self.name] - k[self.name]
        return self._inside(d, d)[0]

    def interval(self, q, k):
        (ql, qh), (kl, kh) = q[self.name], k[self.name]
        return self._inside(ql - kh, qh - kl)


@contract
class _Below(_Algebra):
    """k[name] < n."""

    n: int
    name: str = "pos"

    def fields(self):
        return frozenset({self.name})

    def test(self, q, k):
        return (k[self.name] < self.n) & (q[self.name] == q[self.name])

    def interval(self, q, k):
        (ql, qh), (kl, kh) = q[self.name], k[self.name]
        return (kl < self.n) & (ql <= qh), (kh < self.n) & (ql <= qh)


@contract
class _Same(_Algebra):
    """q[name] == k[name]."""

    name: str

    def fields(self):
        return frozenset({self.name})

    def test(self, q, k):
        return q[self.name] == k[self.name]

    def interval(self, q, k):
        (ql, qh), (kl, kh) = q[self.name], k[self.name]
        return (ql <= kh) & (kl <= qh), (ql == kh) & (qh == kl) & (ql == qh)


@contract
class _Is(_Algebra):
    """label of the query ("q") or of the key ("k") equals a value."""

    side: str
    name: str
    value: int

    def fields(self):
        return frozenset({self.name})

    def test(self, q, k):
        a, b = (q, k) if self.side == "q" else (k, q)
        return (a[self.name] == self.value) & (b[self.name] == b[self.name])

    def interval(self, q, k):
        (al, ah), (bl, bh) = (q[self.name], k[self.name]) if self.side == "q" else (k[self.name], q[self.name])
        same = bl <= bh
        return (al <= self.value) & (ah >= self.value) & same, (al == self.value) & (ah == self.value) & same


def causal(name: str = "pos"):
    """Keys at or before the query: k.pos <= q.pos. With another field (say "frame"): block causality over it."""
    return _Window(None, 1, name)


def window(left: int, right: int | None = None, name: str = "pos"):
    """The last ``left`` positions: q.pos - k.pos < left; with ``right``, also k.pos - q.pos < right."""
    expect("left", left, "at least 1", left is None or left >= 1)
    return _Window(left, right, name)


def first(n: int, name: str = "pos"):
    """Keys whose position is below ``n``."""
    return _Below(n, name)


def prefix(n: int):
    """Prefix language model: everybody sees the first ``n`` keys, the rest is causal."""
    return causal() | first(n)


def same(name: str):
    """Query and key carry the same label: packed segments, turns, windows, crops."""
    return _Same(name)


def query_is(name: str, value: int):
    """The query's label equals ``value``."""
    return _Is("q", name, value)


def key_is(name: str, value: int):
    """The key's label equals ``value``."""
    return _Is("k", name, value)


def mutual(name: str = "kind", value: int = 1):
    """Causal, and keys of one modality (label ``name`` == ``value``) also see every later query of the other:
    modality-mutual attention (AKI, arXiv 2503.02597)."""
    return causal() | (query_is(name, value) & ~key_is(name, value))


def tile_intervals(meta: Meta, names, tile: int, side: str) -> dict:
    """Per field and tile the (min, max) over valid rows, shaped [B|1, G|1, Nt, 1] ("q") or [B|1, G|1, 1, Nt] ("k").

    A tile without a valid row has an empty interval (lo > hi). numpy in, numpy out (known at trace time)."""
    valid = meta.valid
    concrete = all(isinstance(x, np.ndarray) for x in [valid, *(field_of(meta, n) for n in names)])
    xp = np if concrete else jnp
    out = {}
    for name in names:
        x, ok = (a[:, None] if a.ndim == 2 else a for a in (field_of(meta, name), valid))
        x, ok = xp.broadcast_arrays(x, ok)
        pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % tile)]
        x, ok = xp.pad(x, pad), xp.pad(ok, pad)
        x, ok = (a.reshape(*a.shape[:-1], -1, tile) for a in (x, ok))
        big = np.iinfo(np.int32).max // 4  # sums of two bounds stay in range
        lo, hi = xp.where(ok, x, big).min(-1), xp.where(ok, x, -big).max(-1)
        out[name] = (_column(lo, side), _column(hi, side))
    return out


def block_map(mask, q: Meta, k: Meta, tile: int, unit: int):
    """(may, surely) bool [B|1, G|1, Nq, Nk]: which key tiles of ``unit`` rows each query tile of ``tile`` rows may see,
    and which it sees whole (padding aside). numpy when both Metas are, so it is then known at trace time."""
    names = mask.fields() if mask is not None else frozenset({"pos"})
    qi, ki = tile_intervals(q, names, tile, "q"), tile_intervals(k, names, unit, "k")
    some = next(iter(names))
    live = (ki[some][0] <= ki[some][1]) & (qi[some][0] <= qi[some][1])
    if mask is None:
        return live, live
    may, surely = mask.bound(qi, ki)
    return may & live, surely & live
