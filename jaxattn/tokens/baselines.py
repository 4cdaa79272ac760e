"""The honest baselines of every board: tokens kept at random, spread evenly over the grid, or averaged."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.reduce import (
    check_budget,
    choose,
    count_of,
    dispose,
    reduce_merge,
    rows_left,
    valid_rows,
)
from jaxattn.core.select import rank_of
from jaxattn.core.slots import merge_tokens
from jaxattn.core.types import Array, Tokens, contract, operand
from jaxattn.registry import register


@contract
class _Random:
    keep: int = operand("budget")
    seed: int = operand("int", 0)
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        b, n = tokens.x.shape[:2]
        seed = params["seed"]
        key = jax.random.key(seed) if ctx is None or ctx.key is None else jax.random.fold_in(ctx.key, seed)
        rows = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (n,)))(jnp.arange(b))
        keep = choose(rows, count_of(params, n), valid_rows(tokens))
        return dispose(tokens, keep, self.rows(n), self.mode, self.positions), state, {}


@register("tokens")
def random(keep: int, seed: int = 0, mode: str = "keep", positions: str = "original"):
    """``keep`` tokens drawn without replacement, anew for each image of the batch.

    ``ctx.key``, where given, is folded with ``seed``; without it the same batch place draws the same tokens each call.
    """
    return _Random(keep, seed, mode, positions)


def grid_order(tokens: Tokens) -> Array:
    """int32 [B, N]: place of each valid row along the Z-order curve of labels "row" and "col" (each below 1024), or in
    the given order where the labels are absent; invalid rows come last."""
    b, n = tokens.x.shape[:2]
    labels = tokens.meta.labels
    curve = jnp.arange(n, dtype=jnp.int32)
    if "row" in labels and "col" in labels:
        curve = _spread_bits(labels["row"]) * 2 + _spread_bits(labels["col"])
    curve = jnp.where(valid_rows(tokens), jnp.broadcast_to(curve, (b, n)), jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(curve, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def _spread_bits(x):
    """Bit i of x (10 bits) at bit 2 i."""
    x = jnp.asarray(x, jnp.int32) & 0x3FF
    for shift, mask in ((8, 0xFF00FF), (4, 0xF0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        x = (x | (x << shift)) & mask
    return x


@contract
class _Uniform:
    keep: int = operand("budget")
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        n = tokens.x.shape[1]
        valid = valid_rows(tokens)
        live = valid.sum(-1, keepdims=True)
        k = jnp.minimum(count_of(params, n), live)
        # Every live/k-th place of the curve, half a step in: exactly k of the remainders fall below k.
        phase = (grid_order(tokens) * k + live // 2) % jnp.maximum(live, 1)
        return dispose(tokens, (phase < k) & valid, self.rows(n), self.mode, self.positions), state, {}


@register("tokens")
def uniform(keep: int, mode: str = "keep", positions: str = "original"):
    """``keep`` tokens spread evenly over the image: equal steps along the Z-order curve of the labels "row" and "col"
    (a quarter of a grid of even sides is one token of each 2 x 2 cell), or along the index without those labels."""
    return _Uniform(keep, mode, positions)


@contract
class _MeanPool:
    keep: int = operand("budget")
    positions: str = "original"

    def check(self):
        check_budget(self.keep, "keep", self.positions)

    def rows(self, n):
        return rows_left(self.keep, n, "keep")

    def apply(self, params, state, tokens, evidence, ctx):
        b, n = tokens.x.shape[:2]
        valid, rows = valid_rows(tokens), self.rows(n)
        live = valid.sum(-1, keepdims=True)
        k = jnp.minimum(count_of(params, n), live)
        cell = jnp.where(valid, grid_order(tokens) * k // jnp.maximum(live, 1), rows)
        # Cells in the order of their first row, so that the rows that leave ascend in time.
        first = jnp.full((b, rows), n).at[jnp.arange(b)[:, None], cell].min(jnp.arange(n)[None], mode="drop")
        rank = rank_of(-first)
        index = jnp.sort(first, axis=-1)
        there = index < n
        slot = jnp.where(valid, jnp.take_along_axis(rank, jnp.minimum(cell, rows - 1), axis=1), -1)
        x = merge_tokens(tokens.x, slot, rows)
        out = reduce_merge(tokens, x, slot, jnp.where(there, index, 0), there, positions=self.positions)
        return out, state, {}


@register("tokens")
def mean_pool(keep: int, positions: str = "original"):
    """``keep`` averages of neighbouring tokens: equal runs of the Z-order curve (see ``uniform``). Each takes position
    and labels of its first token; ``meta.size`` is left alone."""
    return _MeanPool(keep, positions)
