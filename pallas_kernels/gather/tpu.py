"""Attention over lists on TPU: the calls of the Mosaic kernels.

Units that are whole tiles of memory (8 keys, 16 in bfloat16) are copied as they lie in the cache. Decoding with token
lists copies the tile around each token and hides the others: 2 x 8 (16) rows per token, no pass over the cache. Token lists
of many queries are worth one pass over the keys that puts k and v of a key in one row: then a token is one copy, and
issuing copies, a few tens of scalar instructions each, is what such a call costs: about 25 ns a token at 1 GHz, whatever
the head size. Such calls take one kv head and ``PART`` listed keys at a time, so that rows, sums and tables are small. The
gradient of the form without lists runs in XLA, as do products of float64.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.layout import _pad, ceil_to
from pallas_kernels.flash.pairs import FAR
from pallas_kernels.gather import lists, rotary, tpu_kernels, xla
from pallas_kernels.gather.body import Body, heads_first, run
from pallas_kernels.gather.lists import Shape
from pallas_kernels.gather.tpu_kernels import LANES, Plan

KEYS, PACKED_KEYS, FULL_KEYS = 512, 256, 2048  # per loop step, or per block of all keys
STRETCH = 2048  # listed keys (at least a loop step) per grid step
LISTS = 8  # per grid step, where every query has its own
PART = 2**22  # listed keys of a call where every query has its own: tables of all are written out for it
VMEM_LIMIT = 48 * 2**20
ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def _sublanes(dtype) -> int:
    return 16 if dtype == jnp.bfloat16 else 8


def _packed(dtype, s: Shape) -> bool:
    return not s.full and s.unit % _sublanes(dtype) != 0


def _plan(s: Shape, opt, rows: dict) -> Plan:
    per_head = any(rows[x].shape[2] > 1 for x in ("index", "add", "turn") if x in rows)
    pack = 1 if per_head else s.r
    tile = s.tile if s.tile == 1 else ceil_to(s.tile, 8)
    packed = _packed(rows["q"].dtype, s)
    if s.full:
        s_unit, copies = 1, min(FULL_KEYS, ceil_to(s.m, LANES))  # a block of the grid, read where it lies
    else:
        s_unit, base = s.unit, math.lcm(s.unit, LANES) // s.unit
        most = PACKED_KEYS if packed else KEYS
        copies = base * max(1, min(most // (base * s_unit), -(-s.entries // base)))
    stretch = copies * max(1, min(STRETCH // (copies * s_unit), -(-s.entries // copies)))
    if stretch < s.entries:
        stretch = ceil_to(stretch, math.lcm(copies, LANES))  # a block of a longer table is whole lanes
    d, dv = s.d, s.dv
    if packed:
        d = dv = ceil_to(max(d, dv), LANES)
    pairs = rows["freqs"].shape[0] if "turn" in rows else 0
    return Plan(s, pack, tile, ceil_to(pack * tile, 8), 1 if s.rows == 1 else LISTS, stretch, copies, packed, d, dv,
                opt.rope_layout, opt.rope_scale, pairs)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- arrangement


def _blocks(p: Plan, x, width: int, value=0):
    """[b, g, r, rows, tile, E] -> [b, blocks, rows, block rows, width]."""
    s = p.s
    x = _pad(x, 4, p.tile, value)
    x = x.reshape(s.b, s.h // p.pack, p.pack, s.rows, p.tile, x.shape[5])
    x = jnp.moveaxis(x, 2, 3).reshape(s.b, s.h // p.pack, s.rows, p.pack * p.tile, x.shape[5])
    return _pad(_pad(x, 3, p.rows, value), 4, width)


def _from_blocks(p: Plan, x):
    """[b, blocks, rows, block rows, E] -> [b, g, r, rows, tile, E]."""
    s = p.s
    x = x[:, :, :, : p.pack * p.tile].reshape(s.b, s.h // p.pack, s.rows, p.pack, p.tile, x.shape[4])
    return jnp.moveaxis(x, 3, 2).reshape(s.b, s.g, s.r, s.rows, p.tile, x.shape[5])[:, :, :, :, : s.tile]


def _pair(x):
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _length(p: Plan) -> int:
    """Places of a table in list order, filled up to whole stretches."""
    return p.stretches * (p.width if p.s.full else p.stretch * p.s.unit)


def _tables(p: Plan, rows: dict) -> dict:
    """Counts and indices for the scalar memory, facts in list order for the vector memory."""
    s, out = p.s, {}
    if not s.full:
        count = jnp.broadcast_to(rows["count"], (*rows["count"].shape[:3], s.rows))
        count = _pad(_pair(count), 2, p.groups * p.lists)
        out["count"] = count.reshape(*count.shape[:2], p.groups, 1, p.lists)
        out["index"] = _pad(_pair(rows["index"]), 3, p.stretches * p.stretch)
    if "add" in rows:
        add = _pad(_pair(rows["add"]), 4, _length(p), -jnp.inf)
        tile = p.tile if add.shape[3] > 1 else 1
        out["add"] = _pad(add[:, :, 0], 2, tile, -jnp.inf) if s.rows == 1 else _every_row(add[:, :, :, 0], s)
    if "turn" in rows:
        turn = _pad(_pair(rows["turn"]), 3, _length(p))
        out["turn"] = turn if s.rows == 1 else _every_row(turn, s)
        out["freqs"] = rotary.channels(rows["freqs"], p.d, p.layout)[None]
    return out


def _every_row(x, s: Shape):
    return jnp.broadcast_to(x, (*x.shape[:2], s.rows, x.shape[3]))


def _keys(o: dict, opt, s: Shape) -> dict:
    k, v = (heads_first(o[x]) for x in ("k", "v"))
    if s.full:
        return {"k": k, "v": v}
    if not _packed(k.dtype, s):
        cut = lambda x: _pad(x, 2, s.units * s.unit).reshape(*x.shape[:2], s.units, s.unit, x.shape[3])  # noqa: E731
        return {"k": cut(k), "v": cut(v)}
    width = ceil_to(max(s.d, s.dv), LANES)
    k, v = _pad(k, 3, width), _pad(v, 3, width)
    if k.dtype == jnp.bfloat16:  # a word holds a channel of k and the same channel of v
        low, high = (lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) for x in (k, v))
        rows = lax.bitcast_convert_type(low | (high << 16), jnp.int32)
    else:
        rows = jnp.concatenate([k, v], -1)
    return {"kv": rows[:, :, :, None]}


# -------------------------------------------------------------------------------------------------------------- calls


def _spec(p: Plan, name: str, x):
    """The block of an operand or output at a step of the grid (batch, head blocks, groups of lists, stretches)."""
    blocks = p.s.h // p.pack
    head = lambda b, h: tpu_kernels.at(x, b, h, blocks)  # noqa: E731
    if name in ("k", "v") and p.s.full:
        g = lambda h: lax.div(h, blocks // p.s.g)  # noqa: E731
        width = (None, None, p.width, x.shape[3])
        return pl.BlockSpec(width, lambda b, h, i, e: (b if x.shape[0] > 1 else 0, g(h), e, 0))
    if name in ("k", "v", "kv", "dk", "dv", "dkv"):
        return ANYWHERE
    if name == "freqs":
        return pl.BlockSpec(x.shape, lambda b, h, i, e: (0, 0))
    if name == "count":
        place = lambda b, h, i, e: (*head(b, h), i, 0, 0)  # noqa: E731
        return pl.BlockSpec((None, None, None, 1, p.lists), place, memory_space=pltpu.SMEM)
    if name == "index":
        place = lambda b, h, i, e: (*head(b, h), i, e)  # noqa: E731
        return pl.BlockSpec((None, None, p.lists, p.stretch), place, memory_space=pltpu.SMEM)
    keys = p.width if p.s.full else p.stretch * p.s.unit
    if name in ("add", "turn", "d_add"):
        size = x.shape[2] if p.s.rows == 1 else p.lists
        return pl.BlockSpec((None, None, size, keys), lambda b, h, i, e: (*head(b, h), i if p.s.rows > 1 else 0, e))
    if name == "logits":
        return pl.BlockSpec((None, None, p.lists, p.rows, keys), lambda b, h, i, e: (b, h, i, 0, e))
    return pl.BlockSpec((None, None, p.lists, *x.shape[3:]), lambda b, h, i, e: (b, h, i, 0, 0))


def _call(p: Plan, opt, kernel, operands: dict, outs: dict, scratch: dict, name: str, interpret, aliases=()):
    order = list(operands)
    inner = [*("in:" + x if x in aliases else x for x in order), *outs, *scratch]
    shared = any(x in outs and outs[x].shape[0] == 1 for x in ("dk", "dkv"))  # a pool: batch rows add to the same keys
    kinds = ("arbitrary" if shared else "parallel", "arbitrary" if aliases else "parallel", "arbitrary", "arbitrary")
    found = pl.pallas_call(
        functools.partial(kernel, p, opt, tuple(inner)),
        grid=(p.s.b, p.s.h // p.pack, p.groups, p.stretches),
        in_specs=[_spec(p, x, a) for x, a in operands.items()],
        out_specs=[_spec(p, x, a) for x, a in outs.items()],
        out_shape=list(outs.values()),
        scratch_shapes=list(scratch.values()),
        input_output_aliases={order.index(x): list(outs).index(x) for x in aliases},
        compiler_params=pltpu.CompilerParams(dimension_semantics=kinds, vmem_limit_bytes=VMEM_LIMIT),
        name=name,
        interpret=interpret,
    )(*operands.values())
    return dict(zip(outs, found, strict=True))


def _buffers(p: Plan, keys: dict) -> dict:
    if p.s.full:
        return {}
    buffers = {"+" + x: pltpu.VMEM((2, p.copies, *a.shape[3:]), a.dtype) for x, a in keys.items()}
    return buffers | {"sem": pltpu.SemaphoreType.DMA((2,))}


def _shape(dtype, *size):
    return jax.ShapeDtypeStruct(size, dtype)


def _forward(s: Shape, opt, rows: dict, keys: dict, interpret=False):
    p = _plan(s, opt, rows)
    block = (s.b, s.h // p.pack, s.rows)
    dtype = next(iter(keys.values())).dtype if s.full or not p.packed else rows["q"].dtype
    outs = {"out": _shape(dtype, *block, p.rows, p.dv), "lse": _shape(jnp.float32, *block, p.rows, 1)}
    if opt.sums is not None:
        outs["logits"] = _shape(jnp.float32, *block, p.rows, _length(p))
    wide = {"top": LANES, "mass": LANES, "total": p.dv}
    scratch = {x: pltpu.VMEM((p.lists, p.rows, w), jnp.float32) for x, w in wide.items()}
    operands = {"q": _blocks(p, rows["q"], p.d)} | _tables(p, rows) | keys
    found = _call(p, opt, tpu_kernels.forward_kernel, operands, outs, scratch | _buffers(p, keys), "gather_forward", interpret)
    logits = None
    if opt.sums is not None:
        logits = _from_blocks(p, found["logits"])[..., : s.length]
    return _from_blocks(p, found["out"])[..., : s.dv], _from_blocks(p, found["lse"])[..., 0], logits


def _backward(s: Shape, opt, rows: dict, keys: dict, totals: dict, wants: bool, interpret=False):
    if s.full:
        return xla.BODY.backward(s, opt, rows, keys, totals, wants)
    p = _plan(s, opt, rows)
    block = (s.b, s.h // p.pack, s.rows)
    operands = {"q": _blocks(p, rows["q"], p.d), "do": _blocks(p, rows["do"], p.dv)}
    operands |= {"lse": _blocks(p, rows["lse"][..., None], 1, FAR), "delta": _blocks(p, rows["delta"][..., None], 1)}
    operands |= _tables(p, rows) | keys | totals
    outs = {"dq": _shape(jnp.float32, *block, p.rows, p.d)} | {x: _shape(a.dtype, *a.shape) for x, a in totals.items()}
    if wants:
        size = operands["add"].shape[2]
        outs["d_add"] = _shape(jnp.float32, *block[:2], size, _length(p))
    scratch = {"dq_total": pltpu.VMEM((p.lists, p.rows, p.d), jnp.float32)} | _buffers(p, keys)
    scratch |= {"+" + x: pltpu.VMEM((p.copies, *a.shape[3:]), a.dtype) for x, a in totals.items()}
    scratch["back_sem"] = pltpu.SemaphoreType.DMA
    kernel = tpu_kernels.backward_kernel
    found = _call(p, opt, kernel, operands, outs, scratch, "gather_backward", interpret, aliases=tuple(totals))
    d_add = _d_add(p, rows["add"], found["d_add"]) if wants else None
    dq = _from_blocks(p, found["dq"])[..., : s.d]
    return dq, d_add, {x: found[x] for x in totals}


def _d_add(p: Plan, add, found):
    """[b, blocks, rows | tile, L] as the gradient of the table [b', g', r', rows, tile', L]."""
    s = p.s
    found = found[..., : s.length]
    found = found[:, :, None, : add.shape[4]] if s.rows == 1 else found[:, :, :, None]
    found = found.reshape(s.b, s.g, -1, *found.shape[2:])
    axes = tuple(i for i in range(6) if add.shape[i] == 1 and found.shape[i] > 1)
    return found.sum(axes, keepdims=True)


def _zeros(o: dict, opt, s: Shape) -> dict:
    """Totals of the keys' gradients, with spare units for entries that are not in use."""
    if s.full:
        return xla.BODY.zeros(o, opt, s)
    bk, spare = o["k"].shape[0], max(LANES, KEYS)
    if _packed(o["k"].dtype, s):
        return {"dkv": jnp.zeros((bk, s.g, s.m + spare, 1, 2 * ceil_to(max(s.d, s.dv), LANES)), jnp.float32)}
    size = (bk, s.g, s.units + spare // s.unit + LANES, s.unit)
    return {"d" + x: jnp.zeros((*size, w), jnp.float32) for x, w in (("k", s.d), ("v", s.dv))}


def _finish(o: dict, s: Shape, totals: dict):
    if s.full:
        return xla.BODY.finish(o, s, totals)
    if "dkv" in totals:
        half = totals["dkv"].shape[-1] // 2
        parts = (totals["dkv"][..., : s.d], totals["dkv"][..., half : half + s.dv])
    else:
        parts = (totals["dk"], totals["dv"])
    return tuple(jnp.moveaxis(x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, : s.m], 1, 2) for x in parts)


def _rows_at_once(o: dict, opt, s: Shape) -> int:
    return 0 if s.rows == 1 else max(LISTS, PART // (s.length * o["index"].shape[1]) // LISTS * LISTS)


@functools.cache
def _body(interpret) -> Body:
    return Body(_keys, functools.partial(_forward, interpret=interpret), functools.partial(_backward, interpret=interpret),
                _zeros, _finish, _rows_at_once, True, True)  # fmt: skip


def _by_tiles(o: dict, opt, body: Body):
    """A token list as a list of the tiles of memory around its tokens, the other tokens hidden."""
    sub = _sublanes(o["k"].dtype)
    place = o["index"] % sub
    wide = o | {"index": jnp.where(o["index"] >= 0, o["index"] // sub, -1), "bounds": jnp.stack([place, place + 1], -1)}
    if o.get("bounds") is not None:
        low, high = o["bounds"][..., 0], o["bounds"][..., 1]
        wide["bounds"] = jnp.where(((low <= 0) & (high > 0))[..., None], wide["bounds"], 0)
    if o.get("pos") is not None:
        wide["pos"] = o["pos"] - place
    out, lse, sums = run(body, wide, dataclasses.replace(opt, unit=sub))
    if sums is not None:
        (b, h, n, _), at = sums.shape, jnp.repeat(place, sums.shape[1] // place.shape[1], axis=1)
        sums = sums.reshape(b, h, n, -1, sub)
        sums = jnp.take_along_axis(sums, jnp.broadcast_to(at, sums.shape[:4])[..., None], axis=-1)[..., 0]
    return out, lse, sums


def _by_token(o: dict, opt, s: Shape):
    """(operands, options) with units that are not whole tiles of memory as lists of their tokens, in the same order."""
    part = jnp.arange(s.unit, dtype=jnp.int32)
    flat = lambda x: x.reshape(*x.shape[:3], -1)  # noqa: E731
    index = o["index"][..., None] * s.unit + part
    if o.get("bounds") is not None:
        index = jnp.where((part >= o["bounds"][..., :1]) & (part < o["bounds"][..., 1:]), index, s.m)
    index = jnp.where(o["index"][..., None] < s.units, index, s.m)
    tokens = {"index": flat(index), "count": o["count"] * s.unit, "bounds": None}
    if o.get("log_weight") is not None:
        tokens["log_weight"] = jnp.repeat(o["log_weight"], s.unit, axis=-1)
    if o.get("pos") is not None:
        tokens["pos"] = flat(o["pos"][..., None] + part)
    return o | tokens, dataclasses.replace(opt, unit=1)


def gather(o: dict, opt, interpret=False):
    """``interpret``: a ``pltpu.InterpretParams`` to run the kernels on a CPU."""
    if (why := lists.unsupported(o, opt, "tpu")) is not None:
        raise ValueError(f"implementation: 'tpu' does not support {why}")
    s, body = lists.shape_of(o, opt), _body(interpret)
    if opt.unit > 1 and _packed(o["k"].dtype, s):
        o, opt = _by_token(o, opt, s)
    if not s.full and opt.unit == 1 and s.rows == 1 and s.m % _sublanes(o["k"].dtype) == 0:
        return _by_tiles(o, opt, body)
    return run(body, o, opt)
