"""HiPrune: anchors and their neighbours from a middle layer of the vision tower, registers from a deep one ("HiPrune:
Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models").

With s the attention a token receives from all rows (CLS row included, CLS column left out), averaged over heads:

    anchors:   the n_a = round(K alpha / 5) largest of s_middle
    buffers:   index - 1, + 1, - width, + width of each anchor, clamped to the image (a line's end has the next line's
               start for a neighbour)
    registers: the K - |anchors + buffers| largest of s_deep among the others

|anchors + buffers| varies, K does not: both roles are one top-K of s_deep with the first two raised to +inf.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from jaxattn.core.reduce import (
    check_budget,
    choose,
    count_of,
    dispose,
    evidence_rows,
    newline_rows,
    rows_left,
    valid_rows,
)
from jaxattn.core.select import forbid, gather_tokens, keep_top, protect, rank_of, scatter_tokens
from jaxattn.core.slots import compact
from jaxattn.core.types import Array, Need, contract, expect, operand
from jaxattn.registry import register


def hiprune_scores(middle: Array, deep: Array, keep, *, alpha=0.1, width: int | None = None,
                   valid: Array | None = None) -> Array:
    """``deep`` with anchors and buffers raised to +inf: its ``keep`` largest entries are HiPrune's choice.

    Args:
      middle, deep: [B, N], received attention of the N patches of one image (or crop) in raster order.
      keep: K, a number or an int32 array, scalar or [B].  alpha: share of anchors with their neighbours.
      width: patches per line; None for a square image.  valid: bool [B, N].
    """  # fmt: skip
    expect("deep", f"shape {deep.shape}", f"the shape of middle, {middle.shape}", deep.shape == middle.shape)
    n = middle.shape[-1]
    width = _width(width, n)
    valid = jnp.ones(middle.shape, bool) if valid is None else valid
    # Half to even, as Python rounds.
    anchors = jnp.round(jnp.asarray(keep, jnp.float32) * alpha / 5).astype(jnp.int32)
    anchor = (rank_of(forbid(middle, ~valid)) < anchors[..., None]) & valid
    place = jnp.arange(n)
    hit = anchor
    for step in (-1, 1, -width, width):
        near = jnp.broadcast_to(jnp.clip(place + step, 0, n - 1), anchor.shape)
        hit |= scatter_tokens(jnp.zeros(anchor.shape, bool), jnp.where(anchor, near, n), anchor)
    return forbid(protect(deep, hit), ~valid)


def hiprune_select(middle: Array, deep: Array, keep: int, *, alpha: float = 0.1, width: int | None = None) -> Array:
    """int32 [B, keep] ascending: the tokens that HiPrune keeps. Arguments as in :func:`hiprune_scores`."""
    return keep_top(hiprune_scores(middle, deep, keep, alpha=alpha, width=width), keep)[0]


def _width(width: int | None, n: int) -> int:
    side = math.isqrt(n) if width is None else width
    expect("width", width, f"the patches per line (None only for a square image), a divisor of {n}",
           side >= 1 and n % side == 0 and (width is not None or side * side == n))  # fmt: skip
    return side


@contract
class _HiPrune:
    keep: int = operand("budget")
    alpha: float = operand("scalar", 0.1)
    middle: int | None = None
    deep: int = -2
    width: int | None = None
    crops: int | None = None
    newlines: int = 0
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)
        expect("crops", self.crops, f"None, or between 1 and keep = {self.keep}", 1 <= (self.crops or 1) <= self.keep)
        expect("newlines", self.newlines, "0 or more", self.newlines >= 0)
        expect("alpha", self.alpha, "0 or more", self.alpha >= 0)
        each = self.keep // (self.crops or 1)
        need = 5 * round(each * self.alpha / 5)
        expect("alpha", self.alpha, f"anchors with 4 neighbours each ({need}) within the {each} kept", need <= each)

    def resolve(self, layers: int):
        """The record with ``middle`` set for a tower of ``layers`` layers: the 9th of 24."""
        if self.middle is not None:
            return self
        return dataclasses.replace(self, middle=max(0, round(layers * 9 / 24) - 1))

    def needs(self):
        known = self.middle is not None
        expect("middle", self.middle, "a layer number, or resolve(layers) called before needs()", known)
        return (
            Need("middle", what="received", at=f"vision.{self.middle}", rows="all", over_heads="mean"),
            Need("deep", what="received", at=f"vision.{self.deep}", rows="all", over_heads="mean"),
        )

    def rows(self, n):
        return rows_left(self.keep, n, self.mode, self.newlines)

    def apply(self, params, state, tokens, evidence, ctx):
        b, n = tokens.x.shape[:2]
        m, crops = n - self.newlines, self.crops or 1
        expect("tokens", f"{m} patches", f"a multiple of the {crops} crops", m % crops == 0)
        count, valid = count_of(params, m), valid_rows(tokens)
        middle, deep = (evidence_rows(evidence, name, tokens) for name in ("middle", "deep"))
        always = newline_rows(tokens) if self.newlines else None
        patch = jnp.broadcast_to(jnp.arange(n), (b, n))
        if always is not None:
            patch = compact(~always, m)[0]

        def by_crop(x):
            return gather_tokens(x, patch).reshape(b * crops, -1)

        mid, low, live = by_crop(middle), by_crop(deep), by_crop(valid)
        each = count // crops
        scores = hiprune_scores(mid, low, each, alpha=params["alpha"], width=self.width, valid=live)
        chosen = choose(scores, each, live).reshape(b, m)
        keep = scatter_tokens(jnp.zeros((b, n), bool) if always is None else always & valid, patch, chosen)
        return dispose(tokens, keep, self.rows(n), self.mode, self.positions), state, {"scores": deep}


@register("tokens")
def hiprune(keep: int, alpha: float = 0.1, middle: int | None = None, deep: int = -2, width: int | None = None,
            crops: int | None = None, newlines: int = 0, mode: str = "keep", positions: str = "original"):
    """Keep ``keep`` image tokens in three roles: anchors, their neighbours, registers.

    Args:
      keep: image tokens per image, all crops together.  alpha: share spent on anchors and neighbours (paper: 0.1);
        0 keeps the largest of the deep layer.
      middle, deep: layers of the vision tower; ``middle=None`` is 3/8 of the depth (the 9th of CLIP-L's 24 layers).
      width: patches per line; None for square images (or crops).
      crops: crops of equal size, their patches one after the other; each keeps ``keep // crops``. None: as many as the
        model made of the pictures.
      newlines: rows labelled ``kind == KIND_NEWLINE``; they are kept besides ``keep``.
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    """  # fmt: skip
    return _HiPrune(keep, alpha, middle, deep, width, crops, newlines, mode, positions)
