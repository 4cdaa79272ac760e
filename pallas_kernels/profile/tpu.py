"""The reductions on TPU: row sums as flash's forward pass goes, columns as its keys' gradient goes (Mosaic kernels).

Columns stay in VMEM while the query tiles that list a unit stream by: a sum over rows is kept per row lane and reduced
once, over the lanes of each head, by one small product. For diagonals the rows of a tile are rolled, each one lane
further than the row before, and summed: a strided rotation, no gather.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import layout, tpu_kernels
from pallas_kernels.flash.layout import LANES, Plan, ceil_to
from pallas_kernels.flash.pairs import FAR, NN, NT, dot, inside, kept, logits_of, visible
from pallas_kernels.flash.tpu import ANYWHERE, BODY, block_spec, by_tile, params
from pallas_kernels.flash.tpu_kernels import as_column, as_row
from pallas_kernels.profile import body, xla
from pallas_kernels.profile.body import COLUMNS, pair_gradient, pair_received

SUBLANES = 8

# ------------------------------------------------------------------------------------------------------------- reduce


def _rows_kernel(p: Plan, opt, names, keys, *refs):
    r = dict(zip(names, refs, strict=True))
    row_int, row = tpu_kernels.row_sides(p, r, as_column)
    r["top"][...] = jnp.full_like(r["top"], -jnp.inf)
    for x in ("mass", "total"):
        r[x][...] = jnp.zeros_like(r[x])

    def body(entry, got):
        key, key_int, valid = tpu_kernels.fetched_keys(p, r, entry, got)
        s = dot(tpu_kernels.rows_in(r["q"]), tpu_kernels.merged(p, got["k"]), NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        s = kept(logits_of(p, opt, row_int, key_int)(s, row, key), ok, valid, -jnp.inf)
        top = r["top"][:, :1]
        new = jnp.maximum(top, s.max(-1, keepdims=True))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        e = jnp.exp(s - safe)
        shrink = jnp.exp(top - safe)
        wide = r["top"].shape
        for x, value in (("mass", e), ("total", e * jnp.where(ok, s, 0.0))):
            r[x][...] = r[x][...] * shrink + jnp.broadcast_to(value.sum(-1, keepdims=True), wide)
        r["top"][...] = jnp.broadcast_to(new, wide)

    tpu_kernels.over_units(p, r, keys, pl.program_id(0), pl.program_id(1), body)
    top, mass, total = (r[x][:, :1] for x in ("top", "mass", "total"))
    seen = mass > 0
    safe = jnp.where(seen, mass, 1.0)
    r["sums"][0:1, :] = as_row(jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(safe), -jnp.inf))
    r["sums"][1:2, :] = as_row(total / safe)


def _rows(p: Plan, opt, rows: dict, keys: dict, interpret):
    outs = {"sums": jax.ShapeDtypeStruct((p.b, p.blocks, p.tiles, 2, p.rows), jnp.float32)}
    scratch = {x: pltpu.VMEM((p.rows, LANES), jnp.float32) for x in ("top", "mass", "total")}
    return by_tile(p, opt, _rows_kernel, rows, keys, outs, scratch, "profile_rows", interpret)


def _columns_kernel(p: Plan, opt, names, streamed, *refs):
    r = dict(zip(names, refs, strict=True))
    b, h, u = (pl.program_id(i) for i in range(3))
    key_int, key, valid = tpu_kernels.key_sides(p, r)
    total = r["total"]
    total[...] = jnp.zeros_like(total)
    r["clean_k"][...] = tpu_kernels.clean(r["k"][...], valid)

    def body(limits, got):
        row_int, row = tpu_kernels.row_sides(p, got, lambda x: x)
        lse, weights = got["sums"][0:1, :], got["sums"][1:2, :]
        s = dot(r["clean_k"][...], tpu_kernels.rows_in(got["q"]), NT)  # keys by queries
        live = valid * inside(*limits, (p.unit_rows, 1), 0) if p.bounded else valid
        ok = visible(opt, s.shape, live, row_int, key_int)
        s = kept(logits_of(p, opt, row_int, key_int)(s, row, key), ok, live, -jnp.inf)
        total[: p.unit_rows] += jnp.exp(s - lse) * weights

    tpu_kernels.over_row_blocks(p, r, streamed, b, h, u, body)
    shape = (r["columns"].shape[0], p.rows)
    first = lax.broadcasted_iota(jnp.int32, shape, 0) * p.tile
    row = lax.broadcasted_iota(jnp.int32, shape, 1)
    mine = jnp.where((row >= first) & (row < first + p.tile), 1.0, 0.0)  # the rows of each head
    r["columns"][...] = dot(mine, total[...], NT)


def _clean_keys(p: Plan, keys: dict):
    return pltpu.VMEM((p.unit_rows, p.d_pad), keys["k"].dtype)


def _columns(p: Plan, opt, rows: dict, keys: dict, interpret):
    chunks, offsets = layout.transpose_lists(p, rows["lists"])
    streamed = {x: a for x, a in rows.items() if x != "lists"}
    unit = lambda *step: step  # noqa: E731
    heads = ceil_to(p.pack, SUBLANES)
    out = jax.ShapeDtypeStruct((p.b, p.blocks, p.units, heads, p.unit_lanes), jnp.float32)
    scratch = {"total": pltpu.VMEM((p.unit_lanes, p.rows), jnp.float32), "clean_k": _clean_keys(p, keys)}
    buffers = tpu_kernels.row_buffers(p, streamed, chunks)
    names = ["offsets", *keys, "chunks", *streamed, "columns", *scratch, *buffers]
    found = pl.pallas_call(
        functools.partial(_columns_kernel, p, opt, tuple(names), tuple(streamed)),
        grid=(p.b, p.blocks, p.units),
        in_specs=[block_spec(p, offsets, lambda b, h, u: (b, h, 0), pltpu.SMEM)]
        + [block_spec(p, x, unit) for x in keys.values()]
        + [ANYWHERE] * (1 + len(streamed)),
        out_specs=block_spec(p, out, unit),
        out_shape=out,
        scratch_shapes=[*scratch.values(), *buffers.values()],
        compiler_params=params(("parallel", "parallel", "arbitrary")),
        name="profile_columns",
        interpret=interpret,
    )(offsets, *keys.values(), chunks, *streamed.values())
    return {"columns": found}


# ---------------------------------------------------------------------------------------------------------- gradients


def _query_gradient_kernel(p: Plan, opt, names, keys, *refs):
    r = dict(zip(names, refs, strict=True))
    row_int, row = tpu_kernels.row_sides(p, r, as_column)
    sums = [as_column(r["sums"][i : i + 1, :]) for i in range(r["sums"].shape[0])]
    totals = [x for x in ("total", "received", "row_total") if x in r]
    for x in totals:
        r[x][...] = jnp.zeros_like(r[x])

    def body(entry, got):
        key, key_int, valid = tpu_kernels.fetched_keys(p, r, entry, got)
        d_columns, k = key.pop(COLUMNS), tpu_kernels.merged(p, got["k"])
        s = dot(tpu_kernels.rows_in(r["q"]), k, NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        pair = p, opt, s, ok
        if "dq" not in r:
            received = pair_received(*pair, sums[0], d_columns, (row_int, key_int), row, key)
        else:
            received, ds, d_row, _ = pair_gradient(*pair, sums, d_columns, (row_int, key_int), row, key)
            r["total"][...] += dot(ds.astype(k.dtype), k, NN)
        r["received"][...] += jnp.broadcast_to(received.sum(-1, keepdims=True), r["received"].shape)
        if "dq" not in r:
            return
        for i, x in enumerate(p.row):
            r["row_total"][i] += jnp.broadcast_to(d_row[x], (p.rows, LANES))

    tpu_kernels.over_units(p, r, keys, pl.program_id(0), pl.program_id(1), body)
    r["d_weights"][...] = as_row(r["received"][:, :1])
    if "dq" not in r:
        return
    tpu_kernels.put_rows(r["dq"], r["total"][...])
    for i in range(len(p.row)):
        r["d_row"][i : i + 1, :] = as_row(r["row_total"][i][:, :1])


def _query_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    block = p.b, p.blocks, p.tiles
    outs = {"dq": jax.ShapeDtypeStruct(layout.rows_shape(p, p.d_pad), rows["q"].dtype)}
    outs["d_weights"] = jax.ShapeDtypeStruct((*block, 1, p.rows), jnp.float32)
    scratch = {x: pltpu.VMEM((p.rows, w), jnp.float32) for x, w in (("total", p.d_pad), ("received", LANES))}
    if p.row:
        outs["d_row"] = jax.ShapeDtypeStruct((*block, len(p.row), p.rows), jnp.float32)
        scratch["row_total"] = pltpu.VMEM((len(p.row), p.rows, LANES), jnp.float32)
    return by_tile(p, opt, _query_gradient_kernel, rows, keys, outs, scratch, "profile_query_gradient", interpret)


def _received(p: Plan, opt, rows: dict, keys: dict, interpret):
    outs = {"d_weights": jax.ShapeDtypeStruct((p.b, p.blocks, p.tiles, 1, p.rows), jnp.float32)}
    scratch = {"received": pltpu.VMEM((p.rows, LANES), jnp.float32)}
    return by_tile(p, opt, _query_gradient_kernel, rows, keys, outs, scratch, "profile_received", interpret)


def _key_gradient_kernel(p: Plan, opt, names, streamed, *refs):
    r = dict(zip(names, refs, strict=True))
    b, g, u, part = (pl.program_id(i) for i in range(4))
    parts = p.blocks // p.g
    key_int, key, valid = tpu_kernels.key_sides(p, r)
    d_columns = key.pop(COLUMNS)

    @pl.when(part == 0)
    def _():
        r["total"][...] = jnp.zeros_like(r["total"])

    r["clean_k"][...] = tpu_kernels.clean(r["k"][...], valid)
    if key:
        r["key_total"][...] = jnp.zeros_like(r["key_total"])

    def body(limits, got):
        row_int, row = tpu_kernels.row_sides(p, got, lambda x: x)
        q, sums = tpu_kernels.rows_in(got["q"]), [got["sums"][i : i + 1, :] for i in range(4)]
        s = dot(r["clean_k"][...], q, NT)  # keys by queries
        live = valid * inside(*limits, (p.unit_rows, 1), 0) if p.bounded else valid
        ok = visible(opt, s.shape, live, row_int, key_int)
        _, ds, _, d_key = pair_gradient(p, opt, s, ok, sums, d_columns, (row_int, key_int), row, key)
        r["total"][...] += dot(ds.astype(q.dtype), q, NN)
        for i, x in enumerate(key):
            r["key_total"][i, : p.unit_rows] += jnp.broadcast_to(d_key[x], (p.unit_rows, LANES))

    tpu_kernels.over_row_blocks(p, r, streamed, b, g * parts + part, u, body)

    @pl.when(part == parts - 1)
    def _():
        r["dk"][...] = tpu_kernels.clean(r["total"][...], valid).astype(r["dk"].dtype)

    for i in range(len(key)):
        r["d_key"][i : i + 1, :] = as_row(r["key_total"][i][:, :1])


def _key_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    parts, facts = p.blocks // p.g, len(p.key_floats) - 1
    chunks, offsets = layout.transpose_lists(p, rows["lists"])
    streamed = {x: a for x, a in rows.items() if x != "lists"}
    place = lambda b, g, u, part: (b, g * parts + part, u)  # noqa: E731
    outs = {"dk": jax.ShapeDtypeStruct((p.b, p.g, p.units, p.unit_rows, p.d_pad), keys["k"].dtype)}
    scratch = {"total": pltpu.VMEM((p.unit_rows, p.d_pad), jnp.float32), "clean_k": _clean_keys(p, keys)}
    if facts:
        outs["d_key"] = jax.ShapeDtypeStruct((p.b, p.blocks, p.units, facts, p.unit_lanes), jnp.float32)
        scratch["key_total"] = pltpu.VMEM((facts, p.unit_lanes, LANES), jnp.float32)
    buffers = tpu_kernels.row_buffers(p, streamed, chunks)
    names = ["offsets", *keys, "chunks", *streamed, *outs, *scratch, *buffers]
    found = pl.pallas_call(
        functools.partial(_key_gradient_kernel, p, opt, tuple(names), tuple(streamed)),
        grid=(p.b, p.g, p.units, parts),
        in_specs=[block_spec(p, offsets, lambda b, g, u, part: (b, g * parts + part, 0), pltpu.SMEM)]
        + [block_spec(p, x, place) for x in keys.values()]
        + [ANYWHERE] * (1 + len(streamed)),
        out_specs=[block_spec(p, x, place) for x in outs.values()],
        out_shape=list(outs.values()),
        scratch_shapes=[*scratch.values(), *buffers.values()],
        compiler_params=params(("parallel", "parallel", "arbitrary", "arbitrary")),
        name="profile_key_gradient",
        interpret=interpret,
    )(offsets, *keys.values(), chunks, *streamed.values())
    return dict(zip(outs, found, strict=True))


def _apart(o: dict, opt) -> Plan:
    """The plan with one query head per row block."""
    return dataclasses.replace(BODY.plan(o, opt), pack=1, rows=ceil_to(opt.tile, LANES))


KERNELS = body.Body("tpu", BODY.plan, _apart, BODY.plan, _rows, _columns, _query_gradient, _key_gradient, _received)


def reduce(o: dict, opt, interpret=False):
    return body.reduce(KERNELS, o, opt, interpret)


def profile(o: dict, opt, interpret=False):
    return body.profile(KERNELS, o, opt, interpret)


# ---------------------------------------------------------------------------------------------------------- diagonals

KEYS = 512


def _tile_logits(r: int, m: int, scale: float, q, k):
    """Logits [rows, keys] of the last rows, latest first, against one tile of keys; -inf where they are not seen."""
    s = dot(q[...], k[...], NT) * scale
    i, j = (lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
    j = j + pl.program_id(2) * s.shape[1]
    return jnp.where((i < r) & (i + j < m), s, -jnp.inf)


def _mass_kernel(r: int, m: int, scale: float, q, k, lse):
    s = _tile_logits(r, m, scale, q, k)
    top = s.max(-1, keepdims=True)
    seen = top > -jnp.inf
    safe = jnp.where(seen, top, 0.0)
    mass = jnp.exp(s - safe).sum(-1, keepdims=True)
    lse[...] = as_row(jnp.where(seen, safe + jnp.log(jnp.where(seen, mass, 1.0)), -jnp.inf))


def _slanted_kernel(r: int, m: int, scale: float, q, k, lse, vertical, slash):
    p = jnp.exp(_tile_logits(r, m, scale, q, k) - as_column(lse[...]))
    vertical[...] = p.sum(0, keepdims=True)
    wide = jnp.concatenate([p, jnp.zeros((p.shape[0], slash.shape[1] - p.shape[1]), p.dtype)], 1)
    slash[...] = pltpu.roll(wide, 0, 1, stride=1, stride_axis=0).sum(0, keepdims=True)


def _kernels(interpret, q, k, lse, scale: float):
    (b, r, h, d), (m, g) = q.shape, k.shape[1:3]
    rows, width, keys = ceil_to(r, LANES), ceil_to(d, LANES), min(KEYS, ceil_to(m, LANES))
    keys = max(keys, rows)  # then a tile's diagonals reach into the next tile only
    tiles = -(-m // keys)
    q = jnp.pad(jnp.moveaxis(q, 1, 2)[:, :, ::-1], [(0, 0), (0, 0), (0, rows - r), (0, width - d)])
    k = jnp.pad(jnp.moveaxis(k, 1, 2), [(0, 0), (0, 0), (0, tiles * keys - m), (0, width - d)])
    q_spec = pl.BlockSpec((None, None, rows, width), lambda b, g, i, c: (b, g * (h // k.shape[1]) + c, 0, 0))
    k_spec = pl.BlockSpec((None, None, keys, width), lambda b, g, i, c: (b, g, i, 0))

    def by_tile(lanes):
        spec = pl.BlockSpec((None, None, None, 1, lanes), lambda b, g, i, c: (b, g * (h // k.shape[1]) + c, i, 0, 0))
        return spec, jax.ShapeDtypeStruct((b, h, tiles, 1, lanes), jnp.float32)

    def call(kernel, more, more_specs, lanes, name):
        specs, shapes = zip(*(by_tile(x) for x in lanes), strict=True)
        return pl.pallas_call(
            functools.partial(kernel, r, m, scale),
            grid=(b, g, tiles, h // g),
            in_specs=[q_spec, k_spec, *more_specs],
            out_specs=specs,
            out_shape=shapes,
            compiler_params=params(("parallel", "parallel", "parallel", "arbitrary")),
            name=name,
            interpret=interpret,
        )(q, k, *more)

    if lse is None:
        (lse,) = call(_mass_kernel, (), (), (rows,), "profile_mass")
        lse = jax.nn.logsumexp(lse, 2)
        lse = jnp.where(lse > -jnp.inf, lse, FAR)
    else:
        lse = jnp.pad(jnp.moveaxis(lse, 1, 2)[:, :, None, ::-1], [(0, 0)] * 3 + [(0, rows - r)]).astype(jnp.float32)
    lse_spec = pl.BlockSpec((None, None, 1, rows), lambda b, g, i, c: (b, g * (h // k.shape[1]) + c, 0, 0))
    vertical, slash = call(_slanted_kernel, (lse,), (lse_spec,), (keys, keys + rows), "profile_diagonals")
    slash = jnp.moveaxis(xla.overlapped(jnp.moveaxis(slash, 2, 0), keys), 0, 2)
    return tuple(x.reshape(b, h, tiles * keys)[..., :m] for x in (vertical, slash))


def diagonals(o: dict, scale: float, interpret=False):
    return body.slanted(o, scale, functools.partial(_kernels, interpret))
