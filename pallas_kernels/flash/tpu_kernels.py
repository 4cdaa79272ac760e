"""The Mosaic TPU kernels: forward, queries' gradient, keys' gradient, over block lists.

Keys stay in HBM; each grid step owns one block of query rows and copies the units of its list into VMEM, two steps of
the loop in flight. The list comes with the grid step as a block of scalar memory, so no table is ever whole there. The
keys' gradient walks the transposed lists, read from HBM a chunk at a time, with keys on the sublanes: every product is
then one the MXU takes without a transposition.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import layout
from pallas_kernels.flash.layout import CHUNK, LANES, Plan
from pallas_kernels.flash.pairs import NN, NT, at, dot, inside, logits_of, pair_gradient, visible


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
    names = [x for x in ("k", "v", "key_int", "key") if x in arrays]
    shapes = {x: pltpu.VMEM((2, p.step, *arrays[x].shape[3:]), arrays[x].dtype) for x in names}
    return names, [shapes[x] for x in names] + [pltpu.SemaphoreType.DMA((2,))]


def over_units(p: Plan, r: dict, names, b, h, body):
    """Run ``body(entry, fetched)`` for each step of the list in ``r["lists"]``; ``fetched`` maps names to
    ``[step, ...]`` views of the units."""
    steps = lax.div(r["lists"][0, 0] + p.step - 1, p.step)

    def copies(j, slot, real: bool):
        for c in range(p.step):
            unit = r["lists"][0, 1 + j * p.step + c] if real else 0
            for name in names:
                source = r[name].at[*at(p, r[name], b, h), unit]
                yield pltpu.make_async_copy(source, r["+" + name].at[slot, c], r["sem"].at[slot])

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
        body(j * p.step, {name: r["+" + name].at[slot] for name in names})
        return 0

    lax.fori_loop(0, steps, step, 0)


def _together(p: Plan, ref, i: int):
    """Fact ``i`` of the fetched units as one row [1, step * unit_rows]."""
    return jnp.concatenate([ref[c, i : i + 1, : p.unit_rows] for c in range(p.step)], -1)


def fetched_keys(p: Plan, r: dict, entry, got: dict):
    """(key floats, key ints, valid) of the fetched units, as rows."""
    key_int = {x: _together(p, got["key_int"], 1 + i) for i, x in enumerate(p.query_fields)}
    key = {x: _together(p, got["key"], i) for i, x in enumerate(p.key_floats)}
    valid = _together(p, got["key_int"], 0)
    if p.bounded:
        low, high = (1 + i * layout.list_length(p, r["lists"]) + entry for i in (1, 2))
        lists, shape = r["lists"], (1, p.unit_rows)
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

    def body(entry, got):
        key, key_int, valid = fetched_keys(p, r, entry, got)
        s = dot(r["q"][...], merged(p, got["k"]), NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        s = logits_of(p, opt, row_int, key_int)(s, row, key)
        v = merged(p, got["v"])
        if opt.normalizer == "none":
            r["total"][...] += dot(jnp.where(ok, s, 0.0).astype(v.dtype), v, NN)
            return
        s = jnp.where(ok, s, -jnp.inf)
        top = r["top"][:, :1]
        new = jnp.maximum(top, s.max(-1, keepdims=True))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        e = jnp.exp(s - safe)
        shrink = jnp.exp(top - safe)
        wide = r["top"].shape
        r["mass"][...] = r["mass"][...] * shrink + jnp.broadcast_to(e.sum(-1, keepdims=True), wide)
        r["top"][...] = jnp.broadcast_to(new, wide)
        r["total"][...] = r["total"][...] * shrink + dot(e.astype(v.dtype), v, NN)

    over_units(p, r, keys, b, h, body)
    if opt.normalizer == "none":
        r["out"][...] = r["total"][...].astype(r["out"].dtype)
        r["lse"][...] = jnp.zeros_like(r["lse"])
        return
    top, mass = r["top"][:, :1], r["mass"][:, :1]
    seen = mass > 0
    safe = jnp.where(seen, mass, 1.0)
    r["out"][...] = (r["total"][...] / safe).astype(r["out"].dtype)
    r["lse"][...] = as_row(jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(safe), -jnp.inf))


def query_gradient_kernel(p: Plan, opt, names, keys, *refs):
    r = dict(zip(names, refs, strict=True))
    b, h = pl.program_id(0), pl.program_id(1)
    sides, row = row_sides(p, r, as_column)
    lse, delta = as_column(r["sums"][0:1, :]), as_column(r["sums"][1:2, :])
    r["d_total"][...] = jnp.zeros_like(r["d_total"])
    if p.row:
        r["row_total"][...] = jnp.zeros_like(r["row_total"])

    def body(entry, got):
        key, key_int, valid = fetched_keys(p, r, entry, got)
        k = merged(p, got["k"])
        s, dp = dot(r["q"][...], k, NT), dot(r["do"][...], merged(p, got["v"]), NT)
        ok = visible(opt, s.shape, valid, sides, key_int)
        _, ds, d_row, _ = pair_gradient(p, opt, s, dp, ok, lse, delta, (sides, key_int), row, key)
        r["d_total"][...] += dot(ds.astype(k.dtype), k, NN)
        for i, x in enumerate(p.row):
            r["row_total"][i] += jnp.broadcast_to(d_row[x], (p.rows, LANES))

    over_units(p, r, keys, b, h, body)
    r["dq"][...] = r["d_total"][...].astype(r["dq"].dtype)
    for i in range(len(p.row)):
        r["d_row"][i : i + 1, :] = r["row_total"][i].T[:1]


def row_buffers(arrays: dict, chunks) -> dict:
    """Double buffers for a row block of each array in HBM, and for a chunk of the transposed lists."""
    buffers = {"+" + x: pltpu.VMEM((2, *a.shape[3:]), a.dtype) for x, a in arrays.items()}
    buffers |= {"+chunks": pltpu.SMEM((2, *chunks.shape[3:]), jnp.int32)}
    return buffers | {"sem": pltpu.SemaphoreType.DMA((2,)), "chunk_sem": pltpu.SemaphoreType.DMA}


def over_row_blocks(p: Plan, r: dict, streamed, b, h, u, body):
    """Run ``body(limits, fetched)`` for each row block that lists unit ``u``: ``limits`` is the (start, stop) of its live
    range or None, ``fetched`` maps the ``streamed`` names to views of the block."""
    first, last = r["offsets"][0, u], r["offsets"][0, u + 1]

    def chunk(e):
        return lax.rem(lax.div(e, CHUNK), 2), lax.rem(e, CHUNK)

    def copies(slot, tile):
        for name in streamed:
            source = r[name].at[*at(p, r[name], b, h), tile]
            yield pltpu.make_async_copy(source, r["+" + name].at[slot], r["sem"].at[slot])

    def start(e, slot):
        side, place = chunk(e)
        lists = r["chunks"]

        @pl.when((e == first) | (place == 0))
        def _():
            source = lists.at[*at(p, lists, b, h), lax.div(e, CHUNK)]
            copy = pltpu.make_async_copy(source, r["+chunks"].at[side], r["chunk_sem"])
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
        body(limits, {name: r["+" + name].at[slot] for name in streamed})
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

    if p.key_floats:
        r["key_total"][...] = jnp.zeros_like(r["key_total"])

    def body(limits, got):
        row_int, row = row_sides(p, got, lambda x: x)
        lse, delta = got["sums"][0:1, :], got["sums"][1:2, :]
        q, do = got["q"][...], got["do"][...]
        s, dp = dot(r["k"][...], q, NT), dot(r["v"][...], do, NT)  # keys by queries
        live = valid * inside(*limits, (p.unit_rows, 1), 0) if p.bounded else valid
        ok = visible(opt, s.shape, live, row_int, key_int)
        prob, ds, _, d_key = pair_gradient(p, opt, s, dp, ok, lse, delta, (row_int, key_int), row, key)
        r["dv_total"][...] += dot(prob.astype(do.dtype), do, NN)
        r["dk_total"][...] += dot(ds.astype(q.dtype), q, NN)
        for i, x in enumerate(p.key_floats):
            r["key_total"][i, : p.unit_rows] += jnp.broadcast_to(d_key[x], (p.unit_rows, LANES))

    over_row_blocks(p, r, streamed, b, h, u, body)

    @pl.when(part == parts - 1)
    def _():
        r["dk"][...] = r["dk_total"][...].astype(r["dk"].dtype)
        r["dv"][...] = r["dv_total"][...].astype(r["dv"].dtype)

    for i in range(len(p.key_floats)):
        r["d_key"][i : i + 1, :] = r["key_total"][i].T[:1]
