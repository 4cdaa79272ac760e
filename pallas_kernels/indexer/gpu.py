"""The indexer on GPU: one Triton kernel per block of queries and part of the units.

A program streams its units a chunk at a time: products on tensor cores, heads reduced in registers, and every score above
the query's running threshold appended to a buffer of candidates, in order of index. When the buffer may overflow, the
K-th largest candidate is found exactly, by bisection over the ordered bit patterns of floats, and the buffer is cut back
to K; from then on most scores fail the threshold. Device memory holds 2 K candidates per query and part instead of a
score per unit, for a few thousand queries at a time. Few queries (decoding) cut the units into parts, whose candidates one
top-k merges.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.flash.gpu import power
from pallas_kernels.flash.pairs import NT, dot
from pallas_kernels.indexer import body

WIDE = 4096  # candidates from which on a buffer takes the registers of eight warps
PROGRAMS = 512  # programs that fill the chip: with fewer blocks of queries, units are cut into parts
ROWS = {False: 128, True: 32}  # queries x heads of a program, by float32
CHUNK = {False: 64, True: 32}


def _no_barrier():
    """The interpreter runs a program as one thread."""


def _pick(x, i, r):
    """Element ``r`` of a vector in registers; ``i``: its indices."""
    return jnp.sum(jnp.where(i == r, x, jnp.zeros_like(x)))


def _kernel(opt, names, kept: int, heads: int, chunk: int, parts: int, sync, *refs):
    q_ref, k_ref, q_facts, k_facts, span, *refs = refs
    weight = refs.pop(0) if len(refs) == 3 else None
    index, values = refs
    b, h, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    block, part = lax.div(i, parts), lax.rem(i, parts)
    rows, room = q_ref.shape[3] // heads, values.shape[5]
    at = lambda x: (b if x.shape[0] > 1 else 0, lax.div(h, pl.num_programs(1) // x.shape[1]))  # noqa: E731
    here = b, h, block, part
    q = q_ref[b, h, block]
    row = lambda j: q_facts[*at(q_facts), block, j][:, None]  # noqa: E731
    which = lax.iota(jnp.int32, rows)
    start, stop = (span[*at(span), block, j] for j in (0, 1))
    each = lax.div(stop - start + parts - 1, parts)
    start = start + part * each
    stop = jnp.minimum(stop, start + each)

    def step(c, carry):
        filled, bound = carry
        units = pl.ds(c * chunk, chunk)
        s = dot(q, k_ref[*at(k_ref), units, :], NT) * opt.scale
        s = jnp.maximum(s, 0.0) if opt.gate == "relu" else s
        if weight is not None:
            s = s * weight[b, h, block][:, None]
        s = s.reshape(rows, heads, chunk)
        s = s.max(1) if opt.heads == "max" else s.sum(1)
        key = lambda j: k_facts[*at(k_facts), j, units][None, :]  # noqa: E731
        ok = body.eligible(opt, names, row, key, s.shape)
        s = body.kept(ok, s, -jnp.inf)
        taken = jnp.where(s > bound[:, None], 1, 0)
        place = filled[:, None] + jnp.cumsum(taken, 1) - taken
        unit = jnp.broadcast_to(c * chunk + lax.iota(jnp.int32, chunk)[None, :], s.shape)
        own = jnp.broadcast_to(which[:, None], s.shape)
        for ref, x in ((index, unit), (values, s)):
            plt.store(ref.at[*here, own, place], x, mask=taken != 0)
        filled = filled + taken.sum(1)
        crowded = jnp.max(filled) + chunk > room
        cut = functools.partial(_cut_back, kept, which, index, values, here, sync)
        return lax.cond(crowded, cut, lambda filled, bound: (filled, bound), filled, bound)

    init = jnp.zeros((rows,), jnp.int32), jnp.full((rows,), -jnp.inf, jnp.float32)
    filled, bound = lax.fori_loop(start, stop, step, init)
    filled, _ = _cut_back(kept, which, index, values, here, sync, filled, bound)

    def finish(r, _):
        place = lax.iota(jnp.int32, room)
        unused = place >= _pick(filled, which, r)
        plt.store(index.at[*here, r, place], jnp.full((room,), 2**30, jnp.int32), mask=unused)
        plt.store(values.at[*here, r, place], jnp.full((room,), -jnp.inf, jnp.float32), mask=unused)
        return 0

    lax.fori_loop(0, rows, finish, 0)


def _cut_back(kept: int, which, index, values, here, sync, filled, bound):
    """(filled, bound) after every buffer with more than ``kept`` candidates lost its smallest."""
    sync()  # candidates are written by other threads than read them
    room = values.shape[5]
    place = lax.iota(jnp.int32, room)

    def row(r, carry):
        filled, bound = carry
        n = _pick(filled, which, r)

        def shrink(filled, bound):
            live = place < n
            x = jnp.where(live, values[*here, r, :], -jnp.inf)
            unit = index[*here, r, :]
            low, high = _bits(jnp.min(jnp.where(live, x, jnp.inf))), _bits(jnp.max(x)) + 1

            def halve(carry):
                low, high = carry
                middle = body.midpoint(low, high)
                bound = lax.bitcast_convert_type(body.ordered(middle), jnp.float32)
                found = jnp.sum(jnp.where(x >= bound, 1, 0))
                low = jnp.where(found >= kept, middle, low)
                return low, jnp.where(found == kept, middle + 1, jnp.where(found > kept, high, middle))

            low, _ = lax.while_loop(lambda c: c[1] - 1 > c[0], halve, (low, high))
            least = lax.bitcast_convert_type(body.ordered(low), jnp.float32)
            above, equal = jnp.where(x > least, 1, 0), jnp.where(x == least, 1, 0)
            wanted = kept - jnp.sum(above)
            equal = jnp.where(jnp.cumsum(equal, 0) <= wanted, equal, 0)
            chosen = above + equal
            to = jnp.cumsum(chosen, 0) - chosen
            sync()
            plt.store(index.at[*here, r, to], unit, mask=chosen != 0)
            plt.store(values.at[*here, r, to], x, mask=chosen != 0)
            mine = which == r
            return jnp.where(mine, kept, filled), jnp.where(mine, least, bound)

        return lax.cond(n > kept, shrink, lambda f, t: (f, t), filled, bound)

    filled, bound = lax.fori_loop(0, which.shape[0], row, (filled, bound))
    sync()
    return filled, bound


def _bits(x):
    return body.ordered(lax.bitcast_convert_type(x, jnp.int32))


def _call(opt, names, arrays: dict, reach, *, interpret):
    (b, lists, heads, n, d), units = arrays["q"].shape, arrays["k"].shape[2]
    kept = min(opt.k, units)
    float32 = arrays["q"].dtype == jnp.float32
    chunk, width, together = CHUNK[float32], power(d), 1 << (heads - 1).bit_length()
    rows = max(16 // together, min(ROWS[float32] // together, 1 << (n - 1).bit_length()), 1)
    blocks = -(-n // rows)
    long = -(-units // chunk) * chunk
    parts = min(1 << max(0, (PROGRAMS // (b * lists * blocks)).bit_length() - 1), max(1, long // (4 * chunk)))
    room = 2 * max(power(kept), chunk)

    def by_block(x, axis):  # [..., n, ...] -> [..., blocks, rows, ...]
        x = body.pad(x, axis, blocks * rows)
        return x.reshape(*x.shape[:axis], blocks, rows, *x.shape[axis + 1 :])

    def by_query(x):  # [b, L, r, n, ...] -> [b, L, blocks, rows x heads, ...], the heads of a query together
        x = jnp.moveaxis(by_block(body.pad(x, 2, together), 3), 2, 4)
        if opt.heads == "max" and together > heads:  # heads that are none repeat the first
            x = jnp.where((jnp.arange(together) < heads).reshape(-1, *(1,) * (x.ndim - 5)), x, x[:, :, :, :, :1])
        return x.reshape(b, lists, blocks, rows * together, *x.shape[5:])

    q = by_query(body.pad(arrays["q"], 4, width))
    k = body.pad(body.pad(arrays["k"], 2, long), 3, width)
    q_facts = jnp.swapaxes(by_block(arrays["q_facts"], 3), 2, 3)
    k_facts = body.pad(arrays["k_facts"], 3, long)
    operands = [q, k, q_facts, k_facts, reach(rows, chunk)]
    if "weight" in arrays:
        operands.append(by_query(arrays["weight"]))
    shape = b, lists, blocks, parts, rows, room
    sync = _no_barrier if interpret else plt.debug_barrier
    index, values = pl.pallas_call(
        functools.partial(_kernel, opt, names, kept, together, chunk, parts, sync),
        grid=(blocks * parts, lists, b),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=8 if rows * together > 64 or room >= WIDE else 4, num_stages=2),
        name="indexer_select",
        interpret=interpret,
    )(*operands)

    def back(x):  # -> [b, L, n, parts x kept]: parts follow one another as their units do
        return jnp.swapaxes(x[..., :kept], 3, 4).reshape(b, lists, blocks * rows, parts * kept)[:, :, :n]

    index, values = back(index), back(values)
    if parts > 1:
        values, at = lax.top_k(values, kept)
        index = jnp.take_along_axis(index, at, -1)
    return index, values


def select(o: dict, opt, interpret=False):
    """``interpret``: run the kernel on a CPU."""
    return body.select(_call, o, opt, interpret)
