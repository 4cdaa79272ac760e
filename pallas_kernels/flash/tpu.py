"""Block-list attention on TPU: the calls of the Mosaic kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tuned
from pallas_kernels.flash import layout, tpu_kernels
from pallas_kernels.flash.body import Body, run
from pallas_kernels.flash.layout import LANES, Plan, ceil_to
from pallas_kernels.flash.pairs import at

ROWS, KEYS = 512, 512  # query rows and keys held at a time
VMEM_LIMIT = 48 * 2**20  # of 64 MiB on the smallest of the chips compiled for
ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def block_spec(p: Plan, x, place, memory=pltpu.VMEM):
    """One block per step of a grid for an array [b, heads, blocks, ...] or, of rows by head, [b, heads, pack, blocks, ...];
    ``place(*grid)`` -> (batch, row block, block)."""
    pack = x.shape[2:-3]

    def index(*step):
        b, h, i = place(*step)
        return (*at(p, x, b, h), *(0 for _ in pack), i, 0, 0)

    return pl.BlockSpec((None, None, *pack, None, *x.shape[-2:]), index, memory_space=memory)


def params(order):
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_LIMIT)


def by_tile(p: Plan, opt, kernel, rows: dict, keys: dict, outs: dict, scratch: dict, name: str, interpret, filled=None):
    """Call a kernel whose grid is (batch, row blocks, query tiles); ``rows``: arrays read by block, ``keys``: by unit.
    ``filled`` {row array: output}: outputs that stay in HBM and hold the array's values until the kernel writes."""
    filled = filled or {}
    place = {x: ANYWHERE for pair in filled.items() for x in pair}
    tile = lambda *step: step  # noqa: E731
    streamed, buffers = tpu_kernels.key_buffers(p, keys)
    names = [*rows, *keys, *outs, *scratch, *("+" + x for x in streamed), "sem"]
    memory = {"lists": pltpu.SMEM}
    specs = [place.get(n) or block_spec(p, x, tile, memory.get(n, pltpu.VMEM)) for n, x in rows.items()]
    found = pl.pallas_call(
        functools.partial(kernel, p, opt, tuple(names), tuple(streamed)),
        grid=(p.b, p.blocks, p.tiles),
        in_specs=specs + [ANYWHERE] * len(keys),
        out_specs=[place.get(n) or block_spec(p, x, tile) for n, x in outs.items()],
        out_shape=list(outs.values()),
        input_output_aliases={list(rows).index(x): list(outs).index(y) for x, y in filled.items()},
        scratch_shapes=[*scratch.values(), *buffers],
        compiler_params=params(("parallel", "parallel", "arbitrary")),
        name=name,
        interpret=interpret,
    )(*rows.values(), *(keys[x] for x in keys))
    return dict(zip(outs, found, strict=True))


def _forward(p: Plan, opt, rows: dict, keys: dict, interpret):
    grid = (p.b, p.blocks, p.tiles)
    outs = {
        "out": jax.ShapeDtypeStruct(layout.rows_shape(p, p.dv_pad), keys["v"].dtype),
        "lse": jax.ShapeDtypeStruct((*grid, 1, p.rows), jnp.float32),
    }
    scratch = {x: pltpu.VMEM((p.rows, w), jnp.float32) for x, w in (("top", LANES), ("mass", LANES), ("total", p.dv_pad))}
    return by_tile(p, opt, tpu_kernels.forward_kernel, rows, keys, outs, scratch, "flash_forward", interpret)


def _query_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    grid = (p.b, p.blocks, p.tiles)
    outs = {"dq": jax.ShapeDtypeStruct(layout.rows_shape(p, p.d_pad), rows["q"].dtype)}
    scratch = {"d_total": pltpu.VMEM((p.rows, p.d_pad), jnp.float32)}
    if p.row:
        outs["d_row"] = jax.ShapeDtypeStruct((*grid, len(p.row), p.rows), jnp.float32)
        scratch["row_total"] = pltpu.VMEM((len(p.row), p.rows, LANES), jnp.float32)
    length = layout.list_length(p, rows["lists"])
    if p.weighted:
        outs["d_weight"] = jax.ShapeDtypeStruct((*grid, 1, ceil_to(length, LANES)), jnp.float32)
    found = by_tile(p, opt, tpu_kernels.query_gradient_kernel, rows, keys, outs, scratch, "flash_query_gradient", interpret)
    if p.weighted:
        found["d_weight"] = found["d_weight"][:, :, :, 0, :length]
    return found


def _table_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    shape = p.b, p.blocks, p.tiles, p.units + 1, p.rows, p.unit_lanes
    rows = rows | {"zeros": jnp.zeros(shape, jnp.float32)}
    outs = {"d_table": jax.ShapeDtypeStruct(shape, jnp.float32)}
    scratch = {"pair": pltpu.VMEM((p.rows, p.unit_lanes), jnp.float32), "pair_sem": pltpu.SemaphoreType.DMA}
    kernel = tpu_kernels.table_gradient_kernel
    return by_tile(p, opt, kernel, rows, keys, outs, scratch, "flash_table_gradient", interpret, {"zeros": "d_table"})


def _key_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    parts = p.blocks // p.g
    chunks, offsets = layout.transpose_lists(p, rows["lists"])
    table = {x: a for x, a in keys.items() if x == "table"}
    streamed = {x: a for x, a in rows.items() if x != "lists"} | table
    keys = {x: a for x, a in keys.items() if x != "table"}

    def unit(b, g, u, part):
        return b, g * parts + part, u

    def whole(b, g, u, part):
        return b, g * parts + part, 0

    head = (p.b, p.g, p.units)
    outs = {
        "dk": jax.ShapeDtypeStruct((*head, p.unit_rows, p.d_pad), keys["k"].dtype),
        "dv": jax.ShapeDtypeStruct((*head, p.unit_rows, p.dv_pad), keys["v"].dtype),
    }
    scratch = {
        "dk_total": pltpu.VMEM((p.unit_rows, p.d_pad), jnp.float32),
        "dv_total": pltpu.VMEM((p.unit_rows, p.dv_pad), jnp.float32),
        "clean_k": pltpu.VMEM((p.unit_rows, p.d_pad), keys["k"].dtype),
        "clean_v": pltpu.VMEM((p.unit_rows, p.dv_pad), keys["v"].dtype),
    }
    if p.key_floats:
        facts = len(p.key_floats)
        outs["d_key"] = jax.ShapeDtypeStruct((p.b, p.blocks, p.units, facts, p.unit_lanes), jnp.float32)
        scratch["key_total"] = pltpu.VMEM((facts, p.unit_lanes, LANES), jnp.float32)
    buffers = tpu_kernels.row_buffers(p, streamed, chunks)
    names = ["offsets", *keys, "chunks", *streamed, *outs, *scratch, *buffers]
    found = pl.pallas_call(
        functools.partial(tpu_kernels.key_gradient_kernel, p, opt, tuple(names), tuple(streamed)),
        grid=(*head, parts),
        in_specs=[block_spec(p, offsets, whole, pltpu.SMEM)]
        + [block_spec(p, x, unit) for x in keys.values()]
        + [ANYWHERE] * (1 + len(streamed)),
        out_specs=[block_spec(p, x, unit) for x in outs.values()],
        out_shape=list(outs.values()),
        scratch_shapes=[*scratch.values(), *buffers.values()],
        compiler_params=params(("parallel", "parallel", "arbitrary", "arbitrary")),
        name="flash_key_gradient",
        interpret=interpret,
    )(offsets, *keys.values(), chunks, *streamed.values())
    return dict(zip(outs, found, strict=True))


def _plan(o: dict, opt) -> Plan:
    sublanes = 16 if jnp.bfloat16 in (o["k"].dtype, o["v"].dtype) else 8
    whole = lambda n: ceil_to(n, LANES)  # noqa: E731
    shape = _tuned.width(o["q"].shape[3], o["v"].shape[3])
    held = _tuned.sizes("flash", "tpu", shape, o["q"].dtype, {"rows": ROWS, "keys": KEYS})
    return layout.plan(
        o, opt, **held, pad_rows=whole, pad_unit=lambda n: ceil_to(n, sublanes), pad_lanes=whole, pad_width=whole, raw=sublanes
    )


BODY = Body("tpu", _plan, _forward, _query_gradient, _key_gradient, _table_gradient)


def flash(o: dict, opt, interpret=False):
    """``interpret``: a ``pltpu.InterpretParams`` to run the kernels on a CPU."""
    return run(BODY, o, opt, interpret)
