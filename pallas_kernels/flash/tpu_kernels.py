"""The Mosaic TPU kernels: forward, queries' gradient, keys' gradient, over block lists.

Keys stay in HBM; each grid step owns one block of query rows and copies the units of its list into VMEM, two steps of
the loop in flight. The list comes with the grid step as a block of scalar memory, so no table is ever whole there. The
keys' gradient walks the transposed lists, read from HBM a chunk at a time, with keys on the sublanes: every product is
then one the MXU takes without a transposition. k and v come as they are: what no row may read (invalid keys, NaN) is
zeroed in VMEM, in the units that hold such keys.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import layout
from pallas_kernels.flash.layout import CHUNK, LANES, Plan, words
from pallas_kernels.flash.pairs import NN, NT, at, dot, inside, kept, logits_of, pair_gradient, visible, weight_of


def as_column(x):
    """[1, n] -> [n, 1]; n a multiple of the lanes."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T[:, :1]


def as_row(x):
    """[n, 1] -> [1, n]."""
    return jnp.broadcast_to(x, (x.shape[0], LANES)).T[:1]


def _facts(names, ref, turn):
    return {name: turn(ref[i : i + 1, :]) for i, name in enumerate(names)}


# --------------------------------------------------------------------------------------- loops over a list of units


def key_buffers(p: Plan, arrays: dict):
    """Double buffers for ``step`` units of each key array in HBM."""
    names = [x for x in ("k", "v", "key_int", "key", "table") if x in arrays]
    shapes = {x: pltpu.VMEM((2, p.step, *arrays[x].shape[4 if x == "table" else 3 :]), arrays[x].dtype) for x in names}
    return names, [shapes[x] for x in names] + [pltpu.SemaphoreType.DMA((2,))]


def source(p: Plan, r: dict, name: str, b, h, tile, unit):
    """Where in HBM the array called ``name`` holds a unit, or its pair with a query tile."""
    place = at(p, r[name], b, h)
    if name in ("k", "v"):  # entries that are not in use name a unit that only facts have
        unit = jnp.minimum(unit, p.units - 1)
    return r[name].at[*place, tile, unit] if name == "table" or _by_head(p, name) else r[name].at[*place, unit]


def clean(x, state):
    """Rows of ``x`` with zeros where ``state`` [rows, 1] is not 1; by float32, for which every chip selects."""
    return jnp.where(state == 1, x.astype(jnp.float32), 0.0).astype(x.dtype)


def clean_fetched(p: Plan, got: dict):
    """Zero what must not be read of the fetched units, if there is any."""
    state = got["key_int"][:, 0:1, :]
    counts = lax.broadcasted_iota(jnp.int32, state.shape, 2) < p.unit
    odd = jnp.max(jnp.where(counts & (state != 1), 1.0, 0.0)) > 0

    @pl.when(odd)
    def _():
        def unit(c, _):
            fine = as_column(got["key_int"][c][0:1])[: p.unit_rows]
            for x in ("k", "v"):
                if x in got:
                    got[x][c] = clean(got[x][c], fine)
            return 0

        lax.fori_loop(0, p.step, unit, 0)


def rows_in(ref):
    """The rows of a block, heads apart or not, as one matrix."""
    x = ref[...]
    return x.reshape(-1, x.shape[-1])


def put_rows(ref, x):
    ref[...] = x.reshape(ref.shape).astype(ref.dtype)


def over_units(p: Plan, r: dict, names, b, h, body, *, split: bool = False):
    """Run ``body(entry, fetched)`` for each step of the list in ``r["lists"]``; ``fetched`` maps names to
    ``[step, ...]`` views of the units. ``split``: the body is told by a third argument which steps need no mask."""
    steps = lax.div(r["lists"][0, 0] + p.step - 1, p.step)
    whole = lax.div(r["lists"][0, r["lists"].shape[1] - 1], p.step)
    tile = pl.program_id(2)

    def copies(j, slot, real: bool):
        for c in range(p.step):
            unit = r["lists"][0, 1 + j * p.step + c] if real else 0
            for name in names:
                held = source(p, r, name, b, h, tile, unit)
                yield pltpu.make_async_copy(held, r["+" + name].at[slot, c], r["sem"].at[slot])

    def start(j, slot):
        for copy in copies(j, slot, True):
            copy.start()

    @pl.when(steps > 0)
    def _():
        start(0, 0)

    def step(j, _):
        slot = lax.rem(j, 2)

        @pl.when(j + 1 < steps)
        def _():
            start(j + 1, 1 - slot)

        for copy in copies(j, slot, False):
            copy.wait()
        got = {name: r["+" + name].at[slot] for name in names}

        def masked():
            clean_fetched(p, got)
            body(j * p.step, got, *((False,) if split else ()))

        if split and p.full:
            pl.when(j < whole)(lambda: body(j * p.step, got, True))
            pl.when(j >= whole)(masked)
        else:
            masked()
        return 0

    lax.fori_loop(0, steps, step, 0)


def _together(p: Plan, ref, i: int):
    """Fact ``i`` of the fetched units as one row [1, step * unit_rows]."""
    return jnp.concatenate([ref[c, i : i + 1, : p.unit_rows] for c in range(p.step)], -1)


def fetched_keys(p: Plan, r: dict, entry, got: dict, full: bool = False):
    """(key floats, key ints, valid) of the fetched units, as rows; of units that need no mask, ``valid`` is None."""
    lists, length = r["lists"], layout.list_length(p, r["lists"])
    key_int = {x: _together(p, got["key_int"], 1 + i) for i, x in enumerate(p.query_fields)}
    key = {x: _together(p, got["key"], i) for i, x in enumerate(p.key_floats)}
    shape = (1, p.unit_rows)
    if p.weighted:
        first = 1 + (words(p) - 1) * length + entry
        weights = [jnp.broadcast_to(weight_of(lists[0, first + c]), shape) for c in range(p.step)]
        key["+weight"] = jnp.concatenate(weights, -1)
    if p.tabled:
        tables = [got["table"][c, :, : p.unit_rows].astype(jnp.float32) for c in range(p.step)]
        key["+table"] = jnp.concatenate(tables, -1)
    if full:
        return key, key_int, None
    valid = _together(p, got["key_int"], 0)
    if p.bounded:
        low, high = (1 + i * length + entry for i in (1, 2))
        live = [inside(lists[0, low + c], lists[0, high + c], shape, 1) for c in range(p.step)]
        valid = valid * jnp.concatenate(live, -1)
    return key, key_int, valid


def merged(p: Plan, ref):
    """Rows of the fetched units [step, unit_rows, width] as one matrix."""
    x = ref[...]
    return x.reshape(p.step * p.unit_rows, x.shape[-1])


def row_sides(p: Plan, r: dict, turn):
    row_int = _facts(p.query_fields, r["row_int"], turn) if p.query_fields else {}
    return row_int, _facts(p.row, r["row"], turn) if p.row else {}


# ------------------------------------------------------------------------------------------------------------ kernels


def forward_kernel(p: Plan, opt, names, keys, *refs):
    r = dict(zip(names, refs, strict=True))
    b, h = pl.program_id(0), pl.program_id(1)
    row_int, row = row_sides(p, r, as_column)
    r["top"][...] = jnp.full_like(r["top"], -jnp.inf)
    r["mass"][...] = jnp.zeros_like(r["mass"])
    r["total"][...] = jnp.zeros_like(r["total"])

    def body(entry, got, full):
        key, key_int, valid = fetched_keys(p, r, entry, got, full)
        s = dot(rows_in(r["q"]), merged(p, got["k"]), NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        s = logits_of(p, opt, row_int, key_int)(s, row, key)
        v = merged(p, got["v"])
        if opt.normalizer == "none":
            r["total"][...] += dot(kept(s, ok, valid, 0.0).astype(v.dtype), v, NN)
            return
        s = kept(s, ok, valid, -jnp.inf)
        top = r["top"][:, :1]
        new = jnp.maximum(top, s.max(-1, keepdims=True))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        e = jnp.exp(s - safe)
        shrink = jnp.exp(top - safe)
        wide = r["top"].shape
        r["mass"][...] = r["mass"][...] * shrink + jnp.broadcast_to(e.sum(-1, keepdims=True), wide)
        r["top"][...] = jnp.broadcast_to(new, wide)
        r["total"][...] = r["total"][...] * shrink + dot(e.astype(v.dtype), v, NN)

    over_units(p, r, keys, b, h, body, split=True)
    if opt.normalizer == "none":
        put_rows(r["out"], r["total"][...])
        r["lse"][...] = jnp.zeros_like(r["lse"])
        return
    top, mass = r["top"][:, :1], r["mass"][:, :1]
    seen = mass != 0
    safe = jnp.where(seen, mass, 1.0)
    put_rows(r["out"], r["total"][...] / safe)
    r["lse"][...] = as_row(jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(safe), -jnp.inf))


def query_gradient_kernel(p: Plan, opt, names, keys, *refs):
    r = dict(zip(names, refs, strict=True))
    b, h = pl.program_id(0), pl.program_id(1)
    sides, row = row_sides(p, r, as_column)
    lse, delta = as_column(r["sums"][0:1, :]), as_column(r["sums"][1:2, :])
    r["d_total"][...] = jnp.zeros_like(r["d_total"])
    if p.row:
        r["row_total"][...] = jnp.zeros_like(r["row_total"])
    if p.weighted:
        r["d_weight"][...] = jnp.zeros_like(r["d_weight"])

    def body(entry, got, full):
        key, key_int, valid = fetched_keys(p, r, entry, got, full)
        k = merged(p, got["k"])
        s, dp = dot(rows_in(r["q"]), k, NT), dot(rows_in(r["do"]), merged(p, got["v"]), NT)
        ok = visible(opt, s.shape, valid, sides, key_int)
        _, ds, d_row, d_key = pair_gradient(p, opt, s, dp, ok, lse, delta, (sides, key_int), row, key)
        r["d_total"][...] += dot(ds.astype(k.dtype), k, NN)
        for i, x in enumerate(p.row):
            r["row_total"][i] += jnp.broadcast_to(d_row[x], (p.rows, LANES))
        if p.weighted:
            slots = lax.broadcasted_iota(jnp.int32, r["d_weight"].shape, 1)
            for c in range(p.step):
                one = d_key["+weight"][:, c * p.unit_rows : (c + 1) * p.unit_rows].sum(1, keepdims=True)
                r["d_weight"][...] += jnp.where(slots == entry + c, jnp.broadcast_to(one, slots.shape), 0.0)

    over_units(p, r, keys, b, h, body, split=True)
    put_rows(r["dq"], r["d_total"][...])
    for i in range(len(p.row)):
        r["d_row"][i : i + 1, :] = r["row_total"][i].T[:1]


def _by_head(p: Plan, name: str) -> bool:
    return p.by_head and name in ("q", "do")


def row_buffers(p: Plan, arrays: dict, chunks) -> dict:
    """Double buffers for a row block of each array in HBM, and for a chunk of the transposed lists."""

    def block(name: str, a):
        if _by_head(p, name):
            return p.pack, *a.shape[4:]
        return a.shape[4 if name == "table" else 3 :]

    buffers = {"+" + x: pltpu.VMEM((2, *block(x, a)), a.dtype) for x, a in arrays.items()}
    buffers |= {"+chunks": pltpu.SMEM((2, *chunks.shape[3:]), jnp.int32)}
    return buffers | {"sem": pltpu.SemaphoreType.DMA((2,)), "chunk_sem": pltpu.SemaphoreType.DMA}


def table_gradient_kernel(p: Plan, opt, names, keys, *refs):
    r = dict(zip(names, refs, strict=True))
    b, h = pl.program_id(0), pl.program_id(1)
    sides, row = row_sides(p, r, as_column)
    lse, delta = as_column(r["sums"][0:1, :]), as_column(r["sums"][1:2, :])
    held = r["pair"]
    held[...] = jnp.zeros_like(held)

    def body(entry, got, full):
        key, key_int, valid = fetched_keys(p, r, entry, got, full)
        s, dp = dot(rows_in(r["q"]), merged(p, got["k"]), NT), dot(rows_in(r["do"]), merged(p, got["v"]), NT)
        ok = visible(opt, s.shape, valid, sides, key_int)
        found = pair_gradient(p, opt, s, dp, ok, lse, delta, (sides, key_int), row, key)[3]["+table"]
        for c in range(p.step):
            held[:, : p.unit_rows] = found[:, c * p.unit_rows : (c + 1) * p.unit_rows]
            unit = r["lists"][0, 1 + entry + c]
            copy = pltpu.make_async_copy(held, r["d_table"].at[b, h, pl.program_id(2), unit], r["pair_sem"])
            copy.start()
            copy.wait()

    over_units(p, r, keys, b, h, body, split=True)


def over_row_blocks(p: Plan, r: dict, streamed, b, h, u, body, *, split: bool = False):
    """Run ``body(limits, fetched)`` for each row block that lists unit ``u``: ``limits`` is the (start, stop) of its live
    range or None, ``fetched`` maps the ``streamed`` names to views of the block. ``split``: the body gets two more
    arguments, whether the pair needs no mask, and the weight of the entry or None."""
    first, last = r["offsets"][0, u], r["offsets"][0, u + 1]
    middle = r["offsets"][0, p.units + 1 + u]

    def chunk(e):
        return lax.rem(lax.div(e, CHUNK), 2), lax.rem(e, CHUNK)

    def copies(slot, tile):
        for name in streamed:
            held = source(p, r, name, b, h, slice(None) if _by_head(p, name) else tile, u if name == "table" else tile)
            yield pltpu.make_async_copy(held, r["+" + name].at[slot], r["sem"].at[slot])

    def start(e, slot):
        side, place = chunk(e)
        lists = r["chunks"]

        @pl.when((e == first) | (place == 0))
        def _():
            held = lists.at[*at(p, lists, b, h), lax.div(e, CHUNK)]
            copy = pltpu.make_async_copy(held, r["+chunks"].at[side], r["chunk_sem"])
            copy.start()
            copy.wait()

        for copy in copies(slot, r["+chunks"][side, 0, place]):
            copy.start()

    @pl.when(last > first)
    def _():
        start(first, 0)

    def step(e, _):
        slot = lax.rem(e - first, 2)

        @pl.when(e + 1 < last)
        def _():
            start(e + 1, 1 - slot)

        for copy in copies(slot, 0):
            copy.wait()
        side, place = chunk(e)
        held = r["+chunks"]
        limits = (held[side, 1, place], held[side, 2, place]) if p.bounded else None
        got = {name: r["+" + name].at[slot] for name in streamed}
        if not split:
            body(limits, got)
            return 0
        weight = weight_of(held[side, words(p) - 1, place]) if p.weighted else None
        if p.full:
            pl.when(e < middle)(lambda: body(limits, got, True, weight))
            pl.when(e >= middle)(lambda: body(limits, got, False, weight))
        else:
            body(limits, got, False, weight)
        return 0

    lax.fori_loop(first, last, step, 0)


def key_sides(p: Plan, r: dict):
    """(ints, floats, valid) of a unit, keys on the sublanes."""
    turn = lambda x: as_column(x)[: p.unit_rows]  # noqa: E731
    key_int = _facts(("+valid", *p.query_fields), r["key_int"], turn)
    valid = key_int.pop("+valid")
    return key_int, _facts(p.key_floats, r["key"], turn) if p.key_floats else {}, valid


def key_gradient_kernel(p: Plan, opt, names, streamed, *refs):
    r = dict(zip(names, refs, strict=True))
    b, g, u, part = (pl.program_id(i) for i in range(4))
    parts = p.blocks // p.g
    h = g * parts + part
    key_int, key, valid = key_sides(p, r)

    @pl.when(part == 0)
    def _():
        r["dk_total"][...] = jnp.zeros_like(r["dk_total"])
        r["dv_total"][...] = jnp.zeros_like(r["dv_total"])

    for x in ("k", "v"):
        r["clean_" + x][...] = clean(r[x][...], valid)
    if p.key_floats:
        r["key_total"][...] = jnp.zeros_like(r["key_total"])

    def body(limits, got, full, weight):
        row_int, row = row_sides(p, got, lambda x: x)
        lse, delta = got["sums"][0:1, :], got["sums"][1:2, :]
        q, do = rows_in(got["q"]), rows_in(got["do"])
        s, dp = dot(r["clean_k"][...], q, NT), dot(r["clean_v"][...], do, NT)  # keys by queries
        live = valid * inside(*limits, (p.unit_rows, 1), 0) if p.bounded else valid
        ok = visible(opt, s.shape, None if full else live, row_int, key_int)
        added = {"+weight": jnp.broadcast_to(weight, (1, q.shape[0]))} if p.weighted else {}
        if p.tabled:
            added["+table"] = got["table"][...].astype(jnp.float32).T[: p.unit_rows]
        prob, ds, _, d_key = pair_gradient(p, opt, s, dp, ok, lse, delta, (row_int, key_int), row, key | added)
        r["dv_total"][...] += dot(prob.astype(do.dtype), do, NN)
        r["dk_total"][...] += dot(ds.astype(q.dtype), q, NN)
        for i, x in enumerate(p.key_floats):
            r["key_total"][i, : p.unit_rows] += jnp.broadcast_to(d_key[x], (p.unit_rows, LANES))

    over_row_blocks(p, r, streamed, b, h, u, body, split=True)

    @pl.when(part == parts - 1)
    def _():
        for x in ("dk", "dv"):  # what was read as zero has no gradient
            r[x][...] = clean(r[x + "_total"][...], valid).astype(r[x].dtype)

    for i in range(len(p.key_floats)):
        r["d_key"][i : i + 1, :] = r["key_total"][i].T[:1]
