"""The Mosaic TPU kernels: forward and gradient, over lists of units that are copied from HBM.

A grid step owns some lists of one block of query heads and a stretch of their entries, which comes as a block of scalar
memory, so no table is ever whole there. Each loop step copies ``copies`` units into VMEM, two steps in flight: a unit of
k and one of v, or single rows in which k and v travel together. Without lists the keys come in blocks of the grid. The
gradient adds to k's and v's by reading, adding and writing back the same units; entries that are not in use go to spare
units behind the keys, one for each place, so that no two copies of a step meet.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.pairs import NN, NT, dot
from pallas_kernels.gather import rotary
from pallas_kernels.gather.lists import Shape, added

LANES, SUBLANES = 128, 8
TN = ((0,), (0,))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one call. pack: query heads of a block; tile: queries of a list, filled up; rows: pack * tile,
    filled up; lists: per grid step; stretch: entries (or blocks of ``width`` keys) per grid step; copies: units per loop
    step; packed: rows of k and v travel together; d, dv: head sizes as the kernel holds them."""

    s: Shape
    pack: int
    tile: int
    rows: int
    lists: int
    stretch: int
    copies: int
    packed: bool
    d: int
    dv: int
    layout: str
    factor: float
    pairs: int

    @property
    def width(self) -> int:
        """Keys per loop step."""
        return self.copies if self.s.full else self.copies * self.s.unit

    @property
    def groups(self) -> int:
        return -(-self.s.rows // self.lists)

    @property
    def stretches(self) -> int:
        return -(-self.s.m // self.width) if self.s.full else -(-self.s.entries // self.stretch)


def at(x, b, h, blocks: int):
    """Where an array [1|b, 1|G|blocks, ...] holds what goes with batch row ``b`` and head block ``h``."""
    n = x.shape[1]
    return b if x.shape[0] > 1 else 0, h if n == blocks else 0 if n == 1 else lax.div(h, blocks // n)


def _unit(p: Plan, r: dict, t, j, c, stretch):
    """(unit to read, unit to add to) of entry ``c`` of loop step ``j``."""
    entry = j * p.copies + c
    unit = r["index"][t, entry]
    used = (unit >= 0) & (unit < p.s.units) & (stretch * p.stretch + entry < r["count"][0, t])
    return jnp.where(used, unit, 0), jnp.where(used, unit, p.s.units + c)


def _each(p: Plan, f) -> None:
    """f(c) for every copy of a step."""
    if p.copies <= 8:
        for c in range(p.copies):
            f(c)
    else:
        lax.fori_loop(0, p.copies, lambda c, _: (f(c), 0)[1], 0, unroll=8 if p.copies % 8 == 0 else 1)


class _Keys:
    """Copies of listed units, two loop steps in flight."""

    def __init__(self, p: Plan, r: dict, b, g, stretch):
        self.p, self.r, self.stretch = p, r, stretch
        self.names = ("kv",) if p.packed else ("k", "v")
        self.place = {x: (b if r[x].shape[0] > 1 else 0, g) for x in self.names}

    def start(self, t, j, slot) -> None:
        def one(c):
            unit, _ = _unit(self.p, self.r, t, j, c, self.stretch)
            for x in self.names:
                self._copy(x, unit, slot, c).start()

        _each(self.p, one)

    def wait(self, slot) -> None:
        def one(c):
            for x in self.names:
                self._copy(x, 0, slot, c).wait()

        _each(self.p, one)

    def _copy(self, x: str, unit, slot, c):
        source = self.r[x].at[*self.place[x], unit]
        return pltpu.make_async_copy(source, self.r["+" + x].at[slot, c], self.r["sem"].at[slot])

    def read(self, slot):
        """(k, v) of a loop step, [width, d]."""
        p, r = self.p, self.r
        if not p.packed:
            return tuple(r["+" + x][slot].reshape(p.width, w) for x, w in (("k", p.d), ("v", p.dv)))
        rows = r["+kv"][slot].reshape(p.width, r["+kv"].shape[-1])
        if rows.dtype == jnp.float32:
            return rows[:, : p.d], rows[:, p.d :]
        both = (lax.shift_left(rows, 16), rows & jnp.int32(-65536))
        return tuple(lax.bitcast_convert_type(x, jnp.float32).astype(jnp.bfloat16) for x in both)


def _clean(p: Plan, r: dict, k, v):
    """(k, v, [1, width]) with zeros where a key or its value is not finite, and more than 0 where that was; (k, v, None)
    where no key is hidden from a row that reads it."""
    if "add" not in r:
        return k, v, None
    wide = [x.astype(jnp.float32) for x in (k, v)]
    wrong = [jnp.where(jnp.abs(x) < jnp.inf, 0.0, 1.0) for x in wide]
    column = functools.reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in wrong))
    ones = lambda x: jnp.ones((SUBLANES, x.shape[1]), jnp.float32)  # noqa: E731
    odd = sum(lax.dot_general(ones(x), x, (NT, ((), ())), preferred_element_type=jnp.float32)[:1] for x in wrong)
    return *(jnp.where(column > 0, 0.0, x).astype(k.dtype) for x in wide), odd


def over_steps(p: Plan, r: dict, b, g, body) -> None:
    """Run ``body(t, j, k, v, odd)`` for each list ``t`` of this grid step and each loop step ``j`` of its stretch."""
    stretch = pl.program_id(3)
    if p.s.full:
        k, v = r["k"][...], r["v"][...]
        if p.s.m % p.width:  # the last block reaches past the keys
            left = p.s.m - stretch * p.width
            k, v = (jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < left, x, 0) for x in (k, v))
        body(0, 0, *_clean(p, r, k, v))
        return
    keys = _Keys(p, r, b, g, stretch)

    def of_list(t, _):
        left = jnp.clip(r["count"][0, t] - stretch * p.stretch, 0, p.stretch)
        steps = lax.div(left + p.copies - 1, p.copies)

        @pl.when(steps > 0)
        def _():
            keys.start(t, 0, 0)

        def step(j, _):
            slot = lax.rem(j, 2)

            @pl.when(j + 1 < steps)
            def _():
                keys.start(t, j + 1, 1 - slot)

            keys.wait(slot)
            body(t, j, *_clean(p, r, *keys.read(slot)))
            return 0

        return lax.fori_loop(0, steps, step, 0)

    lax.fori_loop(0, p.lists, of_list, 0)


def _lanes(p: Plan, j):
    return pl.ds(pl.multiple_of(j * p.width, LANES), p.width)


def _column(x):
    """[1, n] -> [n, 1]; n a multiple of the lanes."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T[:, :1]


def _fact(p: Plan, r: dict, name: str, t, j):
    """[1 | tile, width] of a table in list order."""
    ref = r[name]
    return ref[:, _lanes(p, j)] if p.s.rows == 1 else ref[pl.ds(t, 1), _lanes(p, j)]


def _add(p: Plan, r: dict, t, j):
    """The table of additions over the rows of a block."""
    x = _fact(p, r, "add", t, j)
    if x.shape[0] > 1:
        x = jnp.concatenate([x] * p.pack, 0)
    return x


def _turn_sides(p: Plan, r: dict, t, j):
    """(cos, sin, P) for the keys of a loop step."""
    angle = _column(_fact(p, r, "turn", t, j)) * r["freqs"][...]
    iota = lambda axis: lax.broadcasted_iota(jnp.int32, (p.d, p.d), axis)  # noqa: E731
    factor = jnp.where(lax.broadcasted_iota(jnp.int32, (1, p.d), 1) < 2 * p.pairs, p.factor, 1.0)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor, rotary.pairing(p.d, p.pairs, p.layout, iota(0), iota(1))


def _turn(k, sides):
    cos, sin, pairing = sides
    return (k.astype(jnp.float32) * cos + dot(k, pairing.astype(k.dtype), NN) * sin).astype(k.dtype)


def _logits(p: Plan, opt, r: dict, t, j, k, odd):
    x = dot(r["q"][t], k, NT) * opt.scale
    if "add" in r:
        x = added(x, jnp.broadcast_to(_add(p, r, t, j), x.shape), jnp.broadcast_to(odd, x.shape) > 0)
    if p.s.full and p.s.m % p.width:
        left = p.s.m - pl.program_id(3) * p.width
        x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < left, x, -jnp.inf)
    return x


# ------------------------------------------------------------------------------------------------------------ kernels


def forward_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    b, h, stretch = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    g = lax.div(h, (p.s.h // p.pack) // p.s.g)

    @pl.when(stretch == 0)
    def _():
        r["top"][...] = jnp.full_like(r["top"], -jnp.inf)
        r["mass"][...] = jnp.zeros_like(r["mass"])
        r["total"][...] = jnp.zeros_like(r["total"])

    if "logits" in r:
        r["logits"][...] = jnp.full_like(r["logits"], -jnp.inf)

    def body(t, j, k, v, odd):
        if "turn" in r:
            k = _turn(k, _turn_sides(p, r, t, j))
        x = _logits(p, opt, r, t, j, k, odd)
        if "logits" in r:
            r["logits"][t, :, _lanes(p, j)] = x
        top = r["top"][t][:, :1]
        new = jnp.maximum(top, x.max(-1, keepdims=True))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        e = jnp.exp(x - safe)
        shrink = jnp.exp(top - safe)
        wide = r["top"].shape[1:]
        r["mass"][t] = r["mass"][t] * shrink + jnp.broadcast_to(e.sum(-1, keepdims=True), wide)
        r["top"][t] = jnp.broadcast_to(new, wide)
        r["total"][t] = r["total"][t] * shrink + dot(e.astype(v.dtype), v, NN)

    over_steps(p, r, b, g, body)

    @pl.when(stretch == p.stretches - 1)
    def _():
        top, mass = r["top"][...][:, :, :1], r["mass"][...][:, :, :1]
        some = mass != 0
        safe = jnp.where(some, mass, 1.0)
        r["out"][...] = (r["total"][...] / safe).astype(r["out"].dtype)
        r["lse"][...] = jnp.where(some, jnp.where(some, top, 0.0) + jnp.log(safe), -jnp.inf)


def backward_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    b, h, stretch = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    g = lax.div(h, (p.s.h // p.pack) // p.s.g)

    @pl.when(stretch == 0)
    def _():
        r["dq_total"][...] = jnp.zeros_like(r["dq_total"])

    if "d_add" in r:
        r["d_add"][...] = jnp.zeros_like(r["d_add"])

    def copies(t, j, x: str, back: bool, start: bool):
        place = (b if r[x].shape[0] > 1 else 0, g)

        def one(c):
            unit = _unit(p, r, t, j, c, stretch)[1] if start else 0
            here, there = r[x].at[*place, unit], r["+" + x].at[c]
            ends = (there, here) if back else (here, there)
            copy = pltpu.make_async_copy(*ends, r["back_sem"])
            copy.start() if start else copy.wait()

        _each(p, one)

    def add_to_keys(t, j, grads: dict):
        for back in (False, True):
            for x in grads:
                copies(t, j, x, back, True)
            for x in grads:
                copies(t, j, x, back, False)
            if not back:
                for x, d in grads.items():
                    r["+" + x][...] += d.reshape(r["+" + x].shape)

    def body(t, j, k, v, odd):
        sides = _turn_sides(p, r, t, j) if "turn" in r else None
        k = k if sides is None else _turn(k, sides)
        q, do = r["q"][t], r["do"][t]
        x = _logits(p, opt, r, t, j, k, odd)
        hidden = x == -jnp.inf
        prob = jnp.where(hidden, 0.0, jnp.exp(x - r["lse"][t]))
        ds = jnp.where(hidden, 0.0, prob * (dot(do, v, NT) - r["delta"][t]))
        if "d_add" in r:
            if r["d_add"].shape[0] == p.tile and p.tile > 1:
                found = sum(ds[i * p.tile : (i + 1) * p.tile] for i in range(p.pack))
            else:
                found = ds.sum(0, keepdims=True)
            rows = slice(None) if p.s.rows == 1 else pl.ds(t, 1)
            r["d_add"][rows, _lanes(p, j)] = found
        ds = (ds * opt.scale).astype(q.dtype)
        dk, dv = dot(ds, q, TN), dot(prob.astype(do.dtype), do, TN)
        if sides is not None:
            cos, sin, pairing = sides
            dk = dk * cos + dot(dk * sin, pairing, NT)
        r["dq_total"][t] += dot(ds, k, NN)
        add_to_keys(t, j, {"dkv": jnp.concatenate([dk, dv], 1)} if p.packed else {"dk": dk, "dv": dv})

    over_steps(p, r, b, g, body)

    @pl.when(stretch == p.stretches - 1)
    def _():
        r["dq"][...] = r["dq_total"][...]
