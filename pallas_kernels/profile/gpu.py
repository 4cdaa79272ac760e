"""The reductions on GPU: row sums as flash's forward pass goes, columns as its keys' gradient goes (Triton kernels).

A column program holds some keys of a unit, streams the query rows that list it through the transposed lists, and keeps
one sum per key and row lane in registers: no atomics. Triton has neither gathers nor shifts inside a tile, so diagonals
are summed where addresses can shift: rows in groups of 16 read the keys at their own offset, products run on tensor
cores, and what is left, a skew of 16 columns, is one fused XLA loop over 16 numbers per key and head, however many rows
are looked at.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.flash import gpu, layout
from pallas_kernels.flash.layout import Plan, ceil_to
from pallas_kernels.flash.pairs import FAR, NN, NT, dot, inside, kept, logits_of, visible
from pallas_kernels.profile import body
from pallas_kernels.profile.body import COLUMNS, pair_gradient, pair_received

# ------------------------------------------------------------------------------------------------------------- reduce


def _rows_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = gpu.sizes(p, gpu.FORWARD)
    b, h, tile, start = gpu.program_rows(p, size)
    rows = pl.ds(start, size)
    q = r["q"][b, h, tile, rows, :]
    row_int, row = gpu.row_sides(p, r, b, h, tile, start, size, 0)

    def body(k, _, sides, carry):
        top, mass, total = carry
        key_int, key, valid = sides
        s = dot(q, k, NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        s = kept(logits_of(p, opt, row_int, key_int)(s, row, key), ok, valid, -jnp.inf)
        new = jnp.maximum(top, s.max(-1))
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        e = jnp.exp(s - safe[:, None])
        shrink = jnp.exp(top - safe)
        return new, mass * shrink + e.sum(-1), total * shrink + (e * jnp.where(ok, s, 0.0)).sum(-1)

    init = jnp.full((size,), -jnp.inf, jnp.float32), jnp.zeros((size,), jnp.float32), jnp.zeros((size,), jnp.float32)
    top, mass, total = gpu.over_units(p, r, b, h, tile, keys, body, init)
    seen = mass > 0
    safe = jnp.where(seen, mass, 1.0)
    r["sums"][b, h, tile, 0, rows] = jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(safe), -jnp.inf)
    r["sums"][b, h, tile, 1, rows] = total / safe


def _rows(p: Plan, opt, rows: dict, keys: dict, interpret):
    outs = {"sums": jax.ShapeDtypeStruct((p.b, p.blocks, p.tiles, 2, p.rows), jnp.float32)}
    grid = (p.tiles * (p.rows // gpu.sizes(p, gpu.FORWARD)[0]), p.blocks, p.b)
    return gpu.call(p, opt, _rows_kernel, rows | keys, outs, grid, "profile_rows", interpret)


def _columns_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = gpu.sizes(p, gpu.KEYS)
    cut = p.unit_rows // keys
    b, h, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    unit, start = lax.div(i, cut), lax.rem(i, cut) * keys
    k = r["k"][b, lax.div(h, p.blocks // p.g), unit, pl.ds(start, keys), :]
    key_int, key, valid = gpu.key_sides(p, r, b, h, unit, start, keys, 0)

    def body(tile, first, limits, total):
        rows = pl.ds(first, size)
        q = r["q"][b, h, tile, rows, :]
        lse, weights = (r["sums"][b, h, tile, i, rows][None, :] for i in (0, 1))
        row_int, row = gpu.row_sides(p, r, b, h, tile, first, size, 1)
        live = valid * inside(*limits, valid.shape, 0) if p.bounded else valid
        s = dot(k, q, NT)  # keys by queries
        ok = visible(opt, s.shape, live, row_int, key_int)
        s = kept(logits_of(p, opt, row_int, key_int)(s, row, key), ok, live, -jnp.inf)
        return total + jnp.exp(s - lse) * weights

    total = gpu.over_rows(p, r, b, h, unit, start, size, body, jnp.zeros((keys, size), jnp.float32))
    r["columns"][b, h, unit, 0, pl.ds(start, keys)] = total.sum(1)


def _columns(p: Plan, opt, rows: dict, keys: dict, interpret):
    chunks, offsets = layout.transpose_lists(p, rows["lists"])
    operands = {x: a for x, a in rows.items() if x != "lists"} | keys | {"chunks": chunks, "offsets": offsets}
    outs = {"columns": jax.ShapeDtypeStruct((p.b, p.blocks, p.units, 1, p.unit_lanes), jnp.float32)}
    grid = (p.units * (p.unit_rows // gpu.sizes(p, gpu.KEYS)[1]), p.blocks, p.b)
    return gpu.call(p, opt, _columns_kernel, operands, outs, grid, "profile_columns", interpret)


def _query_gradient_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = gpu.sizes(p, gpu.QUERIES)
    b, h, tile, start = gpu.program_rows(p, size)
    rows = pl.ds(start, size)
    q = r["q"][b, h, tile, rows, :]
    sums = [r["sums"][b, h, tile, i, rows][:, None] for i in range(r["sums"].shape[3])]
    row_int, row = gpu.row_sides(p, r, b, h, tile, start, size, 0)

    def alone(k, _, sides, received):
        key_int, key, valid = sides
        d_columns = key.pop(COLUMNS)
        s = dot(q, k, NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        return received + pair_received(p, opt, s, ok, sums[0], d_columns, (row_int, key_int), row, key).sum(1)

    if "dq" not in r:
        zeros = jnp.zeros((size,), jnp.float32)
        r["d_weights"][b, h, tile, 0, rows] = gpu.over_units(p, r, b, h, tile, keys, alone, zeros)
        return

    def body(k, _, sides, carry):
        dq, received, d_row = carry
        key_int, key, valid = sides
        d_columns = key.pop(COLUMNS)
        s = dot(q, k, NT)
        ok = visible(opt, s.shape, valid, row_int, key_int)
        got, ds, more, _ = pair_gradient(p, opt, s, ok, sums, d_columns, (row_int, key_int), row, key)
        return dq + dot(ds.astype(k.dtype), k, NN), received + got.sum(1), jax.tree.map(jnp.add, d_row, more)

    init = jnp.zeros((size, p.d_pad), jnp.float32), jnp.zeros((size,), jnp.float32)
    init = *init, {x: jnp.zeros((size, 1), jnp.float32) for x in p.row}
    dq, received, d_row = gpu.over_units(p, r, b, h, tile, keys, body, init)
    r["dq"][b, h, tile, rows, :] = dq.astype(r["dq"].dtype)
    r["d_weights"][b, h, tile, 0, rows] = received
    for i, x in enumerate(p.row):
        r["d_row"][b, h, tile, i, rows] = d_row[x].reshape(size)


def _query_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    block = p.b, p.blocks, p.tiles
    outs = {"dq": jax.ShapeDtypeStruct((*block, p.rows, p.d_pad), rows["q"].dtype)}
    outs["d_weights"] = jax.ShapeDtypeStruct((*block, 1, p.rows), jnp.float32)
    if p.row:
        outs["d_row"] = jax.ShapeDtypeStruct((*block, len(p.row), p.rows), jnp.float32)
    grid = (p.tiles * (p.rows // gpu.sizes(p, gpu.QUERIES)[0]), p.blocks, p.b)
    return gpu.call(p, opt, _query_gradient_kernel, rows | keys, outs, grid, "profile_query_gradient", interpret)


def _received(p: Plan, opt, rows: dict, keys: dict, interpret):
    outs = {"d_weights": jax.ShapeDtypeStruct((p.b, p.blocks, p.tiles, 1, p.rows), jnp.float32)}
    grid = (p.tiles * (p.rows // gpu.sizes(p, gpu.QUERIES)[0]), p.blocks, p.b)
    return gpu.call(p, opt, _query_gradient_kernel, rows | keys, outs, grid, "profile_received", interpret)


def _key_gradient_kernel(p: Plan, opt, names, *refs):
    r = dict(zip(names, refs, strict=True))
    size, keys = gpu.sizes(p, gpu.KEYS)
    cut, heads = p.unit_rows // keys, p.blocks // p.g
    b, g, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    unit, start = lax.div(i, cut), lax.rem(i, cut) * keys
    k = r["k"][b, g, unit, pl.ds(start, keys), :]

    def over_head(part, dk):
        h = g * heads + part
        key_int, key, valid = gpu.key_sides(p, r, b, h, unit, start, keys, 0)
        d_columns = key.pop(COLUMNS)

        def body(tile, first, limits, carry):
            dk, d_key = carry
            rows = pl.ds(first, size)
            q, sums = r["q"][b, h, tile, rows, :], [r["sums"][b, h, tile, i, rows][None, :] for i in range(4)]
            row_int, row = gpu.row_sides(p, r, b, h, tile, first, size, 1)
            live = valid * inside(*limits, valid.shape, 0) if p.bounded else valid
            s = dot(k, q, NT)  # keys by queries
            ok = visible(opt, s.shape, live, row_int, key_int)
            _, ds, _, more = pair_gradient(p, opt, s, ok, sums, d_columns, (row_int, key_int), row, key)
            return dk + dot(ds.astype(q.dtype), q, NN), jax.tree.map(jnp.add, d_key, more)

        d_key = {x: jnp.zeros((keys, 1), jnp.float32) for x in key}
        dk, d_key = gpu.over_rows(p, r, b, h, unit, start, size, body, (dk, d_key))
        for i, x in enumerate(key):
            r["d_key"][b, h, unit, i, pl.ds(start, keys)] = d_key[x].reshape(keys)
        return dk

    dk = lax.fori_loop(0, heads, over_head, jnp.zeros((keys, p.d_pad), jnp.float32))
    r["dk"][b, g, unit, pl.ds(start, keys), :] = dk.astype(r["dk"].dtype)


def _key_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    chunks, offsets = layout.transpose_lists(p, rows["lists"])
    operands = {x: a for x, a in rows.items() if x != "lists"} | keys | {"chunks": chunks, "offsets": offsets}
    outs = {"dk": jax.ShapeDtypeStruct((p.b, p.g, p.units, p.unit_rows, p.d_pad), keys["k"].dtype)}
    if facts := len(p.key_floats) - 1:
        outs["d_key"] = jax.ShapeDtypeStruct((p.b, p.blocks, p.units, facts, p.unit_lanes), jnp.float32)
    grid = (p.units * (p.unit_rows // gpu.sizes(p, gpu.KEYS)[1]), p.g, p.b)
    return gpu.call(p, opt, _key_gradient_kernel, operands, outs, grid, "profile_key_gradient", interpret)


# One query head per block of columns: sums of several would need an axis of heads in registers.
ALONE = functools.partial(gpu.plan, most=1)
KERNELS = body.Body("gpu", gpu.plan, ALONE, ALONE, _rows, _columns, _query_gradient, _key_gradient, _received)


def reduce(o: dict, opt, interpret=False):
    return body.reduce(KERNELS, o, opt, interpret)


def profile(o: dict, opt, interpret=False):
    return body.profile(KERNELS, o, opt, interpret)


# ---------------------------------------------------------------------------------------------------------- diagonals

GROUP, HEADS = 16, 8  # rows that share an offset, and query heads of a program
SPAN = 1024  # keys of a program that sums rows


def _logits(r: int, m: int, scale: float, k, q, first, group):
    """Logits of keys from ``first`` on by (head, row of a group), latest row first; -inf where a row does not see a key."""
    s = dot(k, q, NT) * scale
    j = first + lax.broadcasted_iota(jnp.int32, s.shape, 0)
    i = group * GROUP + lax.rem(lax.broadcasted_iota(jnp.int32, s.shape, 1), GROUP)
    return jnp.where((i < r) & (j >= 0) & (i + j < m), s, -jnp.inf)


def _mass_kernel(r: int, m: int, scale: float, front: int, keys: int, q_ref, k_ref, lse_ref):
    b, h, span = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    per = q_ref.shape[1] // k_ref.shape[1]
    cols = q_ref.shape[3]

    def group(a, _):
        q = q_ref[b, h, a]

        def step(i, carry):
            top, mass = carry
            first = span * SPAN + i * keys
            s = _logits(r, m, scale, k_ref[b, lax.div(h, per), pl.ds(front + first, keys), :], q, first, a)
            new = jnp.maximum(top, s.max(0))
            safe = jnp.where(new > -jnp.inf, new, 0.0)
            return new, mass * jnp.exp(top - safe) + jnp.exp(s - safe[None, :]).sum(0)

        init = jnp.full((cols,), -jnp.inf, jnp.float32), jnp.zeros((cols,), jnp.float32)
        top, mass = lax.fori_loop(0, SPAN // keys, step, init)
        seen = mass > 0
        lse_ref[b, h, span, a] = jnp.where(seen, top, 0.0) + jnp.where(seen, jnp.log(jnp.where(seen, mass, 1.0)), -jnp.inf)
        return 0

    lax.fori_loop(0, q_ref.shape[2], group, 0)


def _sum_kernel(r: int, m: int, scale: float, front: int, keys: int, skewed: bool, q_ref, k_ref, lse_ref, out_ref):
    b, h, first = pl.program_id(2), pl.program_id(1), pl.program_id(0) * keys
    per = q_ref.shape[1] // k_ref.shape[1]
    cols = q_ref.shape[3]

    def step(a, total):
        at = first - a * GROUP if skewed else first
        s = _logits(r, m, scale, k_ref[b, lax.div(h, per), pl.ds(front + at, keys), :], q_ref[b, h, a], at, a)
        return total + jnp.exp(s - lse_ref[b, h, a][None, :])

    total = lax.fori_loop(0, q_ref.shape[2], step, jnp.zeros((keys, cols), jnp.float32))
    if not skewed:
        total = total.reshape(keys, cols // GROUP, GROUP).sum(2)
    out_ref[b, h, pl.ds(first, keys), :] = total


def _kernels(interpret, q, k, lse, scale: float):
    (b, r, h, d), (m, g) = q.shape, k.shape[1:3]
    per, width, rows = h // g, gpu.power(d), ceil_to(r, GROUP)
    together = min(HEADS, 1 << (per - 1).bit_length())
    blocks, cols = -(-per // together), together * GROUP
    keys = 32 if q.dtype == jnp.float32 or width > 128 else 64
    long = ceil_to(m, SPAN)

    def columns(x, value=0):  # [b, R, H, E] -> [b, g * blocks, groups, cols, E]
        x = x[:, ::-1].reshape(b, r, g, per, -1)
        x = jnp.pad(x, [(0, 0), (0, rows - r), (0, 0), (0, blocks * together - per), (0, 0)], constant_values=value)
        x = x.reshape(b, rows // GROUP, GROUP, g, blocks, together, -1)
        return jnp.transpose(x, (0, 3, 4, 1, 5, 2, 6)).reshape(b, g * blocks, rows // GROUP, cols, -1)

    def heads(x):  # [b, g * blocks, keys, together] -> [b, H, m]
        x = jnp.swapaxes(x, 2, 3).reshape(b, g, blocks * together, -1)
        return x[:, :, :per, :m].reshape(b, h, m)

    def call(kernel, operands, shape, n, name, *static):
        return pl.pallas_call(
            functools.partial(kernel, r, m, scale, rows, keys, *static),
            grid=(n, g * blocks, b),
            out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
            name=name,
            interpret=interpret,
        )(*operands)

    q = columns(jnp.pad(q, [(0, 0)] * 3 + [(0, width - d)]))
    k = jnp.pad(jnp.moveaxis(k, 1, 2), [(0, 0), (0, 0), (rows, long - m), (0, width - d)])
    if lse is None:
        spans = long // SPAN
        lse = call(_mass_kernel, (q, k), (b, g * blocks, spans, rows // GROUP, cols), spans, "profile_mass")
        lse = jax.nn.logsumexp(lse, 2)
        lse = jnp.where(lse > -jnp.inf, lse, FAR)
    else:
        lse = columns(lse[..., None].astype(jnp.float32), FAR)[..., 0]
    sums = lambda skewed, width, name: call(  # noqa: E731
        _sum_kernel, (q, k, lse), (b, g * blocks, long, width), long // keys, name, skewed
    )
    vertical = sums(False, together, "profile_vertical")
    skewed = sums(True, cols, "profile_diagonals").reshape(b, g * blocks, long, together, GROUP)
    skewed = jnp.pad(skewed, [(0, 0), (0, 0), (GROUP - 1, 0), (0, 0), (0, 0)])
    slash = sum(skewed[:, :, GROUP - 1 - c : GROUP - 1 - c + long, :, c] for c in range(GROUP))
    return heads(vertical), heads(slash)


def diagonals(o: dict, scale: float, interpret=False):
    return body.slanted(o, scale, functools.partial(_kernels, interpret))
