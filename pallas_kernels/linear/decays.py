"""Sums of log-decays over the tokens between two others, for one chunk, in the operations every backend has.

A weight between token s and a later token t is exp of the decays of s+1 .. t. With one decay per token that is a table
[C, C] of differences. With one per channel the table would be [C, C, F]; instead the pairs are divided by the smallest
aligned block of 2b tokens that holds both: t lies in its second half, s in its first, and the sum falls apart at the
middle into a part of t and a part of s. log2(C) products of matrices cover all pairs, and nothing is ever subtracted.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash.pairs import NN, NT, dot

GRAINS = 256.0  # 2^8: with decays cut off at -120, a sum over 256 tokens fits the 24 bits of float32


def running(d):
    """(coarse, fine): running sums of log-decays along the last axis in two parts that are to be subtracted apart.

    The coarse part of a decay is a multiple of 1/256. Sums of those are exact, so that neither a strong decay costs its
    neighbours precision nor many tokens with the same one; the fine sums are small. By a product of matrices: XLA's
    cumulative sum takes quadratic time on a CPU."""
    coarse = jnp.round(d * GRAINS) / GRAINS
    up_to = np.triu(np.ones((d.shape[-1], d.shape[-1]), d.dtype))
    summed = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return lax.stop_gradient(summed(coarse, up_to)), summed(d - lax.stop_gradient(coarse), up_to)


def index(shape, axis: int):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def pairs(size: int, b, later: int = 0):
    """bool [size, size]: pairs that part in blocks of ``b``; b = 0 is each token with itself. ``later``: the axis of t.

    One comparison of a column and a row, so that a kernel has no table of indices to keep."""
    t, s = (index((size, 1) if axis == 0 else (1, size), axis) for axis in (later, 1 - later))
    if isinstance(b, int) and b == 0:
        return t == s
    return jnp.where((t & b) != 0, (t & -b) - b, -1) == (s & -b)


def blocks(d, swap):
    """Yields (b, before, after) for b = 1, 2, 4, ..., C, all of [C, F] like d: the sum of d from the first token of the
    aligned block of b tokens to this one, and from behind this one to the block's last. ``swap(x, b)`` gives each row
    what the rows of its block's sibling hold, x being the same throughout a block."""
    size = d.shape[0]
    before, after, b = d, jnp.zeros_like(d), 1
    yield b, before, after
    while b < size:
        other = swap(before + after, b)
        second = second_half(d.shape, b)
        before, after = before + jnp.where(second, other, 0.0), after + jnp.where(second, 0.0, other)
        b *= 2
        yield b, before, after


def second_half(shape, b: int):
    """bool: rows in the second half of their block of 2b."""
    return (index(shape, 0) & b) != 0


def weights(d, swap):
    """([(b, weights [C, F]) for the blocks in which pairs part], exp of the sums before, exp of the sums after)."""
    found = []
    for b, before, after in blocks(d, swap):
        if b == d.shape[0]:
            return found, jnp.exp(before), jnp.exp(after)
        found.append((b, jnp.exp(jnp.where(second_half(d.shape, b), before, after))))


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


# --------------------------------------------------------------------- what a kernel needs of one chunk of one head


class Weights(NamedTuple):
    """``enter`` scales queries that read the state before the chunk, ``leave`` keys on their way into the state behind it,
    ``through`` that state; None for 1. ``table`` [t, s] scales pairs. Per channel ``fold(step, carry)`` goes through the
    blocks in which pairs part: ``step(b, weights [C, F], carry)``."""

    enter: Any = None
    leave: Any = None
    through: Any = None
    table: Any = None
    fold: Any = None


def of_tokens(rows, columns, later: int) -> Weights:
    """From the two parts of the running sums, as rows [1, C] and columns [C, 1]; ``later``: the axis of t in the table."""
    size = columns[0].shape[0]
    between = [c - r if later == 0 else r - c for r, c in zip(rows, columns, strict=True)]
    table = jnp.exp(jnp.where(seen(size, later), between[0] + between[1], -jnp.inf))
    last = [jnp.sum(jnp.where(index(c.shape, 0) == size - 1, c, 0.0), 0, keepdims=True) for c in columns]
    leave = jnp.exp((last[0] - columns[0]) + (last[1] - columns[1]))
    return Weights(jnp.exp(columns[0] + columns[1]), leave, jnp.exp(last[0] + last[1]), table)


def of_channels(d, swap) -> Weights:
    parts, enter, leave = weights(d, swap)

    def fold(step, carry):
        for b, part in parts:
            carry = step(b, part, carry)
        return carry

    return Weights(enter, leave, jnp.exp(jnp.sum(d, 0, keepdims=True)), fold=fold)


def seen(size: int, later: int):
    return index((size, size), later) >= index((size, size), 1 - later)


def scaled(x, w):
    """In the dtype of x, for the next product of matrices."""
    return x if w is None else (x.astype(jnp.float32) * w).astype(x.dtype)


def grown(x, w):
    return x if w is None else x * w


def products(x, y, w: Weights, later: int):
    """Weighted x y^T, float32: queries by keys with ``later`` = 0, keys by queries with 1."""
    size = x.shape[0]
    found = dot(x, y, NT)
    if w.fold is None:
        return jnp.where(seen(size, later), found, 0.0) if w.table is None else found * w.table

    def step(b, part, found):
        return jnp.where(pairs(size, b, later), dot(scaled(x, part), scaled(y, part), NT), found)

    return w.fold(step, jnp.where(pairs(size, 0, later), found, 0.0))


def products_gradient(d, y, w: Weights, later: int, more=None):
    """The gradient of x in ``products(x, y, w, later)`` from that of the result, with ``more`` added."""
    size = d.shape[0]
    if w.fold is None:
        d = jnp.where(seen(size, later), d, 0.0) if w.table is None else d * w.table
        found = dot(d.astype(y.dtype), y, NN)
        return found if more is None else found + more

    def among(b):
        return jnp.where(pairs(size, b, later), d, 0.0).astype(y.dtype)

    def step(b, part, found):
        return found + dot(among(b), scaled(y, part), NN) * part

    own = dot(among(0), y, NN)
    return w.fold(step, own if more is None else own + more)
