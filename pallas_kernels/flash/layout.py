"""Operands as accelerator kernels want them: heads before tokens, tiles and units as whole trailing blocks.

A block of query rows holds one query tile of ``pack`` query heads that share a kv head and a list, so grouped queries
read each key once. Per-row and per-key facts travel as ``[facts, rows]`` with the long axis on the lanes. Every key
array gets one unit more than there are keys: invisible and zero, it stands for list entries that are not in use, so
that kernels need no notion of liveness.

Kernels that pick blocks out of ``[pack, tiles, tile]`` and clean keys themselves take q, k and v ``raw``: arranged by a
transposition alone, which costs nothing where the compiler may choose layouts.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash.lists import full_entries

LANES = 128
CHUNK = 128  # entries of a transposed list read at a time
TAINTED = 2  # the "valid" of a key whose NaN or infinity was put aside: who sees it gets NaN, nobody else


def ceil_to(n: int, size: int) -> int:
    return -(-n // size) * size


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one call. ``rows``: query rows per block, ``unit_rows`` and ``unit_lanes``: a unit padded for
    the sublanes or the lanes, ``step``: units per loop step."""

    b: int
    n: int
    m: int
    h: int
    g: int
    d: int
    dv: int
    tile: int
    unit: int
    pack: int
    rows: int
    unit_rows: int
    unit_lanes: int
    step: int
    d_pad: int
    dv_pad: int
    query_fields: tuple[str, ...]
    row: tuple[str, ...]
    key: tuple[str, ...]
    biased: bool
    bounded: bool
    float32: bool
    full: bool
    weighted: bool
    tabled: bool
    raw: int
    """Not 0: k and v are not cleaned and have no unit past the end, the kernels see to both; and what a tile must be a
    multiple of to be read by head."""

    @property
    def tiles(self) -> int:
        return -(-self.n // self.tile)

    @property
    def units(self) -> int:
        return -(-self.m // self.unit)

    @property
    def by_head(self) -> bool:
        """Whether arrays of rows are [B, blocks, pack, tiles, tile, E] instead of [B, blocks, tiles, rows, E]."""
        return self.raw > 0 and self.rows == self.pack * self.tile and self.tile % self.raw == 0

    @property
    def blocks(self) -> int:
        """Row blocks per query tile."""
        return self.h // self.pack

    @property
    def key_floats(self) -> tuple[str, ...]:
        """Per-key floats in the order of their rows; the bias comes last under a name no side row can have."""
        return (*self.key, "+bias") if self.biased else self.key


def plan(o: dict, opt, *, rows: int, keys: int, pad_rows, pad_unit, pad_lanes, pad_width, raw: int = 0) -> Plan:
    """``rows`` and ``keys``: how many query rows and keys a kernel would like to hold at a time. Functions that pad: a
    block of rows, a unit as rows of k and v, a unit as facts, a head size. ``raw``: 0, or for kernels that take q, k and v
    so, what a tile must be a multiple of."""
    (b, n, h, d), (m, g), dv = o["q"].shape, o["k"].shape[1:3], o["v"].shape[3]
    key = tuple(sorted(o.get("key", {}))) if opt.score_mod is not None else ()
    row = tuple(sorted(o.get("row", {}))) if opt.score_mod is not None else ()
    biased = o.get("key_bias") is not None
    heads = [o["index"].shape[1]] + [o["key"][x].shape[2] for x in key]
    heads += [o["key_bias"].shape[2]] if biased else []
    r = h // g
    pack = 1
    tabled = o.get("bias") is not None
    if not tabled and not any(x == h and x != g for x in heads):  # one list, one set of key facts for the heads of a block
        pack = max(p for p in range(1, r + 1) if r % p == 0 and (p == 1 or p * opt.tile <= rows))
    unit_rows = pad_unit(opt.unit)
    return Plan(
        b, n, m, h, g, d, dv, opt.tile, opt.unit, pack, pad_rows(pack * opt.tile), unit_rows, pad_lanes(opt.unit),
        max(1, min(o["index"].shape[3], keys // unit_rows)), pad_width(d), pad_width(dv),
        tuple(sorted(o["q_fields"])), row, key, biased, o.get("bounds") is not None, o["q"].dtype == jnp.float32,
        unit_rows == opt.unit, o.get("log_weight") is not None, tabled, raw,
    )  # fmt: skip


def _pad(x, axis: int, size: int, value=0):
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[a] if a == axis else 0) for a in range(x.ndim)], constant_values=value)


def rows_of(p: Plan, x, width: int | None = None, value=0):
    """[b, N, 1|H, E] -> [b, 1|blocks, tiles, rows, width or E]."""
    b, _, h, e = x.shape
    x = _pad(x, 1, p.tiles * p.tile, value).reshape(b, p.tiles, p.tile, h, e)
    if h == 1:
        x = jnp.broadcast_to(jnp.moveaxis(x, 3, 1)[:, :, :, None], (b, 1, p.tiles, p.pack, p.tile, e))
    else:
        x = jnp.transpose(x.reshape(b, p.tiles, p.tile, p.blocks, p.pack, e), (0, 3, 1, 4, 2, 5))
    x = _pad(x.reshape(*x.shape[:3], p.pack * p.tile, e), 3, p.rows, value)
    return x if width is None else _pad(x, 4, width)


def from_rows(p: Plan, x):
    """[B, blocks, tiles, rows, E] -> [B, N, H, E]."""
    x = x[:, :, :, : p.pack * p.tile].reshape(*x.shape[:3], p.pack, p.tile, x.shape[4])
    x = jnp.transpose(x, (0, 2, 4, 1, 3, 5)).reshape(x.shape[0], p.tiles * p.tile, p.h, x.shape[5])
    return x[:, : p.n]


def queries_of(p: Plan, x, width: int):
    """[B, N, H, E] as arrays of rows."""
    if not p.by_head:
        return rows_of(p, x, width)
    x = jnp.swapaxes(_pad(_pad(x, 1, p.tiles * p.tile), 3, width), 1, 2)
    return x.reshape(x.shape[0], p.blocks, p.pack, p.tiles, p.tile, width)


def from_queries(p: Plan, x):
    """Back to [B, N, H, E]."""
    if not p.by_head:
        return from_rows(p, x)
    return jnp.swapaxes(x.reshape(x.shape[0], p.h, p.tiles * p.tile, x.shape[5]), 1, 2)[:, : p.n]


def rows_shape(p: Plan, width: int) -> tuple[int, ...]:
    """Of an array of rows."""
    return (p.b, p.blocks, p.pack, p.tiles, p.tile, width) if p.by_head else (p.b, p.blocks, p.tiles, p.rows, width)


def row_facts(p: Plan, facts: list):
    """Facts [b, N, 1|H] -> [b, 1|blocks, tiles, len(facts), rows]."""
    shape = jnp.broadcast_shapes(*(x.shape for x in facts))
    x = jnp.stack([jnp.broadcast_to(x, shape) for x in facts], -1)
    return jnp.swapaxes(rows_of(p, x), 3, 4)


def units_of(p: Plan, x, width: int):
    """[B, M, G, E] -> [B, G, units (+ 1), unit_rows, width]."""
    (b, _, g, e), units = x.shape, p.units + (p.raw == 0)
    x = _pad(x, 1, units * p.unit).reshape(b, units, p.unit, g, e)
    return _pad(_pad(jnp.transpose(x, (0, 3, 1, 2, 4)), 3, p.unit_rows), 4, width)


def key_facts(p: Plan, facts: list):
    """Facts [b, M, 1|G|H] -> [b, 1|G|H, units + 1, len(facts), unit_lanes]."""
    b = max(x.shape[0] for x in facts)
    h = max(x.shape[2] for x in facts)
    spread = [x if x.shape[2] in (1, h) else jnp.repeat(x, h // x.shape[2], axis=2) for x in facts]
    x = jnp.stack([jnp.broadcast_to(x, (b, p.m, h)) for x in spread], 1)  # [b, F, M, h]
    x = _pad(x, 2, (p.units + 1) * p.unit).reshape(b, len(facts), p.units + 1, p.unit, h)
    return _pad(jnp.transpose(x, (0, 4, 2, 1, 3)), 4, p.unit_lanes)


def _per_row(p: Plan, x):
    """A field [b, N] or [b, G, N] as [b, N, 1|H]."""
    return x[..., None] if x.ndim == 2 else jnp.repeat(jnp.moveaxis(x, 1, 2), p.h // p.g, axis=2)


def _per_key(x):
    return x[..., None] if x.ndim == 2 else jnp.moveaxis(x, 1, 2)


def key_state(o: dict):
    """int32 [B, M, G]: 0 for an invalid key, 1, or ``TAINTED`` for one with a NaN (or an infinity, in k or v)."""
    b, m, g = o["k"].shape[:3]
    odd = [~jnp.isfinite(o[x]).all(-1) for x in ("k", "v")]
    for x in [o.get("key_bias"), *o.get("key", {}).values()]:
        if x is not None:  # [b, M, 1|G|H]
            x = jnp.isnan(x)
            odd.append(x if x.shape[2] in (1, g) else x.reshape(*x.shape[:2], g, -1).any(-1))
    tainted = functools.reduce(jnp.logical_or, odd)
    return jnp.broadcast_to(jnp.where(_per_key(o["k_valid"]), jnp.where(tainted, TAINTED, 1), 0), (b, m, g))


def arrange_floats(p: Plan, o: dict, opt=None) -> dict:
    """The differentiable operands, by a linear map. Keys that are invalid or tainted become zeros: 0 x NaN is NaN."""
    state = key_state(o)

    def clean(x):  # [b, M, 1|G|H]
        h = x.shape[2]
        return jnp.where((state if h in (1, p.g) else jnp.repeat(state, h // p.g, axis=2)) == 1, x, 0)

    k, v = (o[x] if p.raw else jnp.where((state == 1)[..., None], o[x], 0) for x in ("k", "v"))
    out = {"q": queries_of(p, o["q"], p.d_pad), "k": units_of(p, k, p.d_pad), "v": units_of(p, v, p.dv_pad)}
    if p.row:
        out["row"] = row_facts(p, [o["row"][x].astype(jnp.float32) for x in p.row])
    if p.key_floats:
        facts = [(o["key_bias"] if x == "+bias" else o["key"][x]).astype(jnp.float32) for x in p.key_floats]
        out["key"] = key_facts(p, [clean(x) for x in facts])
    if p.weighted:
        out["weight"] = _pad(_ordered(p, o, opt)(o["log_weight"].astype(jnp.float32)), 3, _length(p, o))
    if p.tabled:
        x = _pad(_pad(o["bias"], 2, p.tiles * p.tile), 3, (p.units + 1) * p.unit)
        x = x.reshape(*x.shape[:2], p.tiles, p.tile, p.units + 1, p.unit)
        out["table"] = _pad(_pad(jnp.swapaxes(x, 3, 4), 4, p.rows), 5, p.unit_lanes)
    return out


def _length(p: Plan, o: dict) -> int:
    return ceil_to(o["index"].shape[3], p.step)


def _ordered(p: Plan, o: dict, opt):
    """f(x [b, Hs, tiles, K, ...]) with the entries whose pairs need no mask first."""
    full = _full(p, o, opt)
    if full is None:
        return lambda x: x
    order = jnp.argsort(~full, axis=-1, stable=True)
    return lambda x: jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 4)), 3)


def _full(p: Plan, o: dict, opt):
    return full_entries(o, opt, jnp.swapaxes(key_state(o) == 1, 1, 2)) if p.full and opt is not None else None


def arrange_ints(p: Plan, o: dict, opt=None) -> dict:
    """Fields and lists. ``lists`` [b, Hs, tiles, 1, 1 + L (+ 2 L) (+ L) + 1]: the count, then units, the live ranges, the
    bits of the weights, and how many of the first entries need no mask."""
    fields = [key_state(o)] + [_per_key(o["k_fields"][x]) for x in p.query_fields]
    out = {"key_int": key_facts(p, fields)}
    if p.query_fields:
        out["row_int"] = row_facts(p, [_per_row(p, o["q_fields"][x]) for x in p.query_fields])
    k = o["index"].shape[3]
    count = jnp.clip(o["count"], 0, k)
    used = (jnp.arange(k) < count[..., None]) & (o["index"] >= 0) & (o["index"] < p.units)
    o = o | {"index": jnp.where(used, o["index"], p.units)}
    full, ordered, length = _full(p, o, opt), _ordered(p, o, opt), _length(p, o)
    parts = [count[..., None], _pad(ordered(o["index"]), 3, length, p.units)]
    if p.bounded:
        bounds = ordered(jnp.broadcast_to(o["bounds"], (*o["index"].shape, 2)))
        parts += [_pad(bounds[..., side], 3, length) for side in (0, 1)]
    if p.weighted:
        weight = _pad(ordered(o["log_weight"].astype(jnp.float32)), 3, length)
        parts.append(lax.bitcast_convert_type(weight, jnp.int32))
    parts.append(jnp.zeros_like(count)[..., None] if full is None else full.sum(-1, keepdims=True))
    out["lists"] = jnp.concatenate([x.astype(jnp.int32) for x in parts], -1)[:, :, :, None]
    return out


def list_length(p: Plan, lists) -> int:
    return (lists.shape[-1] - 2) // words(p)


def words(p: Plan) -> int:
    """int32 words of a list entry."""
    return 1 + 2 * p.bounded + p.weighted


def transpose_lists(p: Plan, lists):
    """Which query tiles list each unit: (chunks [b, Hs, C, words of an entry, CHUNK], offsets [b, Hs, 1, 1, 2 units + 1]).

    The entries of unit u are offsets[u] .. offsets[u + 1] of the chunks laid end to end: as long as the lists, where
    one list per unit would have to be as long as there are tiles. From offsets[units + 1 + u] on they need a mask."""
    length = list_length(p, lists)
    b, hs = lists.shape[:2]
    lists = lists[:, :, :, 0]
    partial = jnp.arange(length) >= lists[..., -1:]
    unit = (2 * lists[..., 1 : 1 + length] + partial).reshape(b, hs, -1)
    tile = jnp.broadcast_to(jnp.arange(p.tiles, dtype=jnp.int32)[:, None], (p.tiles, length)).reshape(-1)
    payload = [jnp.broadcast_to(tile, unit.shape)]
    payload += [lists[..., 1 + i * length : 1 + (i + 1) * length].reshape(b, hs, -1) for i in range(1, words(p))]
    unit, *payload = lax.sort((unit, *payload), num_keys=1, is_stable=True)
    find = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, jnp.arange(2 * p.units + 1, dtype=jnp.int32))))
    size = ceil_to(unit.shape[-1], CHUNK)
    chunks = jnp.stack([_pad(x, 2, size).reshape(b, hs, size // CHUNK, CHUNK) for x in payload], 3)
    offsets = find(unit).astype(jnp.int32)
    return chunks, jnp.concatenate([offsets[..., 0::2], offsets[..., 1::2]], -1)[:, :, None, None]


# ------------------------------------------------------------------------------------------------ what lowers

# Operations on tiles that both Mosaic TPU and Triton lower, derivatives included (checked by compiling).
ELEMENTWISE = frozenset(
    "add sub mul neg abs rem max min and or xor not eq ne lt le gt ge exp exp2 log log1p tanh logistic sqrt rsqrt pow "
    "integer_pow square shift_left shift_right_arithmetic shift_right_logical select_n convert_element_type "
    "broadcast_in_dim reshape squeeze copy stop_gradient reduce_sum add_any clamp".split()
)
NESTED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint")


def _not_lowered(jaxpr, missing) -> list[str]:
    found = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in NESTED:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            found += _not_lowered(getattr(inner, "jaxpr", inner), missing)
        elif name == "div":
            continue  # of floats, and lax.div of integers
        elif name == "select_n" and eqn.outvars[0].aval.dtype == bool:
            found.append("where on booleans")
        elif name not in ELEMENTWISE or name in missing:
            found.append(name)
    return found


def refused(call, *args, missing=frozenset()) -> list[str]:
    """Operations inside ``call(*args)`` that kernels do not lower (some, those that a body is ``missing``), and captured
    arrays."""
    closed = jax.make_jaxpr(call)(*args)
    found = _not_lowered(closed.jaxpr, missing)
    return sorted(set(found)) + ["a captured array"] * any(jnp.ndim(x) > 0 for x in closed.consts)


def unsupported(o: dict, opt, *, extras: bool = False, half: bool = False, missing=frozenset()) -> str | None:
    """What an accelerator body cannot do with this call, or None. ``extras``: it reads tables and weights of units;
    ``half``: it multiplies float16; ``missing``: operations on tiles that it does not lower."""
    dtypes = [jnp.float32, jnp.bfloat16] + [jnp.float16] * half
    for name in ("q", "k", "v"):
        if o[name].dtype not in dtypes:
            return f"{name} of {o[name].dtype}: expected {' or '.join(jnp.dtype(x).name for x in dtypes)}"
    if o["k"].dtype != o["q"].dtype:
        return f"k of {o['k'].dtype} beside q of {o['q'].dtype}: expected one dtype"
    if o.get("bias") is not None and not extras:
        return "bias that differs by query (a table of queries by keys); key_bias is supported"
    if o.get("log_weight") is not None and not extras:
        return "log_weight of units"
    if max(o["q"].shape[3], o["v"].shape[3]) > 256:
        return f"head sizes {o['q'].shape[3]} and {o['v'].shape[3]}: expected at most 256"
    if opt.unit > 1024:
        return f"units of {opt.unit} keys: expected at most 1024"
    if opt.unit < 8 and o.get("bias") is not None:
        return f"bias that differs by query with units of {opt.unit} keys: expected at least 8"
    if opt.tile > 1024:
        return f"tiles of {opt.tile} queries: expected at most 1024"
    names = {x: jnp.zeros((2, 3), jnp.int32) for x in o["q_fields"]}
    if opt.mask is not None and (found := refused(opt.mask.test, names, names, missing=missing)):
        return f"mask with {', '.join(found)}"
    if opt.score_mod is not None:
        s = jnp.zeros((2, 3), jnp.float32)
        row, key = ({x: s for x in o.get(side, {})} for side in ("row", "key"))

        def both(s, q, k, row, key):
            value, pull = jax.vjp(lambda s, row, key: opt.score_mod(s, q, k, row, key), s, row, key)
            return value, pull(value)

        if found := refused(both, s, names, names, row, key, missing=missing):
            return f"score_mod with {', '.join(found)}"
    return None
