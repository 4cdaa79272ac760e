"""Attention over lists on GPU: two Triton kernels that load keys by index.

One program owns the queries that share a list (one row of lists, the query heads of a kv head) and a part of the list:
short batches are cut into as many parts as fill the chip, and merged. Keys are addressed one by one, so a unit may have
any size, and a token list costs what a block list costs. The keys' gradient is added with atomics, whose order is not
fixed. Arrays in a program are powers of two on each side.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.flash.pairs import NN, NT, dot
from pallas_kernels.gather import lists, rotary
from pallas_kernels.gather.body import Body, heads_first, run
from pallas_kernels.gather.lists import Shape

PROGRAMS = 264  # two for each multiprocessor of the largest chip
MOST_ROWS = 64
# Keys per step by (heads wider than 128, float32): no register is spilled at these sizes on Hopper.
FORWARD = {(0, 0): 64, (1, 0): 32, (0, 1): 32, (1, 1): 16}
BACKWARD = {(0, 0): 32, (1, 0): 16, (0, 1): 16, (1, 1): 16}
TN = ((0,), (0,))


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one call. pack: query heads of a program; rows: its queries, filled up; parts of a list; step:
    keys at a time."""

    s: Shape
    pack: int
    rows: int
    parts: int
    step: int
    layout: str
    factor: float
    pairs: int
    logits: bool


def _plan(s: Shape, opt, rows: dict, table: dict) -> Plan:
    alone = any(rows[x].shape[2] > 1 for x in ("index", "turn") if x in rows)  # a list for each query head
    pack = 1 if alone else max(p for p in range(1, s.r + 1) if s.r % p == 0 and (p == 1 or p * s.tile <= MOST_ROWS))
    wide = int(max(_power(s.d), _power(s.dv)) > 128)
    step = table[wide, int(rows["q"].dtype == jnp.float32)]
    if "add" in rows and max(_power(s.d), _power(s.dv)) <= 64:  # room to look for keys that are not finite
        step = min(step, 32)
    programs = s.b * (s.h // pack) * s.rows
    parts = max(1, min(-(-PROGRAMS // programs), -(-s.length // (4 * step))))
    pairs = rows["freqs"].shape[0] if "turn" in rows else 0
    return Plan(s, pack, _power(pack * s.tile), parts, step, opt.rope_layout, opt.rope_scale, pairs, opt.sums is not None)


def _columns(d: int):
    """(channels to address, which of them exist, None for all)."""
    c = jnp.arange(_power(d))
    return c, None if d == _power(d) else c < d


class _Program:
    """Where one program reads: its batch row, heads, queries and part of a list."""

    def __init__(self, p: Plan, r: dict):
        s, self.p, self.r = p.s, p, r
        i, hb, self.b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        self.part, self.row = lax.rem(i, p.parts), lax.div(i, p.parts)
        ids = jnp.arange(p.rows)
        self.real = ids < p.pack * s.tile
        head, self.query = lax.div(ids, s.tile), lax.rem(ids, s.tile)
        self.head = jnp.where(self.real, hb * p.pack + head, 0)
        self.first_head = hb * p.pack
        self.kv_head = lax.div(self.first_head, s.r)
        # Rows that fill up lie past the end: no store of theirs, masked as it is, shares a place with a real one.
        self.n = jnp.where(self.real, self.row * s.tile + self.query, s.n + ids)

    def at(self, ref, x: int = 1):
        """(batch row, head) of an array [1|b, 1|G|H, ...] for this program."""
        b, h = ref.shape[:2]
        s = self.p.s
        head = 0 if h == 1 else self.kv_head if h == s.g else self.first_head
        return (self.b if b > 1 else 0), head

    def load_rows(self, name: str, d: int):
        """[rows, D] of an array [b, H, N, D]."""
        cols, exist = _columns(d)
        mask = self.real[:, None] if exist is None else self.real[:, None] & exist[None, :]
        place = self.r[name].at[self.b, self.head[:, None], self.n[:, None], cols[None, :]]
        return plt.load(place, mask=jnp.broadcast_to(mask, (self.p.rows, cols.shape[0])), other=0.0)

    def load_sums(self, name: str):
        return plt.load(self.r[name].at[self.b, self.head, self.n], mask=self.real, other=0.0)

    def steps(self):
        """(first, last) step of this program, and the number of listed keys."""
        p, s = self.p, self.p.s
        live = jnp.int32(s.m)
        if not s.full:
            count = self.r["count"]
            live = count[*self.at(count), self.row] * s.unit
        steps = lax.div(live + p.step - 1, p.step)
        per = lax.div(steps + p.parts - 1, p.parts)
        return self.part * per, jnp.minimum((self.part + 1) * per, steps), live

    def keys(self, j, live):
        """(place in the list, slot, whether in use), each [step], of step j."""
        p, s = self.p, self.p.s
        place = j * p.step + jnp.arange(p.step)
        used = place < live
        if s.full:
            return place, jnp.where(used, place, 0), used
        index = self.r["index"]
        entry = jnp.where(used, lax.div(place, s.unit), 0)
        unit = plt.load(index.at[*self.at(index), self.row, entry], mask=used, other=0)
        used = used & (unit >= 0) & (unit < s.units)
        slot = jnp.where(used, unit, 0) * s.unit + lax.rem(place, s.unit)
        used = used & (slot < s.m)
        return place, jnp.where(used, slot, 0), used

    def load_keys(self, name: str, slot, used, d: int):
        ref = self.r[name]
        cols, exist = _columns(d)
        mask = used[:, None] if exist is None else used[:, None] & exist[None, :]
        b = self.b if ref.shape[0] > 1 else 0
        mask = jnp.broadcast_to(mask, (self.p.step, cols.shape[0]))
        return plt.load(ref.at[b, self.kv_head, slot[:, None], cols[None, :]], mask=mask, other=0.0)

    def add_to_keys(self, name: str, slot, used, value):
        """Keys that are not in use go to the spare rows behind the others, each to its own."""
        ref = self.r[name]
        slot = jnp.where(used, slot, self.p.s.m + jnp.arange(self.p.step))
        cols = jnp.arange(value.shape[1])
        plt.atomic_add(ref, (self.b if ref.shape[0] > 1 else 0, self.kv_head, slot[:, None], cols[None, :]), value)

    def turned(self, place, used):
        """(cos, sin, P) for the keys of a step."""
        p, ref = self.p, self.r["turn"]
        turn = plt.load(ref.at[*self.at(ref), self.row if ref.shape[2] > 1 else 0, place], mask=used, other=0.0)
        cols = jnp.arange(_power(p.s.d))
        angle = turn[:, None] * self.r["freqs"][...][None, :]
        factor = jnp.where(cols < 2 * p.pairs, p.factor, 1.0)[None, :]
        pairing = rotary.pairing(_power(p.s.d), p.pairs, p.layout, cols[:, None], cols[None, :])
        return jnp.cos(angle) * factor, jnp.sin(angle) * factor, pairing

    def add(self, place, used):
        """[rows, step] of the table of additions."""
        ref = self.r["add"]
        b, h, rows, tile = ref.shape[:4]
        s = self.p.s
        head = self.head if h == s.h else self.head * 0 + (0 if h == 1 else self.kv_head)
        query = self.query if tile > 1 else self.query * 0
        where = (self.b if b > 1 else 0, head[:, None], self.row if rows > 1 else 0, query[:, None], place[None, :])
        mask = self.real[:, None] & used[None, :]
        return plt.load(ref.at[*where], mask=mask, other=float("-inf"))


def _turn(k, sides):
    cos, sin, pairing = sides
    return (k.astype(jnp.float32) * cos + dot(k, pairing.astype(k.dtype), NN) * sin).astype(k.dtype)


def _clean(r: dict, k, v):
    """(k, v, bool [step]) with zeros where a key or its value is not finite, and where that was; (k, v, None) where no key
    is hidden from a row that reads it."""
    if "add" not in r:
        return k, v, None
    wrong = [jnp.where(jnp.abs(x.astype(jnp.float32)) < jnp.inf, 0.0, 1.0).max(1) for x in (k, v)]
    odd = jnp.maximum(*wrong) > 0
    keep = lambda x: jnp.where(odd[:, None], 0.0, x.astype(jnp.float32)).astype(x.dtype)  # noqa: E731
    return keep(k), keep(v), odd


def _forward_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    s, at = p.s, _Program(p, r)
    q = at.load_rows("q", s.d)
    first, last, live = at.steps()

    def body(j, carry):
        top, mass, total = carry
        place, slot, used = at.keys(j, live)
        k, v, odd = _clean(r, at.load_keys("k", slot, used, s.d), at.load_keys("v", slot, used, s.dv))
        if "turn" in r:
            k = _turn(k, at.turned(place, used))
        x = dot(q, k, NT) * opt.scale
        if "add" in r:
            x = lists.added(x, at.add(place, used), odd[None, :])
        x = jnp.where(used[None, :], x, -jnp.inf)
        if p.logits:
            where = (at.b, at.head[:, None], at.n[:, None], place[None, :])
            plt.store(r["logits"].at[*where], x, mask=at.real[:, None] & (place < live)[None, :])
        new = jnp.maximum(top, x.max(-1))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        e = jnp.exp(x - safe[:, None])
        shrink = jnp.exp(top - safe)
        return new, mass * shrink + e.sum(-1), total * shrink[:, None] + dot(e.astype(v.dtype), v, NN)

    init = jnp.full((p.rows,), -jnp.inf, jnp.float32), jnp.zeros((p.rows,), jnp.float32)
    top, mass, total = lax.fori_loop(first, last, body, (*init, jnp.zeros((p.rows, _power(s.dv)), jnp.float32)))
    some = mass != 0
    safe = jnp.where(some, mass, 1.0)
    lse = jnp.where(some, jnp.where(some, top, 0.0) + jnp.log(safe), -jnp.inf)
    _store_rows(at, "out", total / safe[:, None], s.dv)
    plt.store(r["lse"].at[at.part, at.b, at.head, at.n], lse, mask=at.real)


def _store_rows(at: _Program, name: str, x, d: int):
    """Rows into an array [parts, b, H, N, D]."""
    cols, exist = _columns(d)
    mask = at.real[:, None] if exist is None else at.real[:, None] & exist[None, :]
    ref = at.r[name]
    where = (at.part, at.b, at.head[:, None], at.n[:, None], cols[None, :])
    plt.store(ref.at[*where], x.astype(ref.dtype), mask=jnp.broadcast_to(mask, x.shape))


def _backward_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    s, at = p.s, _Program(p, r)
    q, do = at.load_rows("q", s.d), at.load_rows("do", s.dv)
    lse, delta = at.load_sums("lse"), at.load_sums("delta")
    first, last, live = at.steps()

    def body(j, dq):
        place, slot, used = at.keys(j, live)
        k, v, odd = _clean(r, at.load_keys("k", slot, used, s.d), at.load_keys("v", slot, used, s.dv))
        sides = at.turned(place, used) if "turn" in r else None
        k = k if sides is None else _turn(k, sides)
        x = dot(q, k, NT) * opt.scale
        if "add" in r:
            x = lists.added(x, at.add(place, used), odd[None, :])
        hidden = (x == -jnp.inf) | ~(used[None, :] & at.real[:, None])
        prob = jnp.where(hidden, 0.0, jnp.exp(x - lse[:, None]))
        ds = jnp.where(hidden, 0.0, prob * (dot(do, v, NT) - delta[:, None]))
        if "d_add" in r:
            where = (at.b, at.head[:, None], at.n[:, None], place[None, :])
            plt.store(r["d_add"].at[*where], ds, mask=at.real[:, None] & (place < live)[None, :])
        ds = (ds * opt.scale).astype(q.dtype)
        dk = dot(ds, q, TN)
        if sides is not None:
            cos, sin, pairing = sides
            dk = dk * cos + dot(dk * sin, pairing, NT)
        at.add_to_keys("dk", slot, used, dk)
        at.add_to_keys("dv", slot, used, dot(prob.astype(do.dtype), do, TN))
        return dq + dot(ds, k, NN)

    dq = lax.fori_loop(first, last, body, jnp.zeros((p.rows, _power(s.d)), jnp.float32))
    _store_rows(at, "dq", dq, s.d)


# -------------------------------------------------------------------------------------------------------------- calls


def _flat(x):
    """[b, g, r, rows, tile, ...] -> [b, H, N, ...]."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])


def _operands(p: Plan, rows: dict, keys: dict) -> dict:
    pair = lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])  # noqa: E731
    out = {x: _flat(rows[x]) for x in ("q", "do", "lse", "delta") if x in rows}
    out |= {x: pair(rows[x]) for x in ("index", "count", "add", "turn") if x in rows}
    if "freqs" in rows:
        out["freqs"] = rotary.channels(rows["freqs"], _power(p.s.d), p.layout)
    return out | keys


def _call(p: Plan, opt, kernel, operands: dict, outs: dict, name: str, interpret, aliases=()):
    grid = (p.s.rows * p.parts, p.s.h // p.pack, p.s.b)
    order = list(operands)
    wide = max(_power(p.s.d), _power(p.s.dv)) > 128
    found = pl.pallas_call(
        functools.partial(kernel, p, opt, (*("in:" + x if x in aliases else x for x in operands), *outs)),
        grid=grid,
        out_shape=list(outs.values()),
        input_output_aliases={order.index(x): list(outs).index(x) for x in aliases},
        compiler_params=plt.CompilerParams(num_warps=8 if wide and p.rows > 32 else 4, num_stages=2),
        name=name,
        interpret=interpret,
    )(*operands.values())
    return dict(zip(outs, found, strict=True))


def _keys(o: dict, opt, s: Shape) -> dict:
    return {x: heads_first(o[x]) for x in ("k", "v")}


def _unflat(x, s: Shape):
    return x.reshape(s.b, s.g, s.r, s.rows, s.tile, *x.shape[3:])


def _listed(x, rows: dict, s: Shape, fill: float):
    """[b, H, N, L] that a kernel wrote as far as the lists go; ``fill`` behind."""
    x = _unflat(x, s)
    if s.full:
        return x
    return jnp.where(jnp.arange(s.length) < (rows["count"] * s.unit)[..., None, None], x, fill)


def _forward(s: Shape, opt, rows: dict, keys: dict, interpret=False):
    p = _plan(s, opt, rows, FORWARD)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    dtype = jnp.float32 if p.parts > 1 else keys["v"].dtype
    outs = {"out": jax.ShapeDtypeStruct((p.parts, s.b, s.h, s.n, s.dv), dtype), "lse": f32((p.parts, s.b, s.h, s.n))}
    if p.logits:
        outs["logits"] = f32((s.b, s.h, s.n, s.length))
    found = _call(p, opt, _forward_kernel, _operands(p, rows, keys), outs, "gather_forward", interpret)
    out, lse = merge_parts(found["out"], found["lse"])
    logits = _listed(found["logits"], rows, s, -jnp.inf) if p.logits else None
    return _unflat(out, s), _unflat(lse, s), logits


def merge_parts(out, lse):
    """One softmax over parts of the keys [parts, ...]."""
    if out.shape[0] == 1:
        return out[0], lse[0]
    top = lse.max(0)
    safe = jnp.where(top > -jnp.inf, top, 0.0)
    share = jnp.exp(lse - safe)
    mass = share.sum(0)
    some = mass != 0
    mass = jnp.where(some, mass, 1.0)
    return (out * share[..., None]).sum(0) / mass[..., None], jnp.where(some, safe + jnp.log(mass), -jnp.inf)


def _backward(s: Shape, opt, rows: dict, keys: dict, totals: dict, wants: bool, interpret=False):
    p = dataclasses.replace(_plan(s, opt, rows, BACKWARD), logits=False)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outs = {"dq": f32((p.parts, s.b, s.h, s.n, s.d))}
    outs |= {x: f32(totals[x].shape) for x in ("dk", "dv")}
    if wants:
        outs["d_add"] = f32((s.b, s.h, s.n, s.length))
    operands = _operands(p, rows, keys) | totals
    found = _call(p, opt, _backward_kernel, operands, outs, "gather_backward", interpret, aliases=("dk", "dv"))
    d_add = None
    if wants:
        d_add = _listed(found["d_add"], rows, s, 0.0)
        shape = rows["add"].shape
        axes = tuple(i for i in range(6) if shape[i] == 1 and d_add.shape[i] > 1)
        d_add = d_add.sum(axes, keepdims=True)
    return _unflat(found["dq"].sum(0), s), d_add, {x: found[x] for x in ("dk", "dv")}


def _zeros(o: dict, opt, s: Shape) -> dict:
    bk, spare = o["k"].shape[0], max(BACKWARD.values())
    return {"d" + x: jnp.zeros((bk, s.g, s.m + spare, _power(w)), jnp.float32) for x, w in (("k", s.d), ("v", s.dv))}


def _finish(o: dict, s: Shape, totals: dict):
    return tuple(jnp.moveaxis(totals["d" + x][:, :, : s.m, :w], 1, 2) for x, w in (("k", s.d), ("v", s.dv)))


def _body(interpret) -> Body:
    return Body(_keys, functools.partial(_forward, interpret=interpret), functools.partial(_backward, interpret=interpret),
                _zeros, _finish, lambda o, opt, s: 0, False, False)  # fmt: skip


BODIES = {interpret: _body(interpret) for interpret in (False, True)}


def gather(o: dict, opt, interpret=False):
    """``interpret``: run the kernels on a CPU."""
    if (why := lists.unsupported(o, opt, "gpu")) is not None:
        raise ValueError(f"implementation: 'gpu' does not support {why}")
    return run(BODIES[interpret], o, opt)
