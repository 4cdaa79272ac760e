"""Linear attention on GPU: Triton kernels that first write the state before every chunk, then work on all chunks at once.

A GPU needs more programs than there are heads. Only the states depend on each other: one kernel walks the chunks with a
tile of a head's state in registers and writes it down, in the operands' dtype, before each; everything else is one
program per chunk. The backward pass writes the states again and, from the end, their gradients. States are kept
transposed, [Dv, F], so that decays scale them by rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.flash.layout import ceil_to
from pallas_kernels.flash.pairs import NN, NT, dot
from pallas_kernels.linear import body
from pallas_kernels.linear.body import Body, Plan
from pallas_kernels.linear.decays import (
    Weights,
    grown,
    index,
    of_tokens,
    power,
    products,
    products_gradient,
    scaled,
    seen,
)
from pallas_kernels.linear.reference import floored

TN = ((0,), (0,))
# Tokens of a chunk, by float32. Compiled for Hopper, no register is spilled with bfloat16 and heads of 64 or 128.
CHUNKS = {False: (16, 32, 64), True: (16, 32)}
WIDTH, FLOAT32_WIDTH = 64, 32  # features or value columns of a tile
CHANNELS = 32  # features of a tile in kernels that weigh pairs per channel
COLUMNS = 128  # value columns of a program that writes outputs


def _summed(p: Plan, take, d):
    """For each row of bool [C, C] the sum of those rows of d [C, E] that it takes: products for the tensor cores.

    Zeros and ones are exact in bfloat16, and d is the sum of two up to 2^-17 of itself, of three as float32."""
    take = jnp.where(take, 1.0, 0.0).astype(jnp.bfloat16)
    total = jnp.zeros(d.shape, jnp.float32)
    for _ in range(3 if p.float32 else 2):
        part = d.astype(jnp.bfloat16)
        total = total + dot(take, part, NN)
        d = d - part.astype(jnp.float32)
    return total


def _of_channels(p: Plan, d, levels) -> Weights:
    t, u = index((p.chunk, 1), 0), index((1, p.chunk), 1)

    def fold(step, carry):
        def one(i, carry):
            b = lax.shift_left(jnp.int32(1), i)
            second = (t & b) != 0  # from the middle of the pairs' block to t, or from s to there
            low, high = jnp.where(second, t & -b, t + 1), jnp.where(second, t, t | (b - 1))
            return step(b, jnp.exp(_summed(p, (u >= low) & (u <= high), d)), carry)

        return lax.fori_loop(0, levels, one, carry)

    enter, leave = jnp.exp(_summed(p, u <= t, d)), jnp.exp(_summed(p, u > t, d))
    return Weights(enter, leave, jnp.exp(jnp.sum(d, 0, keepdims=True)), fold=fold)


def _over(count: int, step, carry):
    """``step(i, carry)`` for i below a static count."""
    if count == 1:
        return step(0, carry)
    return lax.fori_loop(0, count, step, carry)


def _weights(p: Plan, r: dict, b, h, rows, f, later: int = 0) -> Weights:
    """Of a chunk's rows and, per channel, the features ``f``."""
    if p.decay is None:
        return Weights()
    b = b if r["d"].shape[0] > 1 else 0
    if p.decay == "channel":
        return _of_channels(p, floored(r["d"][b, rows, h, f]), r["levels"][0])
    sums = [r["d"][b, h, i, rows] for i in (0, 1)]
    return of_tokens([x[None, :] for x in sums], [x[:, None] for x in sums], later)


def _head(p: Plan, h):
    """The kv head of a query head."""
    return lax.div(h, p.h // p.kv)


def _states_kernel(p: Plan, tiles, names, *refs):
    """The state before each chunk, and behind the last."""
    r = dict(zip(names, refs, strict=True))
    b, h, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    f_tile, v_tile = tiles
    parts = p.f_pad // f_tile
    f, v = pl.ds(lax.rem(i, parts) * f_tile, f_tile), pl.ds(lax.div(i, parts) * v_tile, v_tile)

    def step(c, s):
        rows = pl.ds(c * p.chunk, p.chunk)
        r["states"][b, h, c, v, f] = s.astype(r["states"].dtype)
        w = _weights(p, r, b, h, rows, f)
        k = r["k"][b, rows, _head(p, h), f]
        return grown(s, w.through) + dot(r["v"][b, rows, _head(p, h), v], scaled(k, w.leave), TN)

    r["end"][b, h, v, f] = lax.fori_loop(0, p.chunks, step, r["state"][b, h, v, f])


def _state_gradients_kernel(p: Plan, tiles, names, *refs):
    """The gradient of the state behind each chunk, and before the first."""
    r = dict(zip(names, refs, strict=True))
    b, h, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    f_tile, v_tile = tiles
    parts = p.f_pad // f_tile
    f, v = pl.ds(lax.rem(i, parts) * f_tile, f_tile), pl.ds(lax.div(i, parts) * v_tile, v_tile)

    def step(j, ds):
        c = p.chunks - 1 - j
        rows = pl.ds(c * p.chunk, p.chunk)
        r["d_states"][b, h, c, v, f] = ds.astype(r["d_states"].dtype)
        w = _weights(p, r, b, h, rows, f)
        q = scaled(r["q"][b, rows, h, f], p.scale if w.enter is None else w.enter * p.scale)
        return grown(ds, w.through) + dot(r["do"][b, rows, h, v], q, TN)

    r["d_state"][b, h, v, f] = lax.fori_loop(0, p.chunks, step, r["d_end"][b, h, v, f])


def _output_kernel(p: Plan, tiles, names, *refs):
    r = dict(zip(names, refs, strict=True))
    c, i, b = (pl.program_id(x) for x in range(3))
    f_tile, v_tile = tiles
    h, v = lax.rem(i, p.h), pl.ds(lax.div(i, p.h) * v_tile, v_tile)
    rows = pl.ds(c * p.chunk, p.chunk)

    def step(j, carry):
        table, out = carry
        f = pl.ds(j * f_tile, f_tile)
        q, k, s = r["q"][b, rows, h, f], r["k"][b, rows, _head(p, h), f], r["states"][b, h, c, v, f]
        w = _weights(p, r, b, h, rows, f)
        return table + products(q, k, w, 0), out + dot(scaled(q, w.enter), s, NT)

    init = jnp.zeros((p.chunk, p.chunk), jnp.float32), jnp.zeros((p.chunk, v_tile), jnp.float32)
    table, out = _over(p.f_pad // f_tile, step, init)
    values = r["v"][b, rows, _head(p, h), v]
    out = out + dot(table.astype(values.dtype), values, NN)
    r["out"][b, rows, h, v] = (out * p.scale).astype(values.dtype)


def _value_gradient_kernel(p: Plan, tiles, names, *refs):
    r = dict(zip(names, refs, strict=True))
    c, i, b = (pl.program_id(x) for x in range(3))
    f_tile, v_tile = tiles
    g, v = lax.rem(i, p.kv), pl.ds(lax.div(i, p.kv) * v_tile, v_tile)
    rows = pl.ds(c * p.chunk, p.chunk)

    def head(i, dv):
        h = g * p.r + i

        def step(j, carry):
            table, dv = carry
            f = pl.ds(j * f_tile, f_tile)
            q, k, ds = r["q"][b, rows, h, f], r["k"][b, rows, g, f], r["d_states"][b, h, c, v, f]
            w = _weights(p, r, b, h, rows, f, 1)
            return table + products(k, q, w, 1), dv + dot(scaled(k, w.leave), ds, NT)

        table, dv = _over(p.f_pad // f_tile, step, (jnp.zeros((p.chunk, p.chunk), jnp.float32), dv))
        do = r["do"][b, rows, h, v]
        return dv + dot((table * p.scale).astype(do.dtype), do, NN)

    dv = lax.fori_loop(0, p.r, head, jnp.zeros((p.chunk, v_tile), jnp.float32))
    r["dv"][b, rows, g, v] = dv.astype(r["dv"].dtype)


def _both(d, q, k, w: Weights):
    """Gradients of q and k in ``products(q, k, w, 0)`` from that of the result; no weights per channel."""
    d = jnp.where(seen(d.shape[0], 0), d, 0.0) if w.table is None else d * w.table
    d = d.astype(q.dtype)
    return dot(d, k, NN), dot(d, q, TN)


def _key_gradient_kernel(p: Plan, tiles, names, *refs):
    """Queries, keys and what a decay before each token would change; no decay per channel."""
    r = dict(zip(names, refs, strict=True))
    c, i, b = (pl.program_id(x) for x in range(3))
    f_tile, v_tile = tiles
    g, part = lax.rem(i, p.kv), lax.div(i, p.kv)
    rows, f = pl.ds(c * p.chunk, p.chunk), pl.ds(part * f_tile, f_tile)
    k = r["k"][b, rows, g, f]
    zeros = jnp.zeros((p.chunk, f_tile), jnp.float32)

    def head(i, total):
        h = g * p.r + i

        def step(j, carry):
            dp, dq, dk = carry
            v = pl.ds(j * v_tile, v_tile)
            do, values = r["do"][b, rows, h, v], r["v"][b, rows, g, v]
            s, ds = r["states"][b, h, c, v, f], r["d_states"][b, h, c, v, f]
            return dp + dot(do, values, NT), dq + dot(do, s, NN), dk + dot(values, ds, NN)

        dp, dq, dk = _over(p.dv_pad // v_tile, step, (jnp.zeros((p.chunk, p.chunk), jnp.float32), zeros, zeros))
        w = _weights(p, r, b, h, rows, f)
        q = r["q"][b, rows, h, f]
        near_q, near_k = _both(dp * p.scale, q, k, w)
        dq = grown(dq, w.enter) * p.scale + near_q
        dk = grown(dk, w.leave) + near_k
        r["dq"][b, rows, h, f] = dq.astype(q.dtype)
        if p.decay:
            r["dd"][b, h, part, rows] = (q.astype(jnp.float32) * dq - k.astype(jnp.float32) * dk).sum(1)
        return total + dk

    r["dk"][b, rows, g, f] = lax.fori_loop(0, p.r, head, zeros).astype(k.dtype)


def _query_channels_kernel(p: Plan, tiles, names, *refs):
    """Queries alone: with weights per channel one kernel for both gradients would spill registers."""
    r = dict(zip(names, refs, strict=True))
    c, i, b = (pl.program_id(x) for x in range(3))
    f_tile, v_tile = tiles
    h, part = lax.rem(i, p.h), lax.div(i, p.h)
    g = _head(p, h)
    rows, f = pl.ds(c * p.chunk, p.chunk), pl.ds(part * f_tile, f_tile)

    def step(j, carry):
        dp, dq = carry
        v = pl.ds(j * v_tile, v_tile)
        do = r["do"][b, rows, h, v]
        return dp + dot(do, r["v"][b, rows, g, v], NT), dq + dot(do, r["states"][b, h, c, v, f], NN)

    init = jnp.zeros((p.chunk, p.chunk), jnp.float32), jnp.zeros((p.chunk, f_tile), jnp.float32)
    dp, dq = _over(p.dv_pad // v_tile, step, init)
    w = _weights(p, r, b, h, rows, f)
    dq = products_gradient(dp, r["k"][b, rows, g, f], w, 0, grown(dq, w.enter))
    r["dq"][b, rows, h, f] = (dq * p.scale).astype(r["dq"].dtype)


def _key_channels_kernel(p: Plan, tiles, names, *refs):
    """Keys, and what a decay before each token would change, from the queries' gradient."""
    r = dict(zip(names, refs, strict=True))
    c, i, b = (pl.program_id(x) for x in range(3))
    f_tile, v_tile = tiles
    g, part = lax.rem(i, p.kv), lax.div(i, p.kv)
    rows, f = pl.ds(c * p.chunk, p.chunk), pl.ds(part * f_tile, f_tile)
    zeros = jnp.zeros((p.chunk, f_tile), jnp.float32)

    def head(i, total):
        h = g * p.r + i

        def step(j, carry):
            dp, dk = carry
            v = pl.ds(j * v_tile, v_tile)
            values = r["v"][b, rows, g, v]
            return dp + dot(values, r["do"][b, rows, h, v], NT), dk + dot(values, r["d_states"][b, h, c, v, f], NN)

        dp, dk = _over(p.dv_pad // v_tile, step, (jnp.zeros((p.chunk, p.chunk), jnp.float32), zeros))
        w = _weights(p, r, b, h, rows, f)
        q = r["q"][b, rows, h, f]
        # In the operands' dtype, and summed where it is made: a turn of the loop then holds little enough.
        dk = products_gradient((dp * p.scale).astype(q.dtype), q, w, 1, grown(dk, w.leave))
        k, dq = r["k"][b, rows, g, f], r["dq"][b, rows, h, f]
        change = q.astype(jnp.float32) * dq.astype(jnp.float32) - k.astype(jnp.float32) * dk
        later = index((p.chunk, p.chunk), 1) >= index((p.chunk, p.chunk), 0)
        r["dd"][b, rows, h, f] = _summed(p, later, change)
        return total + dk

    r["dk"][b, rows, g, f] = lax.fori_loop(0, p.r, head, zeros).astype(r["dk"].dtype)


# -------------------------------------------------------------------------------------------------------------- calls


def _call(p: Plan, kernel, tiles, x: dict, outs: dict, grid, name: str, interpret, warps: int = 4, stages: int = 2):
    found = pl.pallas_call(
        functools.partial(kernel, p, tiles, (*x, *outs)),
        grid=grid,
        out_shape=list(outs.values()),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        name=name,
        interpret=interpret,
    )(*x.values())
    return dict(zip(outs, found, strict=True))


def _with_levels(p: Plan, x: dict) -> dict:
    """How often a chunk is halved, as an array: the compiler would unroll a loop whose length it knows, and then hold the
    weights and masks of every turn in registers."""
    return x | {"levels": jnp.full(1, p.chunk.bit_length() - 1, jnp.int32)} if p.decay == "channel" else x


def _pick(x: dict, *names: str) -> dict:
    return {name: x[name] for name in (*names, "d", "levels") if name in x}


def _shape(dtype, *size):
    return jax.ShapeDtypeStruct(size, dtype)


def _tiles(p: Plan) -> tuple[int, int]:
    most = FLOAT32_WIDTH if p.float32 else WIDTH
    return min(most, p.f_pad), min(most, p.dv_pad)


def _chunk_tiles(p: Plan) -> tuple[int, int]:
    """Of kernels that weigh pairs: a weight per channel takes as much room as the features themselves."""
    f_tile, v_tile = _tiles(p)
    return min(CHANNELS, f_tile) if p.decay == "channel" else f_tile, v_tile


def _grid_of_states(p: Plan, tiles):
    return (p.f_pad // tiles[0]) * (p.dv_pad // tiles[1]), p.h, p.b


def _all_states(p: Plan, x: dict):
    return _shape(x["q"].dtype, p.b, p.h, p.chunks, p.dv_pad, p.f_pad)


def _states(p: Plan, x: dict, interpret):
    tiles = _tiles(p)
    outs = {"states": _all_states(p, x), "end": _shape(jnp.float32, p.b, p.h, p.dv_pad, p.f_pad)}
    operands = _pick(x, "k", "v", "state")
    return _call(p, _states_kernel, tiles, operands, outs, _grid_of_states(p, tiles), "linear_states", interpret)


def _forward(p: Plan, x: dict, interpret):
    x = _with_levels(p, x)
    f_tile, v_tile = _chunk_tiles(p)
    found = _states(p, x, interpret)
    if v_tile == WIDTH and p.dv_pad % COLUMNS == 0:
        v_tile = COLUMNS
    operands = _pick(x, "q", "k", "v") | {"states": found["states"]}
    outs = {"out": _shape(x["v"].dtype, p.b, p.rows, p.h, p.dv_pad)}
    grid = (p.chunks, p.h * (p.dv_pad // v_tile), p.b)
    warps = 8 if p.decay == "channel" else 4
    out = _call(p, _output_kernel, (f_tile, v_tile), operands, outs, grid, "linear_output", interpret, warps)
    return out | {"end": found["end"]}


def _backward(p: Plan, x: dict, interpret):
    x = _with_levels(p, x)
    states = {"states": _states(p, x, interpret)["states"]}
    outs = {"d_states": _all_states(p, x), "d_state": _shape(jnp.float32, p.b, p.h, p.dv_pad, p.f_pad)}
    tiles = _tiles(p)
    operands, grid = _pick(x, "q", "do", "d_end"), _grid_of_states(p, tiles)
    found = _call(p, _state_gradients_kernel, tiles, operands, outs, grid, "linear_state_gradients", interpret)
    d_states = {"d_states": found["d_states"]}
    tiles = f_tile, v_tile = _chunk_tiles(p)
    operands = _pick(x, "q", "k", "do") | d_states
    outs = {"dv": _shape(x["v"].dtype, p.b, p.rows, p.kv, p.dv_pad)}
    grid = p.chunks, p.kv * (p.dv_pad // v_tile), p.b
    warps = 8 if p.decay == "channel" else 4
    found |= _call(p, _value_gradient_kernel, tiles, operands, outs, grid, "linear_value_gradient", interpret, warps)
    operands = _pick(x, "q", "k", "v", "do")
    dq, dk = ({"d" + name: _shape(x[name].dtype, *x[name].shape)} for name in ("q", "k"))
    parts = p.f_pad // f_tile
    grid = p.chunks, p.kv * parts, p.b
    tiles = f_tile, min(v_tile, max(16, p.dv_pad // 2))  # a loop over two tiles holds less than one tile without it
    if p.decay == "channel":
        own = {name: a for name, a in operands.items() if name != "q"} | states
        by_head = p.chunks, p.h * parts, p.b
        found |= _call(p, _query_channels_kernel, tiles, own, dq, by_head, "linear_query_gradient", interpret, 8)
        operands |= d_states | {"dq": found["dq"]}
        outs = dk | {"dd": _shape(jnp.float32, p.b, p.rows, p.h, p.f_pad)}
        tiles = f_tile, min(f_tile, tiles[1])  # in larger tiles, or with the next one's values in flight, registers spill
        found |= _call(p, _key_channels_kernel, tiles, operands, outs, grid, "linear_key_gradient", interpret, 8, stages=1)
    else:
        outs = dq | dk | ({"dd": _shape(jnp.float32, p.b, p.h, parts, p.rows)} if p.decay else {})
        operands |= states | d_states
        found |= _call(p, _key_gradient_kernel, tiles, operands, outs, grid, "linear_key_gradient", interpret, 8)
    if p.decay == "token":
        found["dd"] = lax.cumsum(found["dd"].sum(2), 2, reverse=True)
    elif p.decay:  # summed inside chunks; what a chunk's first token has is what earlier chunks are to add
        inside = found["dd"].reshape(p.b, p.chunks, p.chunk, p.h, p.f_pad)
        firsts = inside[:, :, 0]
        behind = lax.cumsum(jnp.pad(firsts[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)]), 1, reverse=True)
        found["dd"] = (inside + behind[:, :, None]).reshape(found["dd"].shape)
    return {name: a for name, a in found.items() if name != "d_states"}


def _plan(o: dict, opt) -> Plan:
    float32 = o["q"].dtype == jnp.float32
    most = FLOAT32_WIDTH if float32 else WIDTH
    chunks = dict.fromkeys((None, "token", "channel"), CHUNKS[float32])
    width = lambda n: ceil_to(n, min(most, max(16, power(n))))  # noqa: E731
    return body.plan(o, opt, chunks=chunks, most=None, pad_width=width, heads_first=False)


def unsupported(o: dict, opt) -> str | None:
    if (why := body.unsupported(o)) is not None:
        return why
    p = _plan(o, opt)
    size = p.b * p.h * max(p.rows * max(p.f_pad, p.dv_pad), p.chunks * p.f_pad * p.dv_pad)
    if size >= 2**31:  # Triton's offsets are int32
        return f"arrays of {size} entries (q, v or the states before all chunks): expected fewer than 2^31"
    return None


BODY = Body("gpu", unsupported, _plan, _forward, _backward)


def linear(o: dict, opt, interpret=False):
    """``interpret``: run the kernels on a CPU."""
    return body.run(BODY, o, opt, interpret)
