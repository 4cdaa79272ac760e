"""Block-list attention on TPU: the calls of the Mosaic kernels, and their derivative."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import layout, tpu_kernels
from pallas_kernels.flash.layout import LANES, Plan
from pallas_kernels.flash.xla import divide

ROWS, KEYS = 512, 512  # query rows and keys held at a time
VMEM_LIMIT = 48 * 2**20  # of 64 MiB on the smallest of the chips compiled for
FAR = 1e30  # stands for the lse of rows that see nothing: exp(s - FAR) is 0
ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def _block(p: Plan, x, place, memory=pltpu.VMEM):
    """One block per step of a grid for an array [b, heads, blocks, ...]; ``place(*grid)`` -> (batch, row block, block)."""

    def index(*step):
        b, h, i = place(*step)
        return (*tpu_kernels.at(p, x, b, h), i, 0, 0)

    return pl.BlockSpec((None, None, None, *x.shape[3:]), index, memory_space=memory)


def _params(order):
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_LIMIT)


def _by_tile(p: Plan, opt, kernel, rows: dict, keys: dict, outs: dict, scratch: dict, name: str, interpret):
    """Call a kernel whose grid is (batch, row blocks, query tiles); ``rows``: arrays read by block, ``keys``: by unit."""
    tile = lambda *step: step  # noqa: E731
    streamed, buffers = tpu_kernels.key_buffers(p, keys)
    names = [*rows, *keys, *outs, *scratch, *("+" + x for x in streamed), "sem"]
    specs = [_block(p, x, tile, pltpu.SMEM if n == "lists" else pltpu.VMEM) for n, x in rows.items()]
    found = pl.pallas_call(
        functools.partial(kernel, p, opt, tuple(names), tuple(streamed)),
        grid=(p.b, p.blocks, p.tiles),
        in_specs=specs + [ANYWHERE] * len(keys),
        out_specs=[_block(p, x, tile) for x in outs.values()],
        out_shape=list(outs.values()),
        scratch_shapes=[*scratch.values(), *buffers],
        compiler_params=_params(("parallel", "parallel", "arbitrary")),
        name=name,
        interpret=interpret,
    )(*rows.values(), *(keys[x] for x in keys))
    return dict(zip(outs, found, strict=True))


def _split(arranged: dict) -> tuple[dict, dict]:
    """Arranged operands as (by row block, by key unit)."""
    rows = {x: arranged[x] for x in ("lists", "q", "row_int", "row") if x in arranged}
    return rows, {x: arranged[x] for x in ("k", "v", "key_int", "key") if x in arranged}


def _forward(p: Plan, opt, arranged: dict, dtype, interpret):
    rows, keys = _split(arranged)
    grid = (p.b, p.blocks, p.tiles)
    outs = {
        "out": jax.ShapeDtypeStruct((*grid, p.rows, p.dv_pad), dtype),
        "lse": jax.ShapeDtypeStruct((*grid, 1, p.rows), jnp.float32),
    }
    scratch = {x: pltpu.VMEM((p.rows, w), jnp.float32) for x, w in (("top", LANES), ("mass", LANES), ("total", p.dv_pad))}
    found = _by_tile(p, opt, tpu_kernels.forward_kernel, rows, keys, outs, scratch, "flash_forward", interpret)
    out = layout.from_rows(p, found["out"])[..., : p.dv]
    return out, layout.from_rows(p, jnp.swapaxes(found["lse"], 3, 4))[..., 0]


def _query_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    grid = (p.b, p.blocks, p.tiles)
    outs = {"dq": jax.ShapeDtypeStruct((*grid, p.rows, p.d_pad), rows["q"].dtype)}
    scratch = {"d_total": pltpu.VMEM((p.rows, p.d_pad), jnp.float32)}
    if p.row:
        outs["d_row"] = jax.ShapeDtypeStruct((*grid, len(p.row), p.rows), jnp.float32)
        scratch["row_total"] = pltpu.VMEM((len(p.row), p.rows, LANES), jnp.float32)
    return _by_tile(p, opt, tpu_kernels.query_gradient_kernel, rows, keys, outs, scratch, "flash_query_gradient", interpret)


def _key_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    parts = p.blocks // p.g
    chunks, offsets = layout.transpose_lists(p, rows["lists"])
    streamed = {x: a for x, a in rows.items() if x != "lists"}

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
    }
    if p.key_floats:
        facts = len(p.key_floats)
        outs["d_key"] = jax.ShapeDtypeStruct((p.b, p.blocks, p.units, facts, p.unit_lanes), jnp.float32)
        scratch["key_total"] = pltpu.VMEM((facts, p.unit_lanes, LANES), jnp.float32)
    buffers = {"+" + x: pltpu.VMEM((2, *a.shape[3:]), a.dtype) for x, a in streamed.items()}
    buffers |= {"+chunks": pltpu.SMEM((2, *chunks.shape[3:]), jnp.int32)}
    buffers |= {"sem": pltpu.SemaphoreType.DMA((2,)), "chunk_sem": pltpu.SemaphoreType.DMA}
    names = ["offsets", *keys, "chunks", *streamed, *outs, *scratch, *buffers]
    found = pl.pallas_call(
        functools.partial(tpu_kernels.key_gradient_kernel, p, opt, tuple(names), tuple(streamed)),
        grid=(*head, parts),
        in_specs=[_block(p, offsets, whole, pltpu.SMEM)]
        + [_block(p, x, unit) for x in keys.values()]
        + [ANYWHERE] * (1 + len(streamed)),
        out_specs=[_block(p, x, unit) for x in outs.values()],
        out_shape=list(outs.values()),
        scratch_shapes=[*scratch.values(), *buffers.values()],
        compiler_params=_params(("parallel", "parallel", "arbitrary", "arbitrary")),
        name="flash_key_gradient",
        interpret=interpret,
    )(offsets, *keys.values(), chunks, *streamed.values())
    return dict(zip(outs, found, strict=True))


# ---------------------------------------------------------------------------------------------------- differentiation


def _plan(o: dict, opt) -> Plan:
    sublanes = 16 if jnp.bfloat16 in (o["k"].dtype, o["v"].dtype) else 8
    return layout.plan(o, opt, sublanes=sublanes, rows=ROWS, keys=KEYS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _flash(floats: dict, ints: dict, opt, interpret):
    o = floats | ints
    p = _plan(o, opt)
    return _forward(p, opt, layout.arrange_floats(p, o) | layout.arrange_ints(p, o), o["v"].dtype, interpret)


def _fwd(floats, ints, opt, interpret):
    out, lse = _flash(floats, ints, opt, interpret)
    return (out, lse), (floats, ints, out, lse)


def _bwd(opt, interpret, saved, cotangents):
    floats, ints, out, lse = saved
    d_out, d_lse = cotangents
    p = _plan(floats | ints, opt)
    arranged, pull = jax.vjp(lambda f: layout.arrange_floats(p, f | ints), floats)
    rows, keys = _split(arranged | layout.arrange_ints(p, floats | ints))
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_lse
    sums = jnp.stack([jnp.where(jnp.isfinite(lse), lse, FAR), delta], -1)
    rows["do"] = layout.rows_of(p, d_out, p.dv_pad)
    rows["sums"] = jnp.swapaxes(layout.rows_of(p, sums, value=FAR), 3, 4)
    found = _query_gradient(p, opt, rows, keys, interpret)
    found |= _key_gradient(p, opt, rows, keys, interpret)
    grads = {"q": found["dq"]} | {x: _with_spare(found["d" + x]) for x in ("k", "v")}
    if p.row:
        grads["row"] = _summed(found["d_row"], arranged["row"].shape)
    if p.key_floats:
        grads["key"] = _with_spare(_summed(found["d_key"], (*arranged["key"].shape[:2], *found["d_key"].shape[2:])))
    return pull(grads)[0], None


def _with_spare(x):
    """The unit past the end has no gradient."""
    return jnp.pad(x, [(0, 0)] * 2 + [(0, 1)] + [(0, 0)] * (x.ndim - 3))


def _summed(x, shape):
    """Sum over the batch and heads that an array of ``shape`` shares."""
    x = x.sum(0, keepdims=True) if shape[0] == 1 else x
    return x.reshape(x.shape[0], shape[1], x.shape[1] // shape[1], *x.shape[2:]).sum(2)


_flash.defvjp(_fwd, _bwd)


def flash(o: dict, opt, interpret=False):
    """``interpret``: a ``pltpu.InterpretParams`` to run the kernels on a CPU."""
    if (why := layout.unsupported(o, opt)) is not None:
        raise ValueError(f"implementation: 'tpu' does not support {why}")
    return _flash(*divide(o), opt, interpret)
