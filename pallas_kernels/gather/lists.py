"""What every body reads of a call: listed slots, one additive table in list order, rotary turns, heads arranged.

Arrays are arranged as [b, g, r, rows, tile, ...] with H = g * r and N = rows * tile: one list of a (head, row) serves
``tile`` queries. Visibility, masks, biases and weights of the listed keys become one table ``add`` of logits to add (-inf:
hidden), made part by part, so that kernels know q, k, v, slots and ``add`` alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash.xla import _fetch

TABLE = 2**24  # entries of a part's table of additions


@dataclasses.dataclass(frozen=True)
class Shape:
    """b batch, n queries, h heads, g kv heads, r = h / g, m keys, d and dv head sizes, rows lists of tile queries, entries
    of unit keys; full: no lists."""

    b: int
    n: int
    h: int
    g: int
    r: int
    m: int
    d: int
    dv: int
    rows: int
    tile: int
    entries: int
    unit: int
    full: bool

    @property
    def units(self) -> int:
        return -(-self.m // self.unit)

    @property
    def length(self) -> int:
        """Listed keys per row."""
        return self.m if self.full else self.entries * self.unit


def shape_of(o: dict, opt) -> Shape:
    (b, n, h, d), (m, g), dv = o["q"].shape, o["k"].shape[1:3], o["v"].shape[3]
    full = o.get("index") is None
    rows, entries = (1, 0) if full else o["index"].shape[2:]
    return Shape(b, n, h, g, h // g, m, d, dv, rows, n // rows, entries, opt.unit, full)


def slots(index, count, unit: int, m: int):
    """Slots of the listed keys [..., K * unit], clamped, and which of them are real."""
    used = (jnp.arange(index.shape[-1]) < count[..., None]) & (index >= 0) & (index < -(-m // unit))
    key = jnp.where(used, index, 0)[..., None] * unit + jnp.arange(unit, dtype=jnp.int32)
    live = used[..., None] & (key < m)
    flat = (*index.shape[:-1], -1)
    return jnp.clip(key, 0, m - 1).reshape(flat), live.reshape(flat)


def heads(x, s: Shape):
    """[b, 1|G|H, ...] -> [b, g', r', ...]."""
    g, r = (s.g, 1) if x.shape[1] == s.g else {1: (1, 1), s.h: (s.g, s.r)}[x.shape[1]]
    return x.reshape(x.shape[0], g, r, *x.shape[2:])


def arrange(x, s: Shape):
    """Rows [b, N, H, ...] -> [b, g, r, rows, tile, ...]."""
    x = heads(jnp.moveaxis(x, 2, 1), s)
    return x.reshape(*x.shape[:3], s.rows, s.tile, *x.shape[4:])


def restore(x, s: Shape):
    """[b, g, r, rows, tile, ...] -> [b, N, H, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], s.h, s.n, *x.shape[5:]), 1, 2)


def _facts(x, s: Shape):
    """Facts of keys [b, M] or [b, G, M] -> [b, g', 1, M]."""
    return x[:, None, None] if x.ndim == 2 else heads(x, s)


def _field(x, s: Shape):
    """Facts of queries [b, N] or [b, G, N] -> [b, g', 1, rows, tile, 1]."""
    x = _facts(x, s)
    return x.reshape(*x.shape[:3], s.rows, s.tile, 1)


def listed_slots(o: dict, s: Shape):
    """(slots, live) [b', g', r', rows, L] of the lists, or (None, None) where every key is read."""
    if s.full:
        return None, None
    return slots(heads(o["index"], s), heads(o["count"], s), s.unit, s.m)


def _at(x, key):
    """Facts [b, g', r', M] at the listed slots: [b, g', r', rows, 1, L]."""
    if key is None:
        return x[:, :, :, None, None]
    found = _fetch(x, key.reshape(*key.shape[:3], -1))
    return found.reshape(*found.shape[:3], key.shape[3], 1, key.shape[4])


def additions(o: dict, opt, s: Shape, *, lists: bool):
    """float [b', g', r', rows, 1|tile, L] to add to the logits of the listed keys, or None where nothing is to be added.

    ``lists``: hide entries that are not in use here; else the body does, where nothing else asks for a table."""
    wants = any(o.get(x) is not None for x in ("k_valid", "bounds", "log_weight", "key_bias")) or opt.mask is not None
    if not wants and (s.full or not lists):
        return None
    key, live = listed_slots(o, s)
    ok = jnp.ones((1,) * 6, bool) if key is None else live[:, :, :, :, None]
    extra = jnp.zeros((1,) * 6, jnp.float32)
    if o.get("k_valid") is not None:
        ok = ok & _at(_facts(o["k_valid"], s), key)
    if o.get("bounds") is not None:
        ok = ok & _inside(o, s)[:, :, :, :, None]
    if opt.mask is not None:
        rows = {name: _field(x, s) for name, x in o["q_fields"].items()}
        keys = {name: _at(_facts(x, s), key) for name, x in o["k_fields"].items()}
        ok = ok & opt.mask.test(rows, keys)
    if o.get("log_weight") is not None:
        extra = extra + jnp.repeat(heads(o["log_weight"], s), s.unit, axis=-1)[:, :, :, :, None]
    if o.get("key_bias") is not None:
        extra = extra + _at(heads(jnp.moveaxis(o["key_bias"], 2, 1), s), key)
    ok, extra = jnp.broadcast_arrays(ok, extra)
    extra = jnp.where(ok, extra, -jnp.inf)
    return jnp.broadcast_to(extra, (*extra.shape[:5], s.length))


def _inside(o: dict, s: Shape):
    """bool [b', g', r', rows, L]: keys in the live range of their unit."""
    edges, offset = heads(o["bounds"], s), jnp.arange(s.unit)
    inside = (offset >= edges[..., :1]) & (offset < edges[..., 1:])
    return inside.reshape(*inside.shape[:4], -1)


def usable(o: dict, s: Shape):
    """bool [b', g', r', rows, L]: listed keys that are in use, valid and in the live range of their unit."""
    key, ok = listed_slots(o, s)
    if o.get("k_valid") is not None:
        ok = ok & _at(_facts(o["k_valid"], s), key)[:, :, :, :, 0]
    return ok if o.get("bounds") is None else ok & _inside(o, s)


def clean(k, v):
    """(k, v, bool [...]) with zeros where a key or its value [..., D] is not finite, and where that was: a hidden NaN must
    not reach a sum, 0 x NaN is NaN."""
    odd = ~(jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1))
    return *(jnp.where(odd[..., None], 0, x) for x in (k, v)), odd


def added(x, add, odd):
    """Logits with the table of additions; NaN where the key is ``odd`` and seen, -inf where it is hidden."""
    return jnp.where(add == -jnp.inf, -jnp.inf, jnp.where(odd, jnp.nan, x + add))


def turns(o: dict, s: Shape):
    """float32 [b', g', r', rows, L]: positions by which the listed keys are turned, or None."""
    if o.get("freqs") is None:
        return None
    total = jnp.zeros((1,) * 5, jnp.float32)
    if o.get("k_rope") is not None:
        key, _ = listed_slots(o, s)
        total = total + _at(_facts(o["k_rope"].astype(jnp.float32), s), key)[:, :, :, :, 0]
    if o.get("pos") is not None:
        pos = heads(o["pos"].astype(jnp.float32), s)[..., None] + jnp.arange(s.unit, dtype=jnp.float32)
        total = total + pos.reshape(*pos.shape[:4], -1)
    return jnp.broadcast_to(total, (*total.shape[:4], s.length))


# -------------------------------------------------------------------------------------------------------------- parts

ROWS, KEYS = ("q", "do", "lse", "delta"), ("k", "v", "key_bias")  # [B, N, H, ...], [B, M, 1|G|H, ...]
LISTS = ("index", "count", "bounds", "log_weight", "pos")  # [B|1, Hs, 1|N, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """``size`` queries from ``start`` on, of ``heads`` kv heads from ``head`` on; start and head may be traced."""

    s: Shape
    start: jax.Array | int
    size: int
    head: jax.Array | int
    heads: int

    @property
    def shape(self) -> Shape:
        """Of all queries with these heads."""
        return dataclasses.replace(self.s, h=self.heads * self.s.r, g=self.heads)

    def _heads(self, n: int) -> tuple:
        """(start, size) of an axis of 1, G or H heads."""
        if n == 1 or self.heads == self.s.g:
            return 0, n
        return self.head * (n // self.s.g), self.heads * (n // self.s.g)

    def place(self, shape, rows: int | None, heads: int | None) -> tuple:
        """(starts, sizes) in an array whose axes of queries and of heads are given."""
        at = {axis: (0, n) for axis, n in enumerate(shape)}
        at |= {} if heads is None else {heads: self._heads(shape[heads])}
        at |= {} if rows is None or shape[rows] != self.s.n else {rows: (self.start, self.size)}
        return tuple(zip(*at.values(), strict=True))

    def take(self, x, rows: int | None, heads: int | None):
        starts, sizes = self.place(x.shape, rows, heads)
        return x if sizes == x.shape else lax.dynamic_slice(x, starts, sizes)

    def put(self, total, x, rows: int | None, heads: int | None, *, add: bool = False):
        starts, sizes = self.place(total.shape, rows, heads)
        x = x.astype(total.dtype)
        if sizes == total.shape and not add:
            return x
        x = x + lax.dynamic_slice(total, starts, sizes) if add else x
        return lax.dynamic_update_slice(total, x, starts)

    def of_keys(self, o: dict) -> dict:
        """What belongs to keys."""
        found = {x: self.take(o[x], None, 2) for x in KEYS if o.get(x) is not None}
        facts = lambda x: self.take(x, None, 1 if x.ndim == 3 else None)  # noqa: E731
        found |= {x: facts(o[x]) for x in ("k_valid", "k_rope") if o.get(x) is not None}
        return found | {"k_fields": {name: facts(x) for name, x in o.get("k_fields", {}).items()}}

    def of_rows(self, o: dict) -> dict:
        """What belongs to queries and their lists."""
        found = {x: self.take(o[x], 1, 2) for x in ROWS if x in o}
        found |= {x: self.take(o[x], 2 if self.s.rows > 1 else None, 1) for x in LISTS if o.get(x) is not None}
        fields = {x: self.take(a, a.ndim - 1, 1 if a.ndim == 3 else None) for x, a in o.get("q_fields", {}).items()}
        return found | {"q_fields": fields}

    def new(self, done):
        """bool [size]: queries that no part before this one had, of which there were ``done``."""
        return self.start + jnp.arange(self.size) >= done


def rows_per_part(o: dict, opt, s: Shape, limit: int) -> int:
    """Queries of a part: its tables hold at most about TABLE entries, and at most ``limit`` queries (0: any)."""
    table = opt.mask is not None or (s.rows > 1 and any(o.get(x) is not None for x in ("k_valid", "key_bias", "bounds")))
    per_row = s.b * (1 if s.full else o["index"].shape[1]) * s.length * (s.h if opt.sums else 1)
    size = s.n if not table and not opt.sums else max(1, TABLE // per_row)
    return min(s.n, size, limit or s.n)


# ------------------------------------------------------------------------------------------------------- what comes back


def received(sums, index, count, unit: int, keys: int, weights=None):
    """float32 [B, G|H, M]: what each key received over all queries.

    Args: sums [B, G|H, N, L] in list order, as ``gather`` returned it; index, count: the lists, or None for every key;
      weights: float [B, N] or [B, G|H, N] of the queries."""
    if weights is not None:
        weights = weights[:, None] if weights.ndim == 2 else weights
        sums = sums * weights[..., None]
    if index is None:
        return sums.sum(2)
    b, h, n, _ = sums.shape
    key, live = slots(index, count, unit, keys)
    key = jnp.where(live, key, keys)
    key = jnp.broadcast_to(jnp.repeat(key, h // key.shape[1], axis=1) if key.shape[1] < h else key, (b, h, *key.shape[2:]))
    if key.shape[2] == 1:
        sums = sums.sum(2, keepdims=True)
    total = jnp.zeros((b, h, keys), sums.dtype)
    flat = lambda x: x.reshape(b, h, -1)  # noqa: E731
    add = lambda t, i, x: t.at[i].add(x, mode="drop")  # noqa: E731
    return jax.vmap(jax.vmap(add))(total, flat(key), flat(sums))


WIDEST = {"tpu": 640, "gpu": 256}  # head sizes


def unsupported(o: dict, opt, body: str) -> str | None:
    """What an accelerator's body cannot do with this call, or None."""
    for name in ("q", "k", "v"):
        if o[name].dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} of {o[name].dtype}: expected float32 or bfloat16"
        if o[name].dtype != o["q"].dtype:
            return f"{name} of {o[name].dtype} beside q of {o['q'].dtype}: expected one dtype"
    if max(o["q"].shape[3], o["v"].shape[3]) > WIDEST[body]:
        return f"head sizes {o['q'].shape[3]} and {o['v'].shape[3]}: expected at most {WIDEST[body]}"
    s = shape_of(o, opt)
    if s.tile > 64:
        return f"{s.tile} queries that share a list: expected at most 64"
    if s.unit > 1024:
        return f"units of {s.unit} keys: expected at most 1024"
    return None
