"""AIM: merge image tokens before the language model, then prune them inside it layer by layer ("AIM: Adaptive Inference
of Multi-Modal LLMs via Token Merging and Pruning").

``aim_merge``, per frame of n0 tokens: twice bipartite matching on the tokens themselves, r = n0 // 2, then n0 // 4
pairs, plain means; a quarter is left. The order that leaves is that of the matching (unmerged sources by falling
similarity, then destinations), so positions are dealt out anew by default.

``aim``, after each language layer l from ``start`` to ``end``: the importance of a token is its PageRank in that layer,

    P = softmax(logits / 0.1),  d_0 = 1 / S,  d <- d P five times,   importance_j = sqrt(mean_h d[h, j]^2)

and n rate_l image tokens stay for the layers below, rate_l = 1 - (l - start + 1) / (end - start + 1). Text stays.
Deviation: rows dropped earlier take no part in d_0 (the published code, which drops by masking, lets them vote once),
so gathering and masking agree. Counts are of the image rows that enter the language model, padding included. Layers are
counted from 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.reduce import (
    check_budget,
    choose,
    dispose,
    evidence_rows,
    reduce_merge,
    valid_rows,
)
from jaxattn.core.select import gather_tokens
from jaxattn.core.slots import bipartite, merge_tokens
from jaxattn.core.types import Array, Meta, Need, Tokens, contract, expect
from jaxattn.registry import register


# ------------------------------------------------------------------------------------------------------ in the layers
def pagerank_importance(d: Array) -> Array:
    """[B, N] from the heads' PageRank vectors d [B, H, N]: sqrt(mean_h d^2)."""
    d = d.astype(jnp.promote_types(d.dtype, jnp.float32))
    return jnp.sqrt(jnp.mean(jnp.square(d), axis=-2))


@contract
class _AimCut:
    """One cut: ``left`` / ``of`` of the rows that entered the stack stay, by the PageRank of the layer just done.

    ``entered`` is their number; None deduces counts from the rows at the cut (left / (left + 1) of those a cut before
    has left), the same wherever ``of`` divides the number that entered."""

    left: int
    of: int
    entered: int | None = None
    mode: str = "keep"
    positions: str = "original"

    def needs(self):
        return (Need("rank", what="received", at="last", rows="all", temperature=0.1, iterate=5, over_heads=None),)

    def count(self, n):
        """Rows that stay of ``n`` at the cut."""
        if self.entered is not None:
            return min(n, self.entered * self.left // self.of)
        return n * self.left // (self.of if self.mode == "mask" else self.left + 1)

    def rows(self, n):
        # Where nothing stays, one invalid row does: no array is empty.
        return n if self.mode == "mask" else max(1, self.count(n))

    def apply(self, params, state, tokens, evidence, ctx):
        n = tokens.x.shape[1]
        scores = pagerank_importance(evidence_rows(evidence, "rank", tokens, heads=True))
        keep = choose(scores, self.count(n), valid_rows(tokens))
        return dispose(tokens, keep, self.rows(n), self.mode, self.positions), state, {"scores": scores}


@contract
class _Aim:
    """A transform of several sites; ``schedule`` gives the record of each."""

    start: int | None = None
    end: int | None = None
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(1, self.mode, self.positions)
        if self.start is not None and self.end is not None:
            expect("end", self.end, f"at least start = {self.start}", self.end >= self.start)

    def span(self, layers: int) -> tuple[int, int]:
        """First and last layer after which rows are cut, in a stack of ``layers``."""
        start = layers // 2 if self.start is None else self.start
        end = max(start, 3 * layers // 4) if self.end is None else self.end
        ok = 0 <= start <= end and start < layers
        expect("start, end", (start, end), f"0 <= start <= end and start below the {layers} layers", ok)
        return start, end

    def sites(self, layers):
        """Numbers of layers done when a cut happens: site s lies between layers s - 1 and s."""
        start, end = self.span(layers)
        return tuple(range(start + 1, min(end + 2, layers)))

    def schedule(self, layers, n=None):
        """((site, record), ...): the single-site TokenTransforms of a stack of ``layers`` that ``n`` image rows enter
        (None: see ``_AimCut``)."""
        start, end = self.span(layers)
        # The layer before site s is s - 1, its rate (end - (s - 1)) / (end - start + 1) kept in whole numbers.
        return tuple((s, _AimCut(max(0, end - s + 1), end - start + 1, n, self.mode, self.positions))
                     for s in self.sites(layers))  # fmt: skip


@register("tokens")
def aim(start: int | None = None, end: int | None = None, mode: str = "keep", positions: str = "original"):
    """Prune image tokens inside the language model, layer by layer, by PageRank.

    Args:
      start, end: 0-based layers after which the first and the last cut happens (``end`` leaves no image token).
        None: half and three quarters of the depth, the paper's 14 and 21 of 28.
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    """
    return _Aim(start, end, mode, positions)


# ------------------------------------------------------------------------------------------------------------- before
@contract
class _AimMerge:
    parts: tuple = (2, 4)
    frames: int = 1
    positions: str = "fresh"

    def check(self):
        ok = isinstance(self.parts, tuple) and all(isinstance(p, int) and p >= 0 for p in self.parts)
        expect("parts", self.parts, "whole numbers: each pass merges n0 // part rows (0: none)", ok)
        expect("frames", self.frames, "at least 1", self.frames >= 1)
        check_budget(1, "keep", self.positions)

    def passes(self, n):
        """Rows merged by each pass in a frame of ``n`` rows."""
        return tuple(n // p if p else 0 for p in self.parts)

    def rows(self, n):
        expect("tokens", f"{n} rows", f"a multiple of the {self.frames} frames", n % self.frames == 0)
        left = n // self.frames
        for r in self.passes(left):
            expect("parts", self.parts, f"at most half of the {left} rows left merged by a pass", 2 * r <= left)
            left -= r
        return left * self.frames

    def apply(self, params, state, tokens, evidence, ctx):
        b, n, c = tokens.x.shape
        rows, each = self.rows(n), n // self.frames
        x = tokens.x.reshape(b * self.frames, each, c)
        valid = valid_rows(tokens).reshape(x.shape[:2])
        index = jnp.broadcast_to(jnp.arange(each), valid.shape)
        slot = jnp.where(valid, index, -1)
        for r in self.passes(each):
            step, order = bipartite(jax.lax.stop_gradient(x), r, valid=valid)
            index, valid = gather_tokens(index, order), gather_tokens(valid, order)
            x = merge_tokens(x, step, x.shape[1] - r, mode="mean")
            slot = jnp.where(slot >= 0, jnp.take_along_axis(step, jnp.maximum(slot, 0), axis=1), -1)
        # Frames stand one after the other again.
        frame = jnp.tile(jnp.arange(self.frames), b)[:, None]
        left = x.shape[1]
        slot = jnp.where(slot >= 0, slot + frame * left, -1).reshape(b, n)
        index = (index + frame * each).reshape(b, rows)
        out = reduce_merge(tokens, x.reshape(b, rows, c), slot, index, valid.reshape(b, rows), positions=self.positions)
        return out, state, {}


@register("tokens")
def aim_merge(parts: tuple[int, ...] = (2, 4), frames: int = 1, positions: str = "fresh"):
    """Merge similar tokens of each frame before the language model: pass i merges n0 // parts[i] pairs.

    Args:
      parts: the paper's (2, 4) leaves a quarter.  frames: frames of equal length, one after the other, in a row.
      positions: "fresh", the merged rows' order is their order in time; "original", a merged row stands where its
        destination (or the unmerged token) stood.
    """
    return _AimMerge(parts, frames, positions)


def aim_merge_tokens(x: Array, parts: tuple[int, ...] = (2, 4)) -> Array:
    """x [B, N, C], one frame each -> the merged tokens [B, N - sum(N // part), C] in the matching's order."""
    return _AimMerge(parts).apply({}, None, Tokens(x, Meta.of(x.shape[1])), {}, None)[0].x
