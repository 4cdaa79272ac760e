"""The indexer on TPU: one Mosaic kernel per block of queries.

1. Scores. Keys of the units stream through VMEM a chunk at a time; products run on the MXU, heads are reduced on the
   vector unit, and the scores of the block stay in VMEM: [runs of 128 units, queries, 128], 32 MiB for 8 queries and a
   million units.
2. Threshold. The K-th largest score of every query, by bisection over the ordered bit patterns of floats: a pass counts
   the scores above a bound. Where more scores equal the threshold than are wanted, a second bisection finds up to
   which index they count. Exact, ties to the lowest index.
3. Compaction, query by query: a block of 128 x 128 scores and a block of 128 places of the list meet where the running
   count says so; a one-hot product brings the run of units that holds each place, a triangular one finds the lane.
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
from pallas_kernels.flash.tpu import ANYWHERE, params
from pallas_kernels.flash.tpu_kernels import as_column, as_row
from pallas_kernels.indexer import body
from pallas_kernels.indexer.body import FLOOR

CHUNK = 512  # units that are scored at a time
RUN = LANES * LANES  # units of a block of compaction
ROWS, SCORES = 256, 32 * 2**20  # query heads of a block, bytes of scores kept


def _block(n: int, heads: int, units: int, float32: bool) -> int:
    """Queries per grid step: enough heads for the MXU, few enough scores for the memory."""
    least = 8 if float32 or heads % 2 == 0 else 16  # a whole number of sublane tiles of q
    most = max(least, SCORES // (4 * units) // least * least)
    return min(ceil_to(n, least), ceil_to(max(1, ROWS // heads), least), most)


def _kernel(opt, names, heads: int, kept: int, *refs):
    weighted = len(refs) == 18
    q_by_head, q_facts, span, *refs = refs
    weight, *refs = refs if weighted else (None, *refs)
    k, k_facts, index, values, scores, top, low, high, cut, rank, k_buffer, fact_buffer, q, sem = refs
    q[...] = q_by_head[...].astype(jnp.float32).reshape(q.shape).astype(q.dtype)  # 8 rows of bfloat16 are half a tile
    rows = q.shape[0] // heads
    start, stop = span[0, 0], span[0, 1]
    runs = CHUNK // LANES
    b, h = pl.program_id(0), pl.program_id(1)
    first_run, last_run = start * runs, lax.div(stop * CHUNK + RUN - 1, RUN) * LANES
    first_block = lax.div(start * CHUNK, RUN)

    def fill(i, _):
        scores[i] = jnp.full(scores.shape[1:], FLOOR)
        return 0

    # Blocks of compaction are longer than chunks: what they hold beside the scored chunks is never chosen.
    lax.fori_loop(first_block * LANES, first_run, fill, 0)
    lax.fori_loop(stop * runs, last_run, fill, 0)
    _score(opt, names, heads, q, q_facts, weight, k, k_facts, scores, top, k_buffer, fact_buffer, sem, b, h, start, stop)
    _threshold(kept, scores, top, low, high, cut, rank, first_run, stop * runs)
    index[...] = jnp.zeros_like(index)
    values[...] = jnp.full_like(values, -jnp.inf)
    lax.fori_loop(0, rows, functools.partial(_compact, scores, low, cut, index, values, first_block, last_run), 0)


def _score(opt, names, heads, q, q_facts, weight, k, k_facts, scores, top, k_buffer, fact_buffer, sem, b, h, start, stop):
    rows = q.shape[0] // heads
    column = lambda ref, i: as_column(ref[i : i + 1, :])  # noqa: E731
    row_facts = [column(q_facts, i)[:rows] for i in range(q_facts.shape[0])]
    weights = None if weight is None else as_column(weight[...])[: q.shape[0]]
    at_k = lambda x: (b if x.shape[0] > 1 else 0, lax.div(h, pl.num_programs(1) // x.shape[1]))  # noqa: E731

    def copies(c, slot):
        at = pl.ds(pl.multiple_of(c * CHUNK, CHUNK), CHUNK)
        yield pltpu.make_async_copy(k.at[*at_k(k), at, :], k_buffer.at[slot], sem.at[slot])
        yield pltpu.make_async_copy(k_facts.at[*at_k(k_facts), :, at], fact_buffer.at[slot], sem.at[slot])

    @pl.when(start < stop)
    def _():
        for copy in copies(start, lax.rem(start, 2)):
            copy.start()

    top[...] = jnp.full_like(top, FLOOR)

    def chunk(c, _):
        slot = lax.rem(c, 2)

        @pl.when(c + 1 < stop)
        def _():
            for copy in copies(c + 1, 1 - slot):
                copy.start()

        for copy in copies(c, slot):
            copy.wait()
        s = dot(q[...], k_buffer[slot], NT) * opt.scale
        s = jnp.maximum(s, 0.0) if opt.gate == "relu" else s
        s = s if weights is None else s * weights
        parts = [s[h * rows : (h + 1) * rows] for h in range(heads)]
        s = functools.reduce(jnp.maximum if opt.heads == "max" else jnp.add, parts)
        key = lambda i: fact_buffer[slot, i : i + 1, :]  # noqa: E731
        s = body.kept(body.eligible(opt, names, row_facts.__getitem__, key, s.shape), s, FLOOR)
        for i in range(CHUNK // LANES):
            part = s[:, i * LANES : (i + 1) * LANES]
            scores[c * (CHUNK // LANES) + i] = part
            top[...] = jnp.maximum(top[...], part)
        return 0

    lax.fori_loop(start, stop, chunk, 0)


def _threshold(kept: int, scores, top, low, high, cut, rank, first_run, last_run):
    """Leaves in ``low`` the bits of each query's threshold, and in ``cut`` the last index at which a score that equals it
    is chosen. ``high``, ``rank`` are room to work in."""
    size = CHUNK // LANES
    steps = lax.div(last_run - first_run, size)

    def spread(x):
        return jnp.broadcast_to(x, top.shape)

    def count(test):
        """[rows, 128]: how many scores of each query pass ``test(scores, first index)``."""

        def step(i, total):
            at = first_run + i * size
            return total + jnp.where(test(scores[pl.ds(at, size)], at), 1.0, 0.0).sum(0)

        return spread(lax.fori_loop(0, steps, step, jnp.zeros(top.shape, jnp.float32)).sum(-1, keepdims=True))

    def floats(bits):
        return lax.bitcast_convert_type(body.ordered(bits), jnp.float32)

    def bits(x):
        return body.ordered(lax.bitcast_convert_type(x, jnp.int32))

    def bisect(enough):
        """Halve [low, high) until one number is left: ``enough(middle)`` -> (stay above it, it is exact)."""

        def more(_):
            return jnp.max(jnp.where(high[...] - 1 > low[...], 1, 0)) > 0

        def step(_):
            middle = body.midpoint(low[...], high[...])
            above, exact = enough(middle)
            low[...] = jnp.where(above > 0, middle, low[...])
            high[...] = jnp.where(exact > 0, middle + 1, jnp.where(above > 0, high[...], middle))
            return 0

        lax.while_loop(more, step, 0)

    def reached(middle):
        bound = floats(middle)
        found = count(lambda x, _: x >= bound)
        return jnp.where(found >= kept, 1, 0), jnp.where(found == kept, 1, 0)

    low[...] = bits(jnp.full(top.shape, FLOOR))
    high[...] = bits(spread(top[...].max(-1, keepdims=True))) + 1
    bisect(reached)
    chosen = low[...]
    bound = floats(chosen)
    rank[...] = kept - count(lambda x, _: x > bound)  # how many of those that equal the threshold are wanted
    equal = count(lambda x, _: x == bound)
    low[...] = jnp.full_like(low, -1)
    high[...] = jnp.where((equal > rank[...]) & (bound > FLOOR), last_run * LANES - 1, 0)

    def index(at, shape):
        return (at + lax.broadcasted_iota(jnp.int32, shape, 0)) * LANES + lax.broadcasted_iota(jnp.int32, shape, 2)

    def wanted(middle):
        found = count(lambda x, at: jnp.where((x == bound) & (index(at, x.shape) <= middle), 1, 0) > 0)
        # ``low`` ends on the largest index up to which fewer than the wanted are found.
        return jnp.where(found < rank[...], 1, 0), jnp.zeros_like(middle)

    bisect(wanted)
    cut[...] = jnp.where((equal > rank[...]) & (bound > FLOOR), high[...], 2**30)
    low[...] = chosen


def _compact(scores, low, cut, index, values, first_block, last_run, r, _):
    """Write the chosen units of query ``r``, in ascending order."""
    mine = pl.ds(r, 1)
    square = LANES, LANES
    run, lane = (lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
    before = jnp.where(lane < run, 1.0, 0.0).astype(jnp.bfloat16)  # of each run, the runs before it
    up_to = jnp.where(run <= lane, 1.0, 0.0).astype(jnp.bfloat16)  # of each lane, the lanes up to it
    bound = lax.bitcast_convert_type(body.ordered(low[mine, :]), jnp.float32)
    last = cut[mine, :]

    def block(c, taken):
        x = scores[pl.ds(c * LANES, LANES), mine, :].reshape(square)
        unit = (c * LANES + run) * LANES + lane
        equal = (x == bound) & (unit <= last)
        chosen = jnp.where((x > FLOOR) & ((x > bound) | equal), 1.0, 0.0)
        ones = chosen.astype(jnp.bfloat16)
        count = chosen.sum(-1, keepdims=True)
        first = as_row(dot(before, ones, NN).sum(-1, keepdims=True)) + taken.astype(jnp.float32)
        count, total = as_row(count), jnp.sum(chosen).astype(jnp.int32)

        def places(p, _):
            place = (p * LANES + run).astype(jnp.float32)
            held = jnp.where((place >= first) & (place < first + count), 1.0, 0.0)  # [place, run of units]
            mask = dot(held.astype(jnp.bfloat16), ones, NN)
            nth = place - jnp.sum(held * first, -1, keepdims=True)
            pick = jnp.where((mask > 0) & (dot(mask.astype(jnp.bfloat16), up_to, NN) == nth + 1), 1.0, 0.0)
            row = jnp.sum(held * lane.astype(jnp.float32), -1, keepdims=True)
            found = jnp.sum(pick * (row * LANES + lane.astype(jnp.float32)), -1, keepdims=True)
            value = jnp.sum(pick * dot(held, x, NN), -1, keepdims=True)
            some = as_row(held.sum(-1, keepdims=True)) > 0
            index[p, mine, :] = jnp.where(some, as_row(found).astype(jnp.int32) + c * RUN, index[p, mine, :])
            values[p, mine, :] = jnp.where(some, as_row(value), values[p, mine, :])
            return 0

        lax.fori_loop(lax.div(taken, LANES), lax.div(taken + total + LANES - 1, LANES), places, 0)
        return taken + total

    lax.fori_loop(first_block, lax.div(last_run, LANES), block, 0)
    return 0


def _call(opt, names, arrays: dict, reach, *, interpret):
    (b, lists, heads, n, d), units = arrays["q"].shape, arrays["k"].shape[2]
    kept = min(opt.k, units)
    long, width, places = ceil_to(units, RUN), ceil_to(d, LANES), ceil_to(kept, LANES)
    rows = _block(n, heads, long, arrays["q"].dtype == jnp.float32)
    blocks = -(-n // rows)
    lanes = ceil_to(rows, LANES)

    def by_block(x, axis):  # [..., n, ...] -> [..., blocks, rows, ...]
        x = body.pad(x, axis, blocks * rows)
        return x.reshape(*x.shape[:axis], blocks, rows, *x.shape[axis + 1 :])

    q = by_block(body.pad(arrays["q"], 4, width), 3)  # no copy where heads come first: a block takes its rows of each
    q_facts = body.pad(jnp.swapaxes(by_block(arrays["q_facts"], 3), 2, 3), 4, lanes)
    span = reach(rows, CHUNK)[:, :, :, None]
    given = {"q": q, "q_facts": q_facts, "span": span}
    if "weight" in arrays:
        w = jnp.swapaxes(by_block(arrays["weight"], 3), 2, 3).reshape(b, lists, blocks, 1, heads * rows)
        given["weight"] = body.pad(w, 4, ceil_to(heads * rows, LANES))
    k = body.pad(body.pad(arrays["k"], 2, long), 3, width)
    k_facts = body.pad(arrays["k_facts"], 3, long)

    def spec(x, memory=pltpu.VMEM):
        apart = x.shape[2:-3]  # the heads of q
        first = lambda b, h: (b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0, *(0 for _ in apart))  # noqa: E731
        at = lambda b, h, i: (*first(b, h), i, 0, 0)  # noqa: E731
        return pl.BlockSpec((None, None, *apart, None, *x.shape[-2:]), at, memory_space=memory)

    out = pl.BlockSpec((None, None, None, places // LANES, rows, LANES), lambda b, h, i: (b, h, i, 0, 0, 0))
    shape = b, lists, blocks, places // LANES, rows, LANES
    by_lane = [pltpu.VMEM((rows, LANES), x) for x in (jnp.float32, jnp.int32, jnp.int32, jnp.int32, jnp.float32)]
    index, values = pl.pallas_call(
        functools.partial(_kernel, opt, names, heads, kept),
        grid=(b, lists, blocks),
        in_specs=[spec(x, pltpu.SMEM if n == "span" else pltpu.VMEM) for n, x in given.items()] + [ANYWHERE] * 2,
        out_specs=[out, out],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)],
        scratch_shapes=[
            pltpu.VMEM((long // LANES, rows, LANES), jnp.float32), *by_lane,
            pltpu.VMEM((2, CHUNK, width), k.dtype), pltpu.VMEM((2, k_facts.shape[2], CHUNK), jnp.int32),
            pltpu.VMEM((heads * rows, width), q.dtype), pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=params(("parallel", "parallel", "arbitrary")),
        name="indexer_select",
        interpret=interpret,
    )(*given.values(), k, k_facts)  # fmt: skip

    def back(x):
        return jnp.moveaxis(x, 3, 4).reshape(b, lists, blocks * rows, places)[:, :, :n, :kept]

    return back(index), back(values)


def select(o: dict, opt, interpret=False):
    """``interpret``: a ``pltpu.InterpretParams`` to run the kernel on a CPU."""
    return body.select(_call, o, opt, interpret, ascending=True)
