"""The three Hopper kernels of block-list attention (Mosaic GPU: wgmma, bulk tensor copies, warp specialisation).

Every program has one or two warp groups that multiply and one that copies. The copying group walks the same list as the
others, at most ``STAGES`` steps ahead, and hands over shared memory by barriers: "in" when a slot is filled, "free" when
all multiplying groups are done with it. Arrays are flat, ``[everything else, last axis]``: ``start`` finds the first row of
what goes with a batch row, a row block, and a tile or unit.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash import layout
from pallas_kernels.flash.layout import CHUNK, Plan
from pallas_kernels.flash.pairs import NN, NT, at, dot, inside, kept, logits_of, pair_gradient, visible

ROWS = 64  # rows of a warp group: the first side of every wgmma
STAGES = 2  # slots of shared memory per copied operand
REGISTERS = 240, 24  # of a thread that multiplies, of one that copies
LOG2E = math.log2(math.e)


class Flat:
    """References to flat arrays, with the shapes ``[B, heads, tiles or units, rows, last]`` that they had."""

    def __init__(self, p: Plan, shapes: dict, refs):
        self.p, self.shapes, self.refs = p, shapes, dict(zip(shapes, refs, strict=True))

    def __getitem__(self, name: str):
        return self.refs[name]

    def start(self, name: str, b, h, i):
        """The first row of tile, unit or chunk ``i`` of row block ``h``."""
        _, heads, count, rows, _ = self.shapes[name].shape
        b, h = at(self.p, self.shapes[name], b, h)
        return ((b * heads + h) * count + i) * rows

    def load_rows(self, names, b, h, i, first, size: int, into: dict, ready):
        """Copy ``size`` rows of whole width from row ``first`` on."""
        for x in names:
            plgpu.copy_gmem_to_smem(self[x].at[pl.ds(self.start(x, b, h, i) + first, size)], into[x], ready)

    def load_facts(self, name: str, b, h, i, first, size: int, into, ready):
        """Copy columns ``first`` .. of each fact to ``into(fact)``."""
        row = self.start(name, b, h, i)
        for f in range(self.shapes[name].shape[3]):
            plgpu.copy_gmem_to_smem(self[name].at[row + f, pl.ds(first, size)], into(f), ready)


def settle(x, interpret, axis: int | None = None):
    """A matrix, or a vector along ``axis`` of one, in registers as wgmma wants them: left to itself, the compiler searches
    for layouts until it gives up on kernels of this size."""
    if interpret:
        return x
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(1 - axis))


def spread(x, shape, axis: int, interpret):
    """A vector along ``axis`` of ``shape``."""
    return lax.broadcast_in_dim(settle(x, interpret, axis), shape, (axis,))


def products(terms, interpret, totals=(), then=lambda: None):
    """[a x b (+ total)] of terms (a in registers or shared memory, b in shared memory, dims), all in flight at once;
    ``then()`` runs meanwhile. The interpreter knows neither operands in registers nor transposed ones: plain products."""
    if interpret:
        then()
        found = [dot(*(x if isinstance(x, jax.Array) else x[...] for x in (a, b)), dims) for a, b, dims in terms]
        return [t + x for t, x in zip(totals, found, strict=True)] if totals else found

    def start(accs):
        for acc, (a, b, dims) in zip(accs, terms, strict=True):
            plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)) if dims == NT else b)
        then()

    if totals:
        return pl.run_state(start)([plgpu.ACC.init(x) for x in totals])

    def fresh(*accs):
        start(accs)
        return [acc[...] for acc in accs]

    sizes = [(a.shape[0], b.shape[0 if dims == NT else 1]) for a, b, dims in terms]
    return pl.run_scoped(fresh, *(plgpu.ACC(x, jnp.float32) for x in sizes))


def copy_ahead(walk, streams):
    """The copying group: ``walk(body)`` calls ``body(step, *place)`` for each step and returns their number; each stream
    is (ready, free, load) with ``load(slot, ready barrier, *place)``."""

    def body(j, *place):
        slot = lax.rem(j, STAGES)
        for ready, free, load in streams:
            pl.when(j >= STAGES)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            load(slot, ready.at[slot], *place)

    steps = walk(body)
    for j in range(STAGES):  # every slot comes back before the program ends

        @pl.when(steps + j >= STAGES)
        def _(j=j):
            for _, free, _ in streams:
                plgpu.barrier_wait(free.at[lax.rem(steps + j, STAGES)])


# ------------------------------------------------------------------------------------------- rows against their lists


class Walk:
    """Which rows a program owns and the steps over their list: ``p.step`` units at a time, or a unit in parts."""

    def __init__(self, p: Plan, r: Flat, groups: int, part: int, interpret):
        cut = p.rows // (groups * ROWS)
        i, self.h, self.b = (lax.axis_index(x) for x in ("x", "heads", "batch"))
        self.tile, self.first = lax.div(i, cut), lax.rem(i, cut) * (groups * ROWS)
        self.p, self.r, self.part, self.parts, self.interpret = p, r, part, p.unit_rows // part, interpret
        self.lists, self.row = r["lists"], r.start("lists", self.b, self.h, self.tile)
        self.steps = lax.div(self.lists[self.row, 0] + (p.step - 1), p.step) * self.parts

    def fold(self, step, carry):
        """Fold ``step(needs no mask, j, carry)`` over the list; units that need no mask come first in it."""
        first = 0
        if self.p.full:
            first = lax.div(self.lists[self.row, self.lists.shape[1] - 1], self.p.step) * self.parts
            carry = lax.fori_loop(0, first, functools.partial(step, True), carry)
        return lax.fori_loop(first, self.steps, functools.partial(step, False), carry)

    def entries(self, j):
        """[(unit, first key, keys of the slot, live range in them or None)] of a step."""
        found, length = [], layout.list_length(self.p, self.r.shapes["lists"])
        entry, first = lax.div(j, self.parts) * self.p.step, lax.rem(j, self.parts) * self.part
        for e in range(self.p.step):
            unit = self.lists[self.row, 1 + entry + e]
            live = None
            if self.p.bounded:
                edges = (self.lists[self.row, 1 + i * length + entry + e] - first for i in (1, 2))
                live = tuple(jnp.clip(x, 0, self.part) + e * self.part for x in edges)
            found.append((unit, first, pl.ds(e * self.part, self.part), live))
        return found

    def load_keys(self, name: str, into, facts=None):
        """load(slot, ready, j) of the units of a step, with the facts of their keys if there is a place for them."""

        def load(slot, ready, j):
            for unit, first, keys, _ in self.entries(j):
                self.r.load_rows([name], self.b, self.h, unit, first, self.part, {name: into.at[slot, keys]}, ready)
                if facts is not None:
                    here = lambda f, keys=keys: facts.at[slot, f, keys]  # noqa: E731
                    self.r.load_facts("key_int", self.b, self.h, unit, first, self.part, here, ready)

        return load

    def load_own(self, wg, into: dict, facts, ready):
        """Copy a group's rows of the operands in ``into``, and their facts."""
        first = self.first + wg * ROWS
        self.r.load_rows(into, self.b, self.h, self.tile, first, ROWS, into, ready)
        for name, held in facts.items():
            here = lambda f, held=held: held.at[wg, f]  # noqa: E731
            self.r.load_facts(name, self.b, self.h, self.tile, first, ROWS, here, ready)

    def sides(self, full: bool, facts, own, j, shape):
        """(valid or None, query facts, key facts) of a step; keys run along the second axis."""
        valid = None
        if not full:
            valid = facts[0]
            if self.p.bounded:
                ranges = [inside(*live, valid.shape, 0) for *_, live in self.entries(j)]
                valid = valid * sum(ranges[1:], ranges[0])
            valid = spread(valid, shape, 1, self.interpret)
        row_int = {x: spread(own[f], shape, 0, self.interpret) for f, x in enumerate(self.p.query_fields)}
        key_int = {x: spread(facts[1 + f], shape, 1, self.interpret) for f, x in enumerate(self.p.query_fields)}
        return valid, row_int, key_int

    def copy(self, streams):
        def walk(body):
            lax.fori_loop(0, self.steps, lambda j, _: body(j, j), None)
            return self.steps

        copy_ahead(walk, streams)


def forward(p: Plan, opt, groups, part, interpret, shapes, *refs, q, k, v, out, lse, own, facts, own_in, k_in, v_in, k_free,
            v_free, turn=None):  # fmt: skip
    r = Flat(p, shapes, refs)
    walk, wg, shape = Walk(p, r, groups, part, interpret), lax.axis_index("wg"), (ROWS, k.shape[1])
    # Scores stay as the tensor cores leave them where a factor does: one multiply-add before the power of two.
    plain = opt.score_mod is None and opt.scale > 0
    factor = LOG2E * opt.scale if plain else LOG2E

    def swap():
        """With two groups, one multiplies while the other takes powers."""
        if turn is not None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

    @pl.when(wg < groups)
    def _():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        walk.load_own(wg, {"q": q.at[wg]}, {"row_int": own} if p.query_fields else {}, own_in.at[wg])
        plgpu.barrier_wait(own_in.at[wg])

        def step(full, j, carry):
            top, mass, total = carry
            slot = lax.rem(j, STAGES)
            plgpu.barrier_wait(k_in.at[slot])
            (s,) = products([(q.at[wg], k.at[slot], NT)], interpret, then=swap)
            valid, row_int, key_int = walk.sides(full, facts.at[slot], own.at[wg], j, shape)
            ok = visible(opt, shape, valid, row_int, key_int)
            plgpu.barrier_arrive(k_free.at[slot])
            s = s if plain else logits_of(p, opt, row_int, key_int)(s, {}, {})
            if opt.normalizer == "none":
                e = kept(s * opt.scale if plain else s, ok, valid, 0.0)
            else:
                s = kept(s, ok, valid, -jnp.inf)
                new = jnp.maximum(top, s.max(1) * factor)
                safe = jnp.where(new > -jnp.inf, new, 0.0)
                e = jnp.exp2(s * factor - spread(safe, shape, 0, interpret))
                shrink = jnp.exp2(top - safe)
                top, mass = new, mass * shrink + e.sum(1)
                total = total * spread(shrink, total.shape, 0, interpret)
            e = e.astype(v.dtype)
            swap()
            plgpu.barrier_wait(v_in.at[slot])
            (total,) = products([(e, v.at[slot], NN)], interpret, [total])
            plgpu.barrier_arrive(v_free.at[slot])
            return top, mass, total

        init = [settle(jnp.full((ROWS,), x, jnp.float32), interpret, 0) for x in (-jnp.inf, 0.0)]
        pl.when(wg == 1)(swap)
        top, mass, total = walk.fold(step, (*init, settle(jnp.zeros((ROWS, v.shape[2]), jnp.float32), interpret)))
        pl.when(wg == 0)(swap)
        if opt.normalizer == "none":
            lse[wg] = jnp.zeros((ROWS,), jnp.float32)
        else:
            seen = mass != 0
            safe = jnp.where(seen, mass, 1.0)
            total = total * spread(1.0 / safe, total.shape, 0, interpret)
            lse[wg] = jnp.where(seen, jnp.where(seen, top, 0.0) / LOG2E + jnp.log(safe), -jnp.inf)
        out[wg] = total.astype(out.dtype)
        plgpu.commit_smem()
        first = walk.first + wg * ROWS
        start = r.start("out", walk.b, walk.h, walk.tile) + first
        plgpu.copy_smem_to_gmem(out.at[wg], r["out"].at[pl.ds(start, ROWS)])
        start = r.start("lse", walk.b, walk.h, walk.tile)
        plgpu.copy_smem_to_gmem(lse.at[wg], r["lse"].at[start, pl.ds(first, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == groups)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        walk.copy([(k_in, k_free, walk.load_keys("k", k, facts)), (v_in, v_free, walk.load_keys("v", v))])


def query_gradient(p: Plan, opt, groups, part, interpret, shapes, *refs, q, do, k, v, sums, own, facts, own_in, k_in, v_in,
                   k_free, v_free):  # fmt: skip
    r = Flat(p, shapes, refs)
    walk, wg, shape = Walk(p, r, groups, part, interpret), lax.axis_index("wg"), (ROWS, k.shape[1])

    @pl.when(wg < groups)
    def _():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        held = {"sums": sums} | ({"row_int": own} if p.query_fields else {})
        walk.load_own(wg, {"q": q.at[wg], "do": do.at[wg]}, held, own_in.at[wg])
        plgpu.barrier_wait(own_in.at[wg])
        sums_here = sums[wg, 0], sums[wg, 1]

        def step(full, j, total):
            slot = lax.rem(j, STAGES)
            plgpu.barrier_wait(k_in.at[slot])
            plgpu.barrier_wait(v_in.at[slot])
            s, dp = products([(q.at[wg], k.at[slot], NT), (do.at[wg], v.at[slot], NT)], interpret)
            plgpu.barrier_arrive(v_free.at[slot])
            valid, *sides = walk.sides(full, facts.at[slot], own.at[wg], j, shape)
            ok = visible(opt, shape, valid, *sides)
            lse, delta = (spread(x, shape, 0, interpret) for x in sums_here)
            _, ds, _, _ = pair_gradient(p, opt, s, dp, ok, lse, delta, sides, {}, {})
            (total,) = products([(ds.astype(k.dtype), k.at[slot], NN)], interpret, [total])
            plgpu.barrier_arrive(k_free.at[slot])
            return total

        dq = walk.fold(step, settle(jnp.zeros((ROWS, k.shape[2]), jnp.float32), interpret))
        q[wg] = dq.astype(q.dtype)  # over the group's rows of q, done with by now
        plgpu.commit_smem()
        start = r.start("dq", walk.b, walk.h, walk.tile) + walk.first + wg * ROWS
        plgpu.copy_smem_to_gmem(q.at[wg], r["dq"].at[pl.ds(start, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == groups)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        walk.copy([(k_in, k_free, walk.load_keys("k", k, facts)), (v_in, v_free, walk.load_keys("v", v))])


# ------------------------------------------------------------------------------------------- units against their tiles


def key_gradient(p: Plan, opt, groups, part, interpret, shapes, *refs, k, v, q, do, sums, own, facts, own_in, q_in, do_in,
                 q_free, do_free):  # fmt: skip
    r = Flat(p, shapes, refs)
    wg, shape = lax.axis_index("wg"), (ROWS, part)
    i, g, b = (lax.axis_index(x) for x in ("x", "heads", "batch"))
    cut = p.unit_rows // (groups * ROWS)
    unit, first = lax.div(i, cut), lax.rem(i, cut) * (groups * ROWS)
    pieces, blocks = p.rows // part, p.blocks // p.g

    def over_blocks(body, carry):
        """Fold ``body(needs no mask, step, h, entry, first row, carry)`` over the row blocks that list the unit; returns the
        number of steps too."""

        def block(piece, carry):
            h = g * blocks + piece
            row = r.start("offsets", b, h, 0)
            low, middle, high = (r["offsets"][row, unit + x] for x in (0, p.units + 1, 1))
            done, carry = carry

            def step(full, j, carry):
                return body(full, done + j, h, low + lax.div(j, pieces), lax.rem(j, pieces) * part, carry)

            steps, first = (high - low) * pieces, 0
            if p.full:
                first = (middle - low) * pieces
                carry = lax.fori_loop(0, first, functools.partial(step, True), carry)
            return done + steps, lax.fori_loop(first, steps, functools.partial(step, False), carry)

        return lax.fori_loop(0, blocks, block, (jnp.int32(0), carry))

    def listed(h, e, what: int):
        row = r.start("chunks", b, h, lax.div(e, CHUNK))
        return r["chunks"][row + what, lax.rem(e, CHUNK)]

    @pl.when(wg < groups)
    def _():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        mine = first + wg * ROWS
        own_here = lambda f: own.at[wg, f]  # noqa: E731
        for x, held in (("k", k), ("v", v)):
            start = r.start(x, b, g * blocks, unit) + mine
            plgpu.copy_gmem_to_smem(r[x].at[pl.ds(start, ROWS)], held.at[wg], own_in.at[wg])
        r.load_facts("key_int", b, g * blocks, unit, mine, ROWS, own_here, own_in.at[wg])
        plgpu.barrier_wait(own_in.at[wg])
        mine_valid = own[wg, 0]

        def body(full, j, h, e, start, carry):
            slot = lax.rem(j, STAGES)
            plgpu.barrier_wait(q_in.at[slot])
            plgpu.barrier_wait(do_in.at[slot])
            s, dp = products([(k.at[wg], q.at[slot], NT), (v.at[wg], do.at[slot], NT)], interpret)  # keys by queries
            valid = None
            if not full:
                valid = mine_valid
                if p.bounded:
                    valid = valid * inside(*(listed(h, e, x) - mine for x in (1, 2)), valid.shape, 0)
                valid = spread(valid, shape, 0, interpret)
            row_int = {x: spread(facts[slot, f], shape, 1, interpret) for f, x in enumerate(p.query_fields)}
            key_int = {x: spread(own[wg, 1 + f], shape, 0, interpret) for f, x in enumerate(p.query_fields)}
            ok = visible(opt, shape, valid, row_int, key_int)
            lse, delta = (spread(sums[slot, x], shape, 1, interpret) for x in (0, 1))
            prob, ds, _, _ = pair_gradient(p, opt, s, dp, ok, lse, delta, (row_int, key_int), {}, {})
            terms = [(ds.astype(q.dtype), q.at[slot], NN), (prob.astype(do.dtype), do.at[slot], NN)]
            found = products(terms, interpret, carry)
            plgpu.barrier_arrive(q_free.at[slot])
            plgpu.barrier_arrive(do_free.at[slot])
            return found

        init = [settle(jnp.zeros((ROWS, x.shape[2]), jnp.float32), interpret) for x in (k, v)]
        _, found = over_blocks(body, init)
        for name, held, x in zip(("dk", "dv"), (k, v), found, strict=True):
            held[wg] = x.astype(held.dtype)
            plgpu.commit_smem()
            start = r.start(name, b, g * blocks, unit) + mine
            plgpu.copy_smem_to_gmem(held.at[wg], r[name].at[pl.ds(start, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == groups)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")

        def load_q(slot, ready, h, e, start):
            tile = listed(h, e, 0)
            r.load_rows(["q"], b, h, tile, start, part, {"q": q.at[slot]}, ready)
            for name, held in [("sums", sums)] + [("row_int", facts)] * bool(p.query_fields):
                here = lambda f, held=held: held.at[slot, f]  # noqa: E731
                r.load_facts(name, b, h, tile, start, part, here, ready)

        def load_do(slot, ready, h, e, start):
            r.load_rows(["do"], b, h, listed(h, e, 0), start, part, {"do": do.at[slot]}, ready)

        def walk(body):
            def step(_, j, h, e, start, carry):
                body(j, h, e, start)

            return over_blocks(step, None)[0]

        copy_ahead(walk, [(q_in, q_free, load_q), (do_in, do_free, load_do)])
