"""Block-list attention on GPU: three Triton kernels (forward, queries' gradient, keys' gradient).

One program owns some rows of one row block and walks its list, a part of a unit at a time; the keys' gradient walks the
transposed lists of one part of a unit, over every row block of its kv head. Every array is a power of two on each side.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.flash import layout
from pallas_kernels.flash.body import Body, run
from pallas_kernels.flash.layout import CHUNK, Plan, ceil_to
from pallas_kernels.flash.pairs import NN, NT, at, dot, inside, logits_of, pair_gradient, visible

# (query rows, keys) that a program holds at a time, by (heads wider than 128, float32): no register is spilled at these
# sizes on Hopper, and bfloat16 products fill a warp group's tensor cores. float32 products run on the plain cores.
FORWARD = {(0, 0): (128, 64), (1, 0): (64, 32), (0, 1): (32, 32), (1, 1): (32, 32)}
QUERIES = {(0, 0): (64, 64), (1, 0): (64, 32), (0, 1): (32, 32), (1, 1): (32, 16)}
KEYS = {(0, 0): (64, 64), (1, 0): (32, 64), (0, 1): (32, 32), (1, 1): (16, 32)}
MOST = 128, 64  # of all of these


def power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _kind(p: Plan) -> tuple[int, int]:
    return int(max(p.d_pad, p.dv_pad) > 128), int(p.float32)


def sizes(p: Plan, table: dict) -> tuple[int, int]:
    rows, keys = table[_kind(p)]
    return min(rows, power(p.rows)), min(keys, power(p.unit_rows))


def _plan(o: dict, opt) -> Plan:
    def whole(most):
        return lambda n: ceil_to(n, min(most, power(n)))

    rows, keys = (whole(most) for most in MOST)
    return layout.plan(o, opt, rows=MOST[0], keys=1, pad_rows=rows, pad_unit=keys, pad_lanes=keys, pad_width=power)


def _facts(names, ref, place, start, size: int, axis: int):
    """{name: fact} of ``size`` rows or keys that run along ``axis``."""
    shape = (size, 1) if axis == 0 else (1, size)
    return {x: ref[*place, i, pl.ds(start, size)].reshape(shape) for i, x in enumerate(names)}


def row_sides(p: Plan, r: dict, b, h, tile, start, size: int, axis: int):
    """(int, float) facts of some rows of a row block."""
    sides = []
    for name, facts in (("row_int", p.query_fields), ("row", p.row)):
        sides.append(_facts(facts, r[name], (*at(p, r[name], b, h), tile), start, size, axis) if facts else {})
    return sides


def key_sides(p: Plan, r: dict, b, h, unit, start, size: int, axis: int):
    """(ints, floats, valid) of some keys of a unit."""
    place = (*at(p, r["key_int"], b, h), unit)
    ints = _facts(("+valid", *p.query_fields), r["key_int"], place, start, size, axis)
    valid = ints.pop("+valid")
    floats = {}
    if p.key_floats:
        floats = _facts(p.key_floats, r["key"], (*at(p, r["key"], b, h), unit), start, size, axis)
    return ints, floats, valid


def over_units(p: Plan, r: dict, b, h, tile, size: int, body, carry):
    """Fold ``body(k, v, (key ints, floats, valid), carry)`` over the parts of the units in a list."""
    lists = r["lists"]
    place = (*at(p, lists, b, h), tile, 0)
    length = layout.list_length(p, lists)
    parts = p.unit_rows // size

    def step(j, carry):
        entry = lax.div(j, parts)
        start = lax.rem(j, parts) * size
        unit = lists[*place, 1 + entry]
        k, v = (r[x][*at(p, r[x], b, h), unit, pl.ds(start, size), :] for x in ("k", "v"))
        ints, floats, valid = key_sides(p, r, b, h, unit, start, size, 1)
        if p.bounded:
            lo, hi = (lists[*place, 1 + i * length + entry] - start for i in (1, 2))
            valid = valid * inside(lo, hi, valid.shape, 1)
        return body(k, v, (ints, floats, valid), carry)

    return lax.fori_loop(0, lists[*place, 0] * parts, step, carry)


def over_rows(p: Plan, r: dict, b, h, unit, start, size: int, body, carry):
    """Fold ``body(tile, first, limits, carry)`` over the row blocks that list ``unit``, ``size`` rows from ``first`` on at
    a time; ``limits``: (start, stop) of the unit's live range, counted from its key ``start``, or None."""
    chunks, offsets = (r[x] for x in ("chunks", "offsets"))
    place, here = at(p, offsets, b, h), at(p, chunks, b, h)
    pieces = p.rows // size

    def step(j, carry):
        e = lax.div(j, pieces)
        held = (*here, lax.div(e, CHUNK))
        tile = chunks[*held, 0, lax.rem(e, CHUNK)]
        limits = None
        if p.bounded:
            limits = tuple(chunks[*held, i, lax.rem(e, CHUNK)] - start for i in (1, 2))
        return body(tile, lax.rem(j, pieces) * size, limits, carry)

    first, last = (offsets[*place, 0, 0, unit + i] * pieces for i in (0, 1))
    return lax.fori_loop(first, last, step, carry)


def program_rows(p: Plan, size: int):
    """(batch, row block, tile, first row) of this program; the grid is (tiles x parts of a block, row blocks, batch)."""
    parts = p.rows // size
    i = pl.program_id(0)
    return pl.program_id(2), pl.program_id(1), lax.div(i, parts), lax.rem(i, parts) * size


def _forward_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = sizes(p, FORWARD)
    b, h, tile, start = program_rows(p, size)
    rows = pl.ds(start, size)
    q = r["q"][b, h, tile, rows, :]
    row_int, row = row_sides(p, r, b, h, tile, start, size, 0)

    def body(k, v, sides, carry):
        top, mass, total = carry
        key_int, key, valid = sides
        s = dot(q, k, NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        s = logits_of(p, opt, row_int, key_int)(s, row, key)
        if opt.normalizer == "none":
            return top, mass, total + dot(jnp.where(ok, s, 0.0).astype(v.dtype), v, NN)
        s = jnp.where(ok, s, -jnp.inf)
        new = jnp.maximum(top, s.max(-1))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        e = jnp.exp(s - safe[:, None])
        shrink = jnp.exp(top - safe)
        return new, mass * shrink + e.sum(-1), total * shrink[:, None] + dot(e.astype(v.dtype), v, NN)

    init = jnp.full((size,), -jnp.inf), jnp.zeros((size,)), jnp.zeros((size, p.dv_pad))
    init = jax.tree.map(lambda x: x.astype(jnp.float32), init)
    top, mass, total = over_units(p, r, b, h, tile, keys, body, init)
    if opt.normalizer == "none":
        lse = jnp.zeros_like(mass)
    else:
        seen = mass > 0
        safe = jnp.where(seen, mass, 1.0)
        total = total / safe[:, None]
        lse = jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(safe), -jnp.inf)
    r["out"][b, h, tile, rows, :] = total.astype(r["out"].dtype)
    r["lse"][b, h, tile, 0, rows] = lse


def _query_gradient_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = sizes(p, QUERIES)
    b, h, tile, start = program_rows(p, size)
    rows = pl.ds(start, size)
    q, do = r["q"][b, h, tile, rows, :], r["do"][b, h, tile, rows, :]
    lse, delta = (r["sums"][b, h, tile, i, rows][:, None] for i in (0, 1))
    row_int, row = row_sides(p, r, b, h, tile, start, size, 0)

    def body(k, v, sides, carry):
        dq, d_row = carry
        key_int, key, valid = sides
        s, dp = dot(q, k, NT), dot(do, v, NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        _, ds, more, _ = pair_gradient(p, opt, s, dp, ok, lse, delta, (row_int, key_int), row, key)
        return dq + dot(ds.astype(k.dtype), k, NN), jax.tree.map(jnp.add, d_row, more)

    init = jnp.zeros((size, p.d_pad), jnp.float32), {x: jnp.zeros((size, 1), jnp.float32) for x in p.row}
    dq, d_row = over_units(p, r, b, h, tile, keys, body, init)
    r["dq"][b, h, tile, rows, :] = dq.astype(r["dq"].dtype)
    for i, x in enumerate(p.row):
        r["d_row"][b, h, tile, i, rows] = d_row[x].reshape(size)


def _key_gradient_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = sizes(p, KEYS)
    cut = p.unit_rows // keys
    b, g, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    unit, start = lax.div(i, cut), lax.rem(i, cut) * keys
    k, v = (r[x][b, g, unit, pl.ds(start, keys), :] for x in ("k", "v"))
    blocks = p.blocks // p.g

    def over_block(part, carry):
        h = g * blocks + part
        key_int, key, valid = key_sides(p, r, b, h, unit, start, keys, 0)

        def body(tile, first, limits, carry):
            dk, dv, d_key = carry
            rows = pl.ds(first, size)
            q, do = r["q"][b, h, tile, rows, :], r["do"][b, h, tile, rows, :]
            lse, delta = (r["sums"][b, h, tile, i, rows][None, :] for i in (0, 1))
            row_int, row = row_sides(p, r, b, h, tile, first, size, 1)
            live = valid * inside(*limits, valid.shape, 0) if p.bounded else valid
            s, dp = dot(k, q, NT), dot(v, do, NT)  # keys by queries
            ok = visible(opt, s.shape, live, row_int, key_int)
            prob, ds, _, more = pair_gradient(p, opt, s, dp, ok, lse, delta, (row_int, key_int), row, key)
            dv = dv + dot(prob.astype(do.dtype), do, NN)
            return dk + dot(ds.astype(q.dtype), q, NN), dv, jax.tree.map(jnp.add, d_key, more)

        d_key = {x: jnp.zeros((keys, 1), jnp.float32) for x in p.key_floats}
        dk, dv, d_key = over_rows(p, r, b, h, unit, start, size, body, (*carry, d_key))
        for i, x in enumerate(p.key_floats):
            r["d_key"][b, h, unit, i, pl.ds(start, keys)] = d_key[x].reshape(keys)
        return dk, dv

    init = jnp.zeros((keys, p.d_pad), jnp.float32), jnp.zeros((keys, p.dv_pad), jnp.float32)
    dk, dv = lax.fori_loop(0, blocks, over_block, init)
    r["dk"][b, g, unit, pl.ds(start, keys), :] = dk.astype(r["dk"].dtype)
    r["dv"][b, g, unit, pl.ds(start, keys), :] = dv.astype(r["dv"].dtype)


# -------------------------------------------------------------------------------------------------------------- calls


def _call(p: Plan, opt, kernel, operands: dict, outs: dict, grid, name: str, interpret):
    warps = 8 if max(p.d_pad, p.dv_pad) > 128 or p.rows > 64 else 4
    found = pl.pallas_call(
        functools.partial(kernel, p, opt, (*operands, *outs)),
        grid=grid,
        out_shape=list(outs.values()),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=2),
        name=name,
        interpret=interpret,
    )(*operands.values())
    return dict(zip(outs, found, strict=True))


def _shape(dtype, *size):
    return jax.ShapeDtypeStruct(size, dtype)


def _forward(p: Plan, opt, rows: dict, keys: dict, interpret):
    block = (p.b, p.blocks, p.tiles)
    outs = {"out": _shape(keys["v"].dtype, *block, p.rows, p.dv_pad), "lse": _shape(jnp.float32, *block, 1, p.rows)}
    grid = (p.tiles * (p.rows // sizes(p, FORWARD)[0]), p.blocks, p.b)
    return _call(p, opt, _forward_kernel, rows | keys, outs, grid, "flash_forward", interpret)


def _query_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    block = (p.b, p.blocks, p.tiles)
    outs = {"dq": _shape(rows["q"].dtype, *block, p.rows, p.d_pad)}
    if p.row:
        outs["d_row"] = _shape(jnp.float32, *block, len(p.row), p.rows)
    grid = (p.tiles * (p.rows // sizes(p, QUERIES)[0]), p.blocks, p.b)
    return _call(p, opt, _query_gradient_kernel, rows | keys, outs, grid, "flash_query_gradient", interpret)


def _key_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    chunks, offsets = layout.transpose_lists(p, rows["lists"])
    operands = {x: a for x, a in rows.items() if x != "lists"} | keys | {"chunks": chunks, "offsets": offsets}
    unit = (p.b, p.g, p.units, p.unit_rows)
    outs = {"dk": _shape(keys["k"].dtype, *unit, p.d_pad), "dv": _shape(keys["v"].dtype, *unit, p.dv_pad)}
    if p.key_floats:
        outs["d_key"] = _shape(jnp.float32, p.b, p.blocks, p.units, len(p.key_floats), p.unit_lanes)
    grid = (p.units * (p.unit_rows // sizes(p, KEYS)[1]), p.g, p.b)
    return _call(p, opt, _key_gradient_kernel, operands, outs, grid, "flash_key_gradient", interpret)


BODY = Body("gpu", _plan, _forward, _query_gradient, _key_gradient)


def flash(o: dict, opt, interpret=False):
    """``interpret``: run the kernels on a CPU."""
    return run(BODY, o, opt, interpret)
