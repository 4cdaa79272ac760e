"""Linear attention on TPU: three Mosaic kernels that walk a head's chunks with its state in vector memory.

A core runs the steps of a grid one after the other, so nothing is gained by computing all states first: one sweep reads
q, k and v once and never writes a state but the last. The queries' gradient is a second forward sweep that builds the
states again, the gradients of keys, values and decays a sweep from the end that carries the state's gradient. A step works
on one chunk of a few heads, whose chains of products are independent and fill each other's gaps; query heads of one kv
head share its keys and values. States are kept transposed, [Dv, F], so that decays scale them by rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.layout import LANES, ceil_to
from pallas_kernels.flash.pairs import NN, NT, dot
from pallas_kernels.linear import body
from pallas_kernels.linear.body import Body, Plan
from pallas_kernels.linear.decays import (
    Weights,
    grown,
    index,
    of_channels,
    of_tokens,
    products,
    products_gradient,
    scaled,
    second_half,
)
from pallas_kernels.linear.reference import floored

TN = ((0,), (0,))
CHUNKS = {None: (128, 256), "token": (128, 256), "channel": (128,)}
SUBLANES = 8
MOST = 4  # query heads of a step
ENTRIES = 2**19  # of the states that are held: 16 bytes each, as they are read and written behind the work
STATES = ("state", "end", "d_state", "d_end")
VMEM_LIMIT = 48 * 2**20  # of 64 MiB on the smallest of the chips compiled for


def _swap(x, b: int):
    size = x.shape[0]
    return jnp.where(second_half(x.shape, b), pltpu.roll(x, b, 0), pltpu.roll(x, size - b, 0))


def _weights(p: Plan, r: dict, h: int, later: int) -> Weights:
    """Of head ``h`` of this step."""
    if p.decay is None:
        return Weights()
    if p.decay == "channel":
        return of_channels(floored(r["d"][h]), _swap)
    rows = [r["d"][h, i : i + 1, :] for i in (0, 1)]
    half = (LANES // 2, p.chunk)
    turned = jnp.concatenate([jnp.broadcast_to(x, half) for x in rows], 0).T
    return of_tokens(rows, [turned[:, i : i + 1] for i in (0, LANES // 2)], later)


def _next(s, x, y, w: Weights):
    """The state behind a chunk: [Dv, F] from x [C, Dv] and y [C, F]."""
    return grown(s, w.through) + dot(x, y, TN)


def _heads(p: Plan):
    """(kv head, query head) of each pair of a step."""
    return [(j, j * p.r + i) for j in range(p.pack) for i in range(p.r)]


def _start(r: dict, held: str, given: str):
    @pl.when(pl.program_id(2) == 0)
    def _():
        r[held][...] = r[given][...]


def _forward_kernel(p: Plan, names, *refs):
    r = dict(zip(names, refs, strict=True))
    _start(r, "end", "state")
    for j, h in _heads(p):
        q, k, v, s = r["q"][h], r["k"][j], r["v"][j], r["end"][h]
        w = _weights(p, r, h, 0)
        out = dot(products(q, k, w, 0).astype(v.dtype), v, NN) + dot(scaled(q, w.enter), s.astype(q.dtype), NT)
        r["out"][h] = (out * p.scale).astype(v.dtype)
        r["end"][h] = _next(s, v, scaled(k, w.leave), w)


def _query_gradient_kernel(p: Plan, names, *refs):
    r = dict(zip(names, refs, strict=True))
    _start(r, "s", "state")
    for j, h in _heads(p):
        k, v, do, s = r["k"][j], r["v"][j], r["do"][h], r["s"][h]
        w = _weights(p, r, h, 0)
        dq = products_gradient(dot(do, v, NT), k, w, 0) + grown(dot(do, s.astype(do.dtype), NN), w.enter)
        r["dq"][h] = (dq * p.scale).astype(k.dtype)
        r["s"][h] = _next(s, v, scaled(k, w.leave), w)


def _key_gradient_kernel(p: Plan, names, *refs):
    r = dict(zip(names, refs, strict=True))
    _start(r, "d_state", "d_end")
    if p.decay:

        @pl.when(pl.program_id(2) == 0)
        def _():
            r["later"][...] = jnp.zeros_like(r["later"])

    for j in range(p.pack):
        dk, dv = (jnp.zeros(r[x].shape[1:], jnp.float32) for x in ("k", "v"))
        for i in range(p.r):
            more = _keys_of_head(p, r, j, j * p.r + i)
            dk, dv = dk + more[0], dv + more[1]
        r["dk"][j] = dk.astype(r["dk"].dtype)
        r["dv"][j] = dv.astype(r["dv"].dtype)


def _keys_of_head(p: Plan, r: dict, j: int, h: int):
    """What query head ``h`` adds to the gradients of keys and values."""
    q, k, v, do, ds = r["q"][h], r["k"][j], r["v"][j], r["do"][h], r["d_state"][h]
    w = _weights(p, r, h, 1)
    low = ds.astype(k.dtype)
    prob = (products(k, q, w, 1) * p.scale).astype(v.dtype)
    dv = dot(prob, do, NN) + dot(scaled(k, w.leave), low, NT)
    dk = products_gradient(dot(v, do, NT) * p.scale, q, w, 1) + grown(dot(v, low, NN), w.leave)
    r["d_state"][h] = _next(ds, do, scaled(q, p.scale if w.enter is None else w.enter * p.scale), w)
    if p.decay:
        change = q.astype(jnp.float32) * r["dq"][h].astype(jnp.float32) - k.astype(jnp.float32) * dk
        total, first = _from_behind(p, change, r["later"][h])
        r["dd"][h] = total
        r["later"][h] = jnp.broadcast_to(first, r["later"].shape[1:])
    return dk, dv


def _from_behind(p: Plan, change, later):
    """Sums of ``change`` from each token on, ``later`` being those behind the chunk: ([1, C] or [C, F], the first)."""
    if p.decay == "token":
        behind = (index((p.chunk, p.chunk), 0) >= index((p.chunk, p.chunk), 1)).astype(jnp.float32)
        row = dot(jnp.ones((SUBLANES, p.f_pad), jnp.float32), change, NT)
        total = dot(row, behind, NN)[:1] + later[:1, :1]
        return total, total[:, :1]
    for b in (1 << x for x in range(p.chunk.bit_length() - 1)):
        inside = index(change.shape, 0) < p.chunk - b
        change = change + jnp.where(inside, pltpu.roll(change, p.chunk - b, 0), 0.0)
    total = change + later[:1]
    return total, total[:1]


# -------------------------------------------------------------------------------------------------------------- calls


def _spec(p: Plan, x, name: str, reverse: bool):
    """One block per step of the grid (batch, heads of a step, chunks)."""
    heads, shared = p.pack * p.r, 1
    if name in ("k", "v", "dk", "dv"):
        heads = p.pack
        shared = p.groups // x.shape[1]  # steps that read the same keys

    def at(b, g, c):
        c = p.chunks - 1 - c if reverse else c
        place = (0, 0) if name in STATES else (0, c) if p.decay == "token" and name in ("d", "dd") else (c, 0)
        return (b if x.shape[0] > 1 else 0, lax.div(g, shared) if shared > 1 else g, *place)

    rows, width = x.shape[2:]
    if name not in STATES:
        rows, width = (rows, p.chunk) if p.decay == "token" and name in ("d", "dd") else (p.chunk, width)
    return pl.BlockSpec((None, heads, rows, width), at)


def _call(p: Plan, kernel, x: dict, outs: dict, scratch: dict, name: str, interpret, reverse=False):
    found = pl.pallas_call(
        functools.partial(kernel, p, (*x, *outs, *scratch)),
        grid=(p.b, p.groups // p.pack, p.chunks),
        in_specs=[_spec(p, a, k, reverse) for k, a in x.items()],
        out_specs=[_spec(p, a, k, reverse) for k, a in outs.items()],
        out_shape=list(outs.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=name,
        interpret=interpret,
    )(*x.values())
    return dict(zip(outs, found, strict=True))


def _shape(dtype, *size):
    return jax.ShapeDtypeStruct(size, dtype)


def _states(p: Plan):
    return _shape(jnp.float32, p.b, p.h, p.dv_pad, p.f_pad)


def _forward(p: Plan, x: dict, interpret):
    outs = {"out": _shape(x["v"].dtype, p.b, p.h, p.rows, p.dv_pad), "end": _states(p)}
    return _call(p, _forward_kernel, x, outs, {}, "linear_forward", interpret)


def _backward(p: Plan, x: dict, interpret):
    heads = p.pack * p.r
    sweep = {name: a for name, a in x.items() if name not in ("q", "d_end")}
    outs = {"dq": _shape(x["q"].dtype, p.b, p.h, p.rows, p.f_pad)}
    scratch = {"s": pltpu.VMEM((heads, p.dv_pad, p.f_pad), jnp.float32)}
    found = _call(p, _query_gradient_kernel, sweep, outs, scratch, "linear_query_gradient", interpret)
    x = {name: a for name, a in x.items() if name != "state"}
    outs = {
        "dk": _shape(x["k"].dtype, p.b, p.groups, p.rows, p.f_pad),
        "dv": _shape(x["v"].dtype, p.b, p.groups, p.rows, p.dv_pad),
        "d_state": _states(p),
    }
    scratch = {}
    if p.decay:
        x = x | found
        outs["dd"] = _shape(jnp.float32, p.b, p.h, *((1, p.rows) if p.decay == "token" else (p.rows, p.f_pad)))
        width = LANES if p.decay == "token" else p.f_pad
        scratch["later"] = pltpu.VMEM((heads, SUBLANES, width), jnp.float32)
    found |= _call(p, _key_gradient_kernel, x, outs, scratch, "linear_key_gradient", interpret, reverse=True)
    if p.decay == "token":
        found["dd"] = found["dd"][:, :, 0]
    return found


def _entries(o: dict) -> int:
    """Of a state."""
    return ceil_to(o["q"].shape[3], LANES) * ceil_to(o["v"].shape[3], LANES)


def unsupported(o: dict, opt) -> str | None:
    if _entries(o) > ENTRIES:
        return f"states of {o['q'].shape[3]} x {o['v'].shape[3]}: expected at most {ENTRIES} entries, in whole lanes"
    return body.unsupported(o)


def _plan(o: dict, opt) -> Plan:
    most = max(1, min(MOST, ENTRIES // _entries(o)))
    return body.plan(o, opt, chunks=CHUNKS, most=most, pad_width=lambda n: ceil_to(n, LANES), heads_first=True)


BODY = Body("tpu", unsupported, _plan, _forward, _backward)


def linear(o: dict, opt, interpret=False):
    """``interpret``: a ``pltpu.InterpretParams`` to run the kernels on a CPU."""
    return body.run(BODY, o, opt, interpret)
