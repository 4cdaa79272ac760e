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

from pallas_kernels import _tuned
from pallas_kernels.flash import layout
from pallas_kernels.flash.body import Body, run
from pallas_kernels.flash.layout import CHUNK, Plan, ceil_to, words
from pallas_kernels.flash.pairs import NN, NT, at, dot, inside, kept, logits_of, pair_gradient, visible, weight_of

# (query rows, keys) that a program holds at a time, by (heads wider than 128, float32): no register is spilled at these
# sizes on Hopper, and bfloat16 products fill a warp group's tensor cores. float32 products run on the plain cores.
FORWARD = {(0, 0): (128, 64), (1, 0): (64, 32), (0, 1): (32, 16), (1, 1): (32, 16)}
QUERIES = {(0, 0): (64, 64), (1, 0): (64, 32), (0, 1): (32, 32), (1, 1): (32, 16)}
KEYS = {(0, 0): (64, 64), (1, 0): (32, 64), (0, 1): (32, 32), (1, 1): (16, 32)}
TABLES = {"forward": FORWARD, "queries": QUERIES, "keys": KEYS}
MOST = 128, 64  # of all of these


def power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _kind(p: Plan) -> tuple[int, int]:
    return int(max(p.d_pad, p.dv_pad) > 128), int(p.float32)


def sizes(p: Plan, table: dict) -> tuple[int, int]:
    return fit(p, *table[_kind(p)])


def fit(p: Plan, rows: int, keys: int) -> tuple[int, int]:
    """The sizes, or halves of them that divide a row block and a unit."""
    found = []
    for size, whole in ((rows, p.rows), (keys, p.unit_rows)):
        size = min(size, power(whole))
        while whole % size:
            size //= 2
        found.append(size)
    return tuple(found)


def tuned(p: Plan, kernel: str) -> dict[str, int]:
    """{rows, keys, warps, stages} of a kernel's programs."""
    rows, keys = TABLES[kernel][_kind(p)]
    if p.tabled and kernel == "keys":  # a turned tile of the table takes registers too
        rows = max(rows // 2, 16)
    default = {"rows": rows, "keys": keys, "warps": 8 if max(p.d_pad, p.dv_pad) > 128 or p.rows > 64 else 4, "stages": 2}
    dtype = jnp.float32 if p.float32 else jnp.bfloat16
    found = _tuned.sizes("flash", "gpu", f"{kernel} {_tuned.width(p.d_pad, p.dv_pad)}", dtype, default)
    rows, keys = fit(p, found["rows"], found["keys"])
    return found | {"rows": rows, "keys": keys}


def _held(p: Plan, kernel: str) -> tuple[int, int]:
    """(query rows, keys) that a program of the kernel holds at a time."""
    found = tuned(p, kernel)
    return found["rows"], found["keys"]


def plan(o: dict, opt, most: int = MOST[0]) -> Plan:
    """``most``: query rows that heads may share a block up to."""

    def whole(most):
        return lambda n: ceil_to(n, min(most, power(n)))

    rows, keys = (whole(most) for most in MOST)
    return layout.plan(o, opt, rows=most, keys=1, pad_rows=rows, pad_unit=keys, pad_lanes=keys, pad_width=power)


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


def over_units(p: Plan, r: dict, b, h, tile, size: int, body, carry, *, rows=None, split: bool = False):
    """Fold ``body(k, v, (key ints, floats, valid), carry)`` over the parts of the units in a list. ``split``: ``valid`` is
    None for units that need no mask, and the number of the part comes fourth. ``rows``: those of a table's tile."""
    lists = r["lists"]
    place = (*at(p, lists, b, h), tile, 0)
    length = layout.list_length(p, lists)
    parts = p.unit_rows // size

    def step(full: bool, j, carry):
        entry = lax.div(j, parts)
        start = lax.rem(j, parts) * size
        unit = lists[*place, 1 + entry]
        k, v = (r[x][*at(p, r[x], b, h), unit, pl.ds(start, size), :] if x in r else None for x in ("k", "v"))
        ints, floats, valid = key_sides(p, r, b, h, unit, start, size, 1)
        if p.weighted:
            floats["+weight"] = weight_of(lists[*place, 1 + (words(p) - 1) * length + entry])
        if p.tabled:
            floats["+table"] = _table(p, r, b, h, tile, unit, rows, pl.ds(start, size))
        if p.bounded and not full:
            lo, hi = (lists[*place, 1 + i * length + entry] - start for i in (1, 2))
            valid = valid * inside(lo, hi, valid.shape, 1)
        return body(k, v, (ints, floats, None if full else valid, *((j,) if split else ())), carry)

    first = 0
    if split and p.full:
        first = lists[*place, lists.shape[-1] - 1] * parts
        carry = lax.fori_loop(0, first, functools.partial(step, True), carry)
    return lax.fori_loop(first, lists[*place, 0] * parts, functools.partial(step, False), carry)


def _table(p: Plan, r: dict, b, h, tile, unit, rows, keys):
    return r["table"][*at(p, r["table"], b, h), tile, unit, rows, keys].astype(jnp.float32)


def over_rows(p: Plan, r: dict, b, h, unit, start, size: int, body, carry, *, split: bool = False):
    """Fold ``body(tile, first, limits, carry)`` over the row blocks that list ``unit``, ``size`` rows from ``first`` on at
    a time; ``limits``: (start, stop) of the unit's live range, counted from its key ``start``, or None. ``split``: the body
    gets two more arguments, whether the pair needs no mask, and the weight of the entry or None."""
    chunks, offsets = (r[x] for x in ("chunks", "offsets"))
    place, here = at(p, offsets, b, h), at(p, chunks, b, h)
    pieces = p.rows // size

    def step(full: bool, j, carry):
        e = lax.div(j, pieces)
        held = (*here, lax.div(e, CHUNK))
        tile = chunks[*held, 0, lax.rem(e, CHUNK)]
        limits = weight = None
        if p.bounded:
            limits = tuple(chunks[*held, i, lax.rem(e, CHUNK)] - start for i in (1, 2))
        if p.weighted:
            weight = weight_of(chunks[*held, words(p) - 1, lax.rem(e, CHUNK)])
        return body(tile, lax.rem(j, pieces) * size, limits, carry, *((full, weight) if split else ()))

    first, last = (offsets[*place, 0, 0, unit + i] * pieces for i in (0, 1))
    if split and p.full:
        middle = offsets[*place, 0, 0, p.units + 1 + unit] * pieces
        carry, first = lax.fori_loop(first, middle, functools.partial(step, True), carry), middle
    return lax.fori_loop(first, last, functools.partial(step, False), carry)


def program_rows(p: Plan, size: int):
    """(batch, row block, tile, first row) of this program; the grid is (tiles x parts of a block, row blocks, batch)."""
    parts = p.rows // size
    i = pl.program_id(0)
    return pl.program_id(2), pl.program_id(1), lax.div(i, parts), lax.rem(i, parts) * size


def _forward_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = _held(p, "forward")
    b, h, tile, start = program_rows(p, size)
    rows = pl.ds(start, size)
    q = r["q"][b, h, tile, rows, :]
    row_int, row = row_sides(p, r, b, h, tile, start, size, 0)

    def body(k, v, sides, carry):
        top, mass, total = carry
        key_int, key, valid, _ = sides
        s = dot(q, k, NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        s = logits_of(p, opt, row_int, key_int)(s, row, key)
        if opt.normalizer == "none":
            return top, mass, total + dot(kept(s, ok, valid, 0.0).astype(v.dtype), v, NN)
        s = kept(s, ok, valid, -jnp.inf)
        new = jnp.maximum(top, s.max(-1))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        e = jnp.exp(s - safe[:, None])
        shrink = jnp.exp(top - safe)
        return new, mass * shrink + e.sum(-1), total * shrink[:, None] + dot(e.astype(v.dtype), v, NN)

    init = jnp.full((size,), -jnp.inf), jnp.zeros((size,)), jnp.zeros((size, p.dv_pad))
    init = jax.tree.map(lambda x: x.astype(jnp.float32), init)
    top, mass, total = over_units(p, r, b, h, tile, keys, body, init, rows=rows, split=True)
    if opt.normalizer == "none":
        lse = jnp.zeros_like(mass)
    else:
        seen = mass != 0
        safe = jnp.where(seen, mass, 1.0)
        total = total / safe[:, None]
        lse = jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(safe), -jnp.inf)
    r["out"][b, h, tile, rows, :] = total.astype(r["out"].dtype)
    r["lse"][b, h, tile, 0, rows] = lse


def _query_gradient_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = _held(p, "queries")
    b, h, tile, start = program_rows(p, size)
    rows = pl.ds(start, size)
    q, do = r["q"][b, h, tile, rows, :], r["do"][b, h, tile, rows, :]
    lse, delta = (r["sums"][b, h, tile, i, rows][:, None] for i in (0, 1))
    row_int, row = row_sides(p, r, b, h, tile, start, size, 0)

    def body(k, v, sides, carry):
        dq, d_row = carry
        key_int, key, valid, j = sides
        s, dp = dot(q, k, NT), dot(do, v, NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        _, ds, more, found = pair_gradient(p, opt, s, dp, ok, lse, delta, (row_int, key_int), row, key)
        if p.weighted:
            r["d_weight"][b, h, tile, lax.div(start, size), j] = found["+weight"]
        return dq + dot(ds.astype(k.dtype), k, NN), jax.tree.map(jnp.add, d_row, more)

    init = jnp.zeros((size, p.d_pad), jnp.float32), {x: jnp.zeros((size, 1), jnp.float32) for x in p.row}
    dq, d_row = over_units(p, r, b, h, tile, keys, body, init, rows=rows, split=True)
    r["dq"][b, h, tile, rows, :] = dq.astype(r["dq"].dtype)
    for i, x in enumerate(p.row):
        r["d_row"][b, h, tile, i, rows] = d_row[x].reshape(size)


def _table_gradient_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = _held(p, "queries")
    b, h, tile, start = program_rows(p, size)
    rows = pl.ds(start, size)
    q, do = r["q"][b, h, tile, rows, :], r["do"][b, h, tile, rows, :]
    lse, delta = (r["sums"][b, h, tile, i, rows][:, None] for i in (0, 1))
    row_int, row = row_sides(p, r, b, h, tile, start, size, 0)
    lists, parts = r["lists"], p.unit_rows // keys

    def body(k, v, sides, carry):
        key_int, key, valid, j = sides
        s, dp = dot(q, k, NT), dot(do, v, NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        found = pair_gradient(p, opt, s, dp, ok, lse, delta, (row_int, key_int), row, key)[3]
        unit = lists[*at(p, lists, b, h), tile, 0, 1 + lax.div(j, parts)]
        r["d_table"][b, h, tile, unit, rows, pl.ds(lax.rem(j, parts) * keys, keys)] = found["+table"]
        return carry

    over_units(p, r, b, h, tile, keys, body, 0, rows=rows, split=True)


def _key_gradient_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = _held(p, "keys")
    cut = p.unit_rows // keys
    b, g, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    unit, start = lax.div(i, cut), lax.rem(i, cut) * keys
    k, v = (r[x][b, g, unit, pl.ds(start, keys), :] for x in ("k", "v"))
    blocks = p.blocks // p.g

    def over_block(part, carry):
        h = g * blocks + part
        key_int, key, valid = key_sides(p, r, b, h, unit, start, keys, 0)

        def body(tile, first, limits, carry, full, weight):
            dk, dv, d_key = carry
            rows = pl.ds(first, size)
            q, do = r["q"][b, h, tile, rows, :], r["do"][b, h, tile, rows, :]
            lse, delta = (r["sums"][b, h, tile, i, rows][None, :] for i in (0, 1))
            row_int, row = row_sides(p, r, b, h, tile, first, size, 1)
            live = valid * inside(*limits, valid.shape, 0) if p.bounded else valid
            added = {"+weight": weight} if p.weighted else {}
            if p.tabled:
                added["+table"] = _table(p, r, b, h, tile, unit, rows, pl.ds(start, keys)).T
            s, dp = dot(k, q, NT), dot(v, do, NT)  # keys by queries
            ok = visible(opt, s.shape, None if full else live, row_int, key_int)
            sides = row_int, key_int
            prob, ds, _, more = pair_gradient(p, opt, s, dp, ok, lse, delta, sides, row, key | added)
            more = {x: more[x] for x in p.key_floats}
            dv = dv + dot(prob.astype(do.dtype), do, NN)
            return dk + dot(ds.astype(q.dtype), q, NN), dv, jax.tree.map(jnp.add, d_key, more)

        d_key = {x: jnp.zeros((keys, 1), jnp.float32) for x in p.key_floats}
        dk, dv, d_key = over_rows(p, r, b, h, unit, start, size, body, (*carry, d_key), split=True)
        for i, x in enumerate(p.key_floats):
            r["d_key"][b, h, unit, i, pl.ds(start, keys)] = d_key[x].reshape(keys)
        return dk, dv

    init = jnp.zeros((keys, p.d_pad), jnp.float32), jnp.zeros((keys, p.dv_pad), jnp.float32)
    dk, dv = lax.fori_loop(0, blocks, over_block, init)
    r["dk"][b, g, unit, pl.ds(start, keys), :] = dk.astype(r["dk"].dtype)
    r["dv"][b, g, unit, pl.ds(start, keys), :] = dv.astype(r["dv"].dtype)


# -------------------------------------------------------------------------------------------------------------- calls


def call(p: Plan, opt, kernel, operands: dict, outs: dict, grid, name: str, interpret, *, kind="forward", zeros=False):
    """``kind``: whose tuned warps and stages; ``zeros``: the outputs hold them until they are written."""
    operands = operands | ({x: jnp.zeros(a.shape, a.dtype) for x, a in outs.items()} if zeros else {})
    names = (*(f"zero {x}" if x in outs else x for x in operands), *outs)
    size = tuned(p, kind)
    found = pl.pallas_call(
        functools.partial(kernel, p, opt, names),
        grid=grid,
        out_shape=list(outs.values()),
        input_output_aliases={i: list(outs).index(x) for i, x in enumerate(operands) if x in outs},
        compiler_params=plt.CompilerParams(num_warps=size["warps"], num_stages=size["stages"]),
        name=name,
        interpret=interpret,
    )(*operands.values())
    return dict(zip(outs, found, strict=True))


def _shape(dtype, *size):
    return jax.ShapeDtypeStruct(size, dtype)


def _forward(p: Plan, opt, rows: dict, keys: dict, interpret):
    block = (p.b, p.blocks, p.tiles)
    outs = {"out": _shape(keys["v"].dtype, *block, p.rows, p.dv_pad), "lse": _shape(jnp.float32, *block, 1, p.rows)}
    grid = (p.tiles * (p.rows // _held(p, "forward")[0]), p.blocks, p.b)
    return call(p, opt, _forward_kernel, rows | keys, outs, grid, "flash_forward", interpret)


def _query_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    block = (p.b, p.blocks, p.tiles)
    outs = {"dq": _shape(rows["q"].dtype, *block, p.rows, p.d_pad)}
    if p.row:
        outs["d_row"] = _shape(jnp.float32, *block, len(p.row), p.rows)
    pieces, cut = p.rows // _held(p, "queries")[0], p.unit_rows // _held(p, "queries")[1]
    length = layout.list_length(p, rows["lists"])
    if p.weighted:
        outs["d_weight"] = _shape(jnp.float32, *block, pieces, length * cut)
    found = call(p, opt, _query_gradient_kernel, rows | keys, outs, (p.tiles * pieces, p.blocks, p.b),
                 "flash_query_gradient", interpret, kind="queries")  # fmt: skip
    if p.weighted:  # what lies behind a list's end was not written
        weight = found["d_weight"].reshape(*block, pieces, length, cut).sum((3, 5))
        count = rows["lists"][:, :, :, 0, :1]
        count = jnp.repeat(count, p.blocks // count.shape[1], axis=1)
        found["d_weight"] = jnp.where(jnp.arange(length) < count, weight, 0.0)
    return found


def _table_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    table = p.b, p.blocks, p.tiles, p.units + 1, p.rows, p.unit_lanes
    grid = (p.tiles * (p.rows // _held(p, "queries")[0]), p.blocks, p.b)
    outs = {"d_table": _shape(jnp.float32, *table)}
    name = "flash_table_gradient"
    return call(p, opt, _table_gradient_kernel, rows | keys, outs, grid, name, interpret, kind="queries", zeros=True)


def _key_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    chunks, offsets = layout.transpose_lists(p, rows["lists"])
    operands = {x: a for x, a in rows.items() if x != "lists"} | keys | {"chunks": chunks, "offsets": offsets}
    unit = (p.b, p.g, p.units, p.unit_rows)
    outs = {"dk": _shape(keys["k"].dtype, *unit, p.d_pad), "dv": _shape(keys["v"].dtype, *unit, p.dv_pad)}
    if p.key_floats:
        outs["d_key"] = _shape(jnp.float32, p.b, p.blocks, p.units, len(p.key_floats), p.unit_lanes)
    grid = (p.units * (p.unit_rows // _held(p, "keys")[1]), p.g, p.b)
    return call(p, opt, _key_gradient_kernel, operands, outs, grid, "flash_key_gradient", interpret, kind="keys")


BODY = Body("gpu", plan, _forward, _query_gradient, _key_gradient, _table_gradient, half=True)


def flash(o: dict, opt, interpret=False):
    """``interpret``: run the kernels on a CPU."""
    return run(BODY, o, opt, interpret)
