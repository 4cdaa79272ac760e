"""The fast path everywhere XLA runs: a scan over chunks, each a few products of matrices.

A CPU is fastest when it works on one head at a time, also when a mesh has several of them: the scores of a chunk then
stay in its cache; so do some chunks of all heads while they are laid out head by head. Where XLA may have to cut heads
over devices, and for a single chunk, they stay an axis of every array. The gradient is XLA's own: one state per chunk is
kept, the rest is computed again.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _dispatch, _mesh
from pallas_kernels.linear import decays
from pallas_kernels.linear.reference import accumulator, dims, floored, initial, repeated
from pallas_kernels.linear.reference import linear as token_by_token

SEGMENT = 1 << 18  # floats of the queries that are laid out head by head at a time
CHUNK, CHANNEL_CHUNK = 64, 32  # tokens per block; with a decay per channel log2 of it more products


def linear(o: dict, opt):
    n = o["q"].shape[1]
    if n == 0:
        return token_by_token(o, opt)
    d = o.get("log_decay")
    size = opt.chunk or (CHANNEL_CHUNK if d is not None and d.ndim == 4 else CHUNK)
    size = min(size, n)
    if d is not None and d.ndim == 4:
        size = decays.power(size)
    names = functools.partial(dims, o)
    by_head = n > size and jax.default_backend() == "cpu" and _dispatch.reaches(names)
    call = functools.partial(chunked, size=size, scale=opt.scale, by_head=by_head)
    return (_mesh.spread(call, names()) if by_head else call)(o)


def chunked(o: dict, size: int, scale: float, by_head: bool):
    q, k, v, d = (o.get(x) for x in ("q", "k", "v", "log_decay"))
    (b, n, h, f), dv, state = q.shape, v.shape[3], initial(o)
    dtype = accumulator(q, k, v)
    g = math.lcm(k.shape[2], v.shape[2])
    r, pieces, segments = h // g, -(-n // size), 1
    if by_head:
        segments = -(-pieces * size * h * f // SEGMENT)
        pieces = -(-pieces // segments) * segments
    # padded tokens have k = 0 and log-decay 0: the state passes through them unchanged
    heads = [_pieces(repeated(x, g), pieces, size) for x in (k, v)]
    q = _pieces(q, pieces, size).reshape(b, pieces, size, g, r, f)
    if d is not None:
        d = floored(d.astype(dtype))
        if d.ndim == 1:
            d = jnp.where((np.arange(pieces * size) < n)[None, :, None], d, 0.0)
        d = _pieces(d, pieces, size)
        d = jnp.broadcast_to(d, (b, *d.shape[1:])).reshape(*(b, pieces, size, g, r), *d.shape[4:])
    per_channel = d is not None and d.ndim == 6
    if d is not None and not per_channel:
        d = jnp.moveaxis(jnp.stack(decays.running(jnp.moveaxis(d, 2, -1))), (0, -1), (-1, 2))
    block = functools.partial(_channel_block if per_channel else _block, scale=scale)
    state = state.reshape(b, g, r, f, dv)
    if by_head:
        out, state = _by_segment(functools.partial(_head_by_head, block), segments, (q, *heads, d), state)
    else:
        out, state = _heads_together(block, q, *heads, d, state)
    return out.reshape(b, pieces * size, h, dv)[:, :n], state.reshape(b, h, f, dv)


def _pieces(x, pieces: int, size: int):
    """[B, N, ...] -> [B, pieces, size, ...], zeros behind the end."""
    x = jnp.pad(x, [(0, 0), (0, pieces * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], pieces, size, *x.shape[2:])


def _by_segment(f, segments: int, xs, state):
    """``f(*xs, state) -> (out, state)`` over ``segments`` of the chunks [B, pieces, ...] in turn, a batch row at a time."""
    if segments == 1:
        return f(*xs, state)

    def row(x):
        xs, state = x

        def one(state, xs):
            out, state = f(*jax.tree.map(lambda x: x[None], xs), state)
            return state, out[0]

        cut = lambda x: x.reshape(segments, -1, *x.shape[1:])  # noqa: E731
        state, out = jax.lax.scan(one, state[None], jax.tree.map(cut, xs))
        return out.reshape(-1, *out.shape[2:]), state[0]

    return jax.lax.map(row, (xs, state))


def _head_by_head(block, q, k, v, d, state):
    """q [B, pieces, C, G, r, F], k and v [B, pieces, C, G, F], d like q with as many columns as a block wants or None,
    state [B, G, r, F, Dv]."""
    (b, pieces, size, g, r, _), dv = q.shape, v.shape[-1]
    body = jax.checkpoint(block, prevent_cse=False)

    def first(x, axes):  # those axes to the front, the first two of them as one
        x = jnp.moveaxis(x, axes, range(len(axes)))
        return x.reshape(b * g, *x.shape[2:])

    def kv_head(x):
        k, v, rest = x

        def head(x):
            q, d, state = x
            return jax.lax.scan(lambda state, x: body(state, *x), state, (q, k, v, d))

        return jax.lax.map(head, rest)

    rest = first(q, (0, 3, 4)), None if d is None else first(d, (0, 3, 4)), state.reshape(b * g, *state.shape[2:])
    state, out = jax.lax.map(kv_head, (first(k, (0, 3)), first(v, (0, 3)), rest))
    out = jnp.moveaxis(out.reshape(b, g, r, pieces, size, dv), (3, 4), (1, 2))
    return out, state.reshape(b, g, r, *state.shape[2:])


def _heads_together(block, q, k, v, d, state):
    axis = None if d is None else 1
    over_r = jax.vmap(block, in_axes=(0, 1, None, None, axis), out_axes=(0, 1))
    over_g = jax.vmap(over_r, in_axes=(0, 1, 1, 1, axis), out_axes=(0, 1))
    every = jax.vmap(over_g, in_axes=(0, 0, 0, 0, axis and 0))
    body = jax.checkpoint(lambda state, x: every(state, *x), prevent_cse=False)
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, d))
    state, out = jax.lax.scan(body, state, xs)
    return jnp.moveaxis(out, 0, 1), state


# ------------------------------------------------------------------------------------------ one chunk of one head


def _block(state, q, k, v, d, *, scale: float):
    """state [F, Dv], q [C, F], k [C, F], v [C, Dv], d [C, 2] (running sums) or None: (the next state, out [C, Dv])."""
    dtype = state.dtype
    wide = v.astype(dtype)
    q, k = q.astype(dtype) * scale, k.astype(dtype)
    seen = np.tril(np.ones((q.shape[0], q.shape[0]), bool))
    table = q @ k.T
    if d is None:
        out = jnp.where(seen, table, 0.0) @ wide + q @ state
        return state + k.T @ wide, out.astype(v.dtype)
    sums = d.T
    between = sum(x[:, None] - x[None] for x in sums)
    out = (table * jnp.exp(jnp.where(seen, between, -jnp.inf))) @ wide + (q * jnp.exp(sum(sums))[:, None]) @ state
    left = jnp.exp(sum(x[-1:] - x for x in sums))
    state = state * jnp.exp(sum(x[-1] for x in sums)) + (k * left[:, None]).T @ wide
    return state, out.astype(v.dtype)


def _channel_block(state, q, k, v, d, *, scale: float):
    """The same with d [C, F] (log-decays), C a power of two."""
    size, dtype = q.shape[0], state.dtype
    wide = v.astype(dtype)
    q, k = q.astype(dtype) * scale, k.astype(dtype)
    parts, before, after = decays.weights(d, _swap)
    table = jnp.where(decays.pairs(size, 0), jnp.sum(q * k, -1)[:, None], 0.0)
    for b, w in parts:
        table = jnp.where(decays.pairs(size, b), (q * w) @ (k * w).T, table)
    out = table @ wide + (q * before) @ state
    return state * before[-1][:, None] + (k * after).T @ wide, out.astype(v.dtype)


def _swap(x, b: int):
    return jnp.flip(x.reshape(-1, 2, b, x.shape[1]), 1).reshape(x.shape)
