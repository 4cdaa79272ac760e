"""Linear attention on TPU: three Mosaic kernels that walk a head's chunks with its state in vector memory.

A core runs the steps of a grid one after the other, so nothing is gained by computing all states first: one sweep reads
q, k and v once and never writes a state but the last. The queries' gradient is a second forward sweep that builds the
states again, the gradients of keys, values and decays a sweep from the end that carries the state's gradient; the query
heads of a kv head follow each other inside a chunk, which reads their keys and values once. States are kept transposed,
[Dv, F], so that decays scale them by rows.
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

TN = ((0,), (0,))
CHUNKS = {None: (128, 256), "token": (128, 256), "channel": (128,)}
SUBLANES = 8
MOST = 8  # query heads whose states are held at a time
VMEM_LIMIT = 48 * 2**20  # of 64 MiB on the smallest of the chips compiled for


def _swap(x, b: int):
    size = x.shape[0]
    return jnp.where(second_half(x.shape, b), pltpu.roll(x, b, 0), pltpu.roll(x, size - b, 0))


def _weights(p: Plan, r: dict, later: int) -> Weights:
    if p.decay is None:
        return Weights()
    if p.decay == "channel":
        return of_channels(r["d"][...], _swap)
    rows = [r["d"][i : i + 1, :] for i in (0, 1)]
    half = (LANES // 2, p.chunk)
    turned = jnp.concatenate([jnp.broadcast_to(x, half) for x in rows], 0).T
    return of_tokens(rows, [turned[:, i : i + 1] for i in (0, LANES // 2)], later)


def _next(s, x, y, w: Weights):
    """The state behind a chunk: [Dv, F] from x [C, Dv] and y [C, F]."""
    return grown(s, w.through) + dot(x, y, TN)


def _forward_kernel(p: Plan, names, *refs):
    r = dict(zip(names, refs, strict=True))
    i = pl.program_id(3)

    @pl.when(pl.program_id(2) == 0)
    def _():
        r["end"][i] = r["state"][i]

    q, k, v, s = r["q"][...], r["k"][...], r["v"][...], r["end"][i]
    w = _weights(p, r, 0)
    out = dot(products(q, k, w, 0).astype(v.dtype), v, NN) + dot(scaled(q, w.enter), s.astype(q.dtype), NT)
    r["out"][...] = (out * p.scale).astype(v.dtype)
    r["end"][i] = _next(s, v, scaled(k, w.leave), w)


def _query_gradient_kernel(p: Plan, names, *refs):
    r = dict(zip(names, refs, strict=True))
    i = pl.program_id(3)

    @pl.when(pl.program_id(2) == 0)
    def _():
        r["s"][i] = r["state"][i]

    k, v, do, s = r["k"][...], r["v"][...], r["do"][...], r["s"][i]
    w = _weights(p, r, 0)
    dq = products_gradient(dot(do, v, NT), k, w, 0) + grown(dot(do, s.astype(do.dtype), NN), w.enter)
    r["dq"][...] = (dq * p.scale).astype(k.dtype)
    r["s"][i] = _next(s, v, scaled(k, w.leave), w)


def _key_gradient_kernel(p: Plan, names, *refs):
    r = dict(zip(names, refs, strict=True))
    i = pl.program_id(3)

    @pl.when(pl.program_id(2) == 0)
    def _():
        r["d_state"][i] = r["d_end"][i]
        if p.decay:
            r["later"][i] = jnp.zeros(r["later"].shape[1:], jnp.float32)

    @pl.when(i == 0)
    def _():
        r["dk_total"][...] = jnp.zeros_like(r["dk_total"])
        r["dv_total"][...] = jnp.zeros_like(r["dv_total"])

    q, k, v, do, ds = r["q"][...], r["k"][...], r["v"][...], r["do"][...], r["d_state"][i]
    w = _weights(p, r, 1)
    low = ds.astype(k.dtype)
    prob = (products(k, q, w, 1) * p.scale).astype(v.dtype)
    r["dv_total"][...] += dot(prob, do, NN) + dot(scaled(k, w.leave), low, NT)
    dk = products_gradient(dot(v, do, NT) * p.scale, q, w, 1) + grown(dot(v, low, NN), w.leave)
    r["dk_total"][...] += dk
    r["d_state"][i] = _next(ds, do, (scaled(q, w.enter).astype(jnp.float32) * p.scale).astype(q.dtype), w)
    if p.decay:
        change = q.astype(jnp.float32) * r["dq"][...].astype(jnp.float32) - k.astype(jnp.float32) * dk
        if p.decay == "token":
            size = p.chunk
            behind = (index((size, size), 0) >= index((size, size), 1)).astype(jnp.float32)
            row = dot(jnp.ones((SUBLANES, p.f_pad), jnp.float32), change, NT)
            total = dot(row, behind, NN) + r["later"][i][:1, :1]
            first = total[:1, :1]
        else:
            total = change
            for b in (1 << x for x in range(p.chunk.bit_length() - 1)):
                inside = index(total.shape, 0) < p.chunk - b
                total = total + jnp.where(inside, pltpu.roll(total, p.chunk - b, 0), 0.0)
            total = total + r["later"][i][:1]
            first = total[:1]
        r["dd"][...] = total[: r["dd"].shape[0]]
        r["later"][i] = jnp.broadcast_to(first, r["later"].shape[1:])

    @pl.when(i == p.r - 1)
    def _():
        r["dk"][...] = r["dk_total"][...].astype(r["dk"].dtype)
        r["dv"][...] = r["dv_total"][...].astype(r["dv"].dtype)


# -------------------------------------------------------------------------------------------------------------- calls


def _spec(p: Plan, x, name: str, reverse: bool):
    """One block per step of the grid (batch, groups, chunks, heads of a group)."""

    def chunk(c):
        return p.chunks - 1 - c if reverse else c

    def batch(b):
        return b if x.shape[0] > 1 else 0

    if x.ndim == 5:  # states [B, groups, r, Dv, F]: all of a group while it is worked on
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, g, c, i: (b, g, 0, 0, 0))
    heads = {p.kv: lambda g, i: lax.div(g, p.groups // p.kv)}
    if name in ("dk", "dv"):
        heads = {p.groups: lambda g, i: g}
    elif name not in ("k", "v"):
        heads = {p.h: lambda g, i: g * p.r + i}
    at = heads[x.shape[1]]
    if x.shape[3] == p.rows and name in ("d", "dd") and p.decay == "token":
        return pl.BlockSpec((None, None, x.shape[2], p.chunk), lambda b, g, c, i: (batch(b), at(g, i), 0, chunk(c)))
    return pl.BlockSpec((None, None, p.chunk, x.shape[3]), lambda b, g, c, i: (batch(b), at(g, i), chunk(c), 0))


def _call(p: Plan, kernel, x: dict, outs: dict, scratch: dict, name: str, interpret, reverse=False):
    grouped = lambda a: a.reshape(p.b, p.groups, p.r, *a.shape[2:])  # noqa: E731
    x = {k: grouped(a) if k in ("state", "d_end") else a for k, a in x.items()}
    found = pl.pallas_call(
        functools.partial(kernel, p, (*x, *outs, *scratch)),
        grid=(p.b, p.groups, p.chunks, p.r),
        in_specs=[_spec(p, a, k, reverse) for k, a in x.items()],
        out_specs=[_spec(p, a, k, reverse) for k, a in outs.items()],
        out_shape=list(outs.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=name,
        interpret=interpret,
    )(*x.values())
    return dict(zip(outs, found, strict=True))


def _shape(dtype, *size):
    return jax.ShapeDtypeStruct(size, dtype)


def _states(p: Plan):
    return _shape(jnp.float32, p.b, p.groups, p.r, p.dv_pad, p.f_pad)


def _head_states(p: Plan, x):
    return x.reshape(p.b, p.h, *x.shape[3:])


def _forward(p: Plan, x: dict, interpret):
    outs = {"out": _shape(x["v"].dtype, p.b, p.h, p.rows, p.dv_pad), "end": _states(p)}
    found = _call(p, _forward_kernel, x, outs, {}, "linear_forward", interpret)
    return found | {"end": _head_states(p, found["end"])}


def _backward(p: Plan, x: dict, interpret):
    d_end = x["d_end"]
    sweep = {name: a for name, a in x.items() if name not in ("q", "d_end")}
    outs = {"dq": _shape(x["q"].dtype, p.b, p.h, p.rows, p.f_pad)}
    scratch = {"s": pltpu.VMEM((p.r, p.dv_pad, p.f_pad), jnp.float32)}
    found = _call(p, _query_gradient_kernel, sweep, outs, scratch, "linear_query_gradient", interpret)
    x = {name: a for name, a in x.items() if name != "state"} | {"d_end": d_end}
    outs = {
        "dk": _shape(x["k"].dtype, p.b, p.groups, p.rows, p.f_pad),
        "dv": _shape(x["v"].dtype, p.b, p.groups, p.rows, p.dv_pad),
        "d_state": _states(p),
    }
    scratch = {
        "dk_total": pltpu.VMEM((p.chunk, p.f_pad), jnp.float32),
        "dv_total": pltpu.VMEM((p.chunk, p.dv_pad), jnp.float32),
    }
    if p.decay:
        x = x | found
        outs["dd"] = _shape(jnp.float32, p.b, p.h, *((1, p.rows) if p.decay == "token" else (p.rows, p.f_pad)))
        width = LANES if p.decay == "token" else p.f_pad
        scratch["later"] = pltpu.VMEM((p.r, SUBLANES, width), jnp.float32)
    found |= _call(p, _key_gradient_kernel, x, outs, scratch, "linear_key_gradient", interpret, reverse=True)
    if p.decay == "token":
        found["dd"] = found["dd"][:, :, 0]
    return found | {"d_state": _head_states(p, found["d_state"])}


def _plan(o: dict, opt) -> Plan:
    return body.plan(o, opt, chunks=CHUNKS, most=MOST, pad_width=lambda n: ceil_to(n, LANES), heads_first=True)


BODY = Body("tpu", _plan, _forward, _backward)


def linear(o: dict, opt, interpret=False):
    """``interpret``: a ``pltpu.InterpretParams`` to run the kernels on a CPU."""
    return body.run(BODY, o, opt, interpret)
