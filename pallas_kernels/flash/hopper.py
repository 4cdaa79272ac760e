"""Block-list attention on Hopper GPUs: Mosaic GPU kernels (forward, queries' gradient, keys' gradient of heads up to 64; the
keys' gradient of wider heads is the Triton body's).

For bfloat16 and float16 with heads up to 128 (padded to 64 or 128); units under 64 keys become live ranges of larger ones.
Not for per-row and per-key floats: the Triton body takes those. The kernels compile for an H200 and agree with the reference
in JAX's GPU interpreter (warp groups, barriers and copies as threads; matrix products as XLA's), and have not run on a device
yet: a call without a name never gets them. Known of the tool chain: ptxas 12.8 up to 12.9.0 miscompiles selections on the
layout of wgmma; where CUDA says it is one of those (12.9.1 says 12.9, too), masks are refused, as JAX does in its own kernel.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash import gpu, layout
from pallas_kernels.flash import hopper_kernels as kernels
from pallas_kernels.flash.body import Body, run
from pallas_kernels.flash.hopper_kernels import ROWS, STAGES
from pallas_kernels.flash.layout import Plan, ceil_to

HOPPER, WIDEST = "9.0", 128
MISCOMPILES = range(12080, 12091)  # versions of CUDA, 1000 major + 10 minor
GROUPS = 2  # warp groups that multiply, at most
FORWARD, QUERIES, KEYS = 128, 128, 64  # keys, keys and rows of a step


# What Mosaic GPU has no rule for, of the operations that the other bodies take.
UNKNOWN = frozenset("log1p sqrt pow copy add_any stop_gradient reshape squeeze reduce_sum".split())


def _blocks(most: int):
    return lambda n: ROWS if n <= ROWS else ceil_to(n, most)


def _plan(o: dict, opt) -> Plan:
    pad = _blocks(GROUPS * ROWS)
    return layout.plan(o, opt, rows=GROUPS * ROWS, keys=FORWARD, pad_rows=pad, pad_unit=pad, pad_lanes=pad, pad_width=pad)


def _groups(size: int) -> int:
    return min(GROUPS, size // ROWS)


def _call(p: Plan, opt, kernel, groups: int, part: int, operands: dict, outs: dict, scratch: dict, grid, name: str, interpret):
    def flat(x):
        return math.prod(x.shape[:-1]), x.shape[-1]

    shapes = {x: jax.ShapeDtypeStruct(a.shape, a.dtype) for x, a in operands.items()} | outs
    interpret = interpret or None
    found = plgpu.kernel(
        functools.partial(kernel, p, opt, groups, part, interpret, shapes),
        out_type=[jax.ShapeDtypeStruct(flat(x), x.dtype) for x in outs.values()],
        scratch_types=scratch,
        grid=grid,
        grid_names=("x", "heads", "batch"),
        num_threads=groups + 1,
        thread_name="wg",
        kernel_name=name,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*(a.reshape(flat(a)) for a in operands.values()))
    return {x: a.reshape(outs[x].shape) for x, a in zip(outs, found, strict=True)}


def _shape(dtype, *size):
    return jax.ShapeDtypeStruct(size, dtype)


def _barriers(groups: int, own: int, **streams) -> dict:
    """Barriers of the group's own rows (copies each) and of streams {name: copies per slot}."""
    found = {"own_in": plgpu.Barrier(num_arrivals=own, num_barriers=groups)}
    for name, copies in streams.items():
        found[name + "_in"] = plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES)
        found[name + "_free"] = plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES)
    return found


def _over_keys(p: Plan, rows: dict, keys: dict, part: int):
    """What the kernels that walk lists share: (operands, groups, keys of a part, grid, buffers)."""
    groups, part = _groups(p.rows), min(part, p.unit_rows)
    held, fields = part * p.step, len(p.query_fields)
    grid = (p.tiles * (p.rows // (groups * ROWS)), p.blocks, p.b)
    buffers = {
        "q": plgpu.SMEM((groups, ROWS, p.d_pad), keys["k"].dtype),
        "k": plgpu.SMEM((STAGES, held, p.d_pad), keys["k"].dtype),
        "v": plgpu.SMEM((STAGES, held, p.dv_pad), keys["v"].dtype),
        "own": plgpu.SMEM((groups, max(fields, 1), ROWS), jnp.int32),
        "facts": plgpu.SMEM((STAGES, 1 + fields, held), jnp.int32),
    }
    return rows | keys, groups, part, grid, buffers


def _forward(p: Plan, opt, rows: dict, keys: dict, interpret):
    operands, groups, part, grid, scratch = _over_keys(p, rows, keys, FORWARD)
    block, fields = (p.b, p.blocks, p.tiles), len(p.query_fields)
    outs = {"out": _shape(keys["v"].dtype, *block, p.rows, p.dv_pad), "lse": _shape(jnp.float32, *block, 1, p.rows)}
    scratch |= {"out": plgpu.SMEM((groups, ROWS, p.dv_pad), keys["v"].dtype), "lse": plgpu.SMEM((groups, ROWS), jnp.float32)}
    scratch |= _barriers(groups, 1 + fields, k=(2 + fields) * p.step, v=p.step)
    scratch |= {"turn": plgpu.Barrier(num_arrivals=groups)} if groups > 1 else {}
    return _call(p, opt, kernels.forward, groups, part, operands, outs, scratch, grid, "flash_forward", interpret)


def _query_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    operands, groups, part, grid, scratch = _over_keys(p, rows, keys, QUERIES)
    fields = len(p.query_fields)
    outs = {"dq": _shape(rows["q"].dtype, p.b, p.blocks, p.tiles, p.rows, p.d_pad)}
    scratch |= {
        "do": plgpu.SMEM((groups, ROWS, p.dv_pad), rows["do"].dtype),
        "sums": plgpu.SMEM((groups, 2, ROWS), jnp.float32),
    } | _barriers(groups, 4 + fields, k=(2 + fields) * p.step, v=p.step)
    return _call(p, opt, kernels.query_gradient, groups, part, operands, outs, scratch, grid, "flash_query_gradient", interpret)


def _key_gradient(p: Plan, opt, rows: dict, keys: dict, interpret):
    if max(p.d_pad, p.dv_pad) > ROWS:  # two sums of 128 columns: 72 bytes of registers would spill here
        return gpu.BODY.key_gradient(p, opt, rows, keys, bool(interpret))
    chunks, offsets = layout.transpose_lists(p, rows["lists"])
    operands = {x: a for x, a in rows.items() if x != "lists"} | keys | {"chunks": chunks, "offsets": offsets}
    groups, part, fields, dtype = _groups(p.unit_rows), min(KEYS, p.rows), len(p.query_fields), keys["k"].dtype
    unit = (p.b, p.g, p.units, p.unit_rows)
    outs = {"dk": _shape(dtype, *unit, p.d_pad), "dv": _shape(keys["v"].dtype, *unit, p.dv_pad)}
    scratch = {
        "k": plgpu.SMEM((groups, ROWS, p.d_pad), dtype),
        "v": plgpu.SMEM((groups, ROWS, p.dv_pad), dtype),
        "q": plgpu.SMEM((STAGES, part, p.d_pad), dtype),
        "do": plgpu.SMEM((STAGES, part, p.dv_pad), dtype),
        "sums": plgpu.SMEM((STAGES, 2, part), jnp.float32),
        "own": plgpu.SMEM((groups, 1 + fields, ROWS), jnp.int32),
        "facts": plgpu.SMEM((STAGES, max(fields, 1), part), jnp.int32),
    } | _barriers(groups, 3 + fields, q=3 + fields, do=1)
    grid = (p.units * (p.unit_rows // (groups * ROWS)), p.g, p.b)
    return _call(p, opt, kernels.key_gradient, groups, part, operands, outs, scratch, grid, "flash_key_gradient", interpret)


def _refuses(o: dict, opt) -> str | None:
    for name in ("q", "k", "v"):
        if o[name].dtype == jnp.float32:
            return "float32: expected bfloat16 or float16, which the tensor cores multiply"
    if (width := max(o["q"].shape[3], o["v"].shape[3])) > WIDEST:
        return f"heads of {width}: expected at most {WIDEST}"
    if o.get("key_bias") is not None or opt.score_mod is not None and (o.get("row") or o.get("key")):
        return "floats per row or per key (key_bias, and what score_mod reads besides the fields)"
    if jax.default_backend() in ("gpu", "cuda"):
        found = getattr(jax.devices()[0], "compute_capability", None)
        if found != HOPPER:
            return f"a device of compute capability {found}: expected {HOPPER}"
        version = cuda_version(jax.devices()[0].client.platform_version)
        if opt.mask is not None and version in MISCOMPILES:
            return f"masks with CUDA {version // 1000}.{version % 1000 // 10}, whose ptxas miscompiles them: expected another"
    return None


def cuda_version(platform: str) -> int | None:
    """12090 of "PJRT C API\ncuda 12090"."""
    found = re.search(r"cuda (\d+)", platform)
    return found and int(found[1])


BODY = Body("hopper", _plan, _forward, _query_gradient, _key_gradient, half=True, least=ROWS, missing=UNKNOWN, refuses=_refuses)


def flash(o: dict, opt, interpret=False):
    """``interpret``: parameters of JAX's GPU interpreter, to run the kernels on a CPU."""
    return run(BODY, o, opt, interpret)
