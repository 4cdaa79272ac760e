"""MustDrop: tokens leave in every stage, a key set never does ("Multi-Stage Vision Token Dropping: Towards Efficient
Multimodal Large Language Model").

``mustdrop_merge``, after the tower's first layer: windows of 3 x 3 patches whose mean pairwise cosine reaches 0.8 become
their mean; merged windows come first, most alike first, then the other patches in order.
``mustdrop_keys``, on the tower's output: the ceil(0.08 (n - 1)) patches of largest [CLS] attention get the label
"protected".
``mustdrop``, after language layers 2, 6, 10 and 14 (from 0): with A the heads' mean attention of the rows T behind the
image, tot_j = sum_{i in T} A_ij and mx_j = max_{i in T} A_ij, image token j leaves if

    tot_j < global * sum_j tot_j   and   mx_j < individual   and j is not protected
``mustdrop_trim``, after the prompt: cached rows of image tokens that the last stage no longer has are emptied in the
earlier layers, too.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core import cache
from jaxattn.core.reduce import (
    check_budget,
    choose,
    dispose,
    evidence_rows,
    reduce_merge,
    valid_rows,
)
from jaxattn.core.select import forbid, protect, rank_of
from jaxattn.core.slots import compact, merge_tokens, windows
from jaxattn.core.types import Array, Meta, Need, contract, expect, operand
from jaxattn.registry import register
from jaxattn.tokens.staged import stage_sites


# ---------------------------------------------------------------------------------------------------------- the tower
def window_similarity(x: Array, slot: np.ndarray, count: int) -> Array:
    """[B, windows]: mean cosine over the pairs of different members of each window. x [B, N, C]; slot int32 [1, N]."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    unit = wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    # The sum over all pairs is the square of the sum of unit rows; pairs of a row with itself are taken off.
    total = merge_tokens(unit, jnp.asarray(slot), count, mode="mean")
    size = np.bincount(slot[0], minlength=count)
    own = merge_tokens(jnp.square(unit), jnp.asarray(slot), count, mode="mean").sum(-1) * size
    return (jnp.square(total).sum(-1) * size**2 - own) / np.maximum(size * (size - 1), 1)


def mustdrop_merge_plan(x: Array, grid: tuple[int, int], threshold=0.8, *, size: int = 3, least: int = 0):
    """Which windows merge.

    Args:
      x: [B, h * w, C] in raster order.  grid: (h, w).  threshold: windows of at least this similarity merge.
      size: side of a window.  least: the ``least`` most alike windows merge in any case (a static saving of rows).
    Returns: slot int32 [B, N]; index int32 [B, M], the first member of each row that leaves, M = N - least (size^2 - 1);
      valid bool [B, M].
    """
    b, n = x.shape[:2]
    expect("grid", grid, f"(rows, columns) of the {n} patches", grid[0] * grid[1] == n)
    expect("size", size, f"a divisor of both sides of {grid}", size >= 1 and grid[0] % size == 0 and grid[1] % size == 0)
    of, count = windows(grid, size)
    expect("least", least, f"between 0 and the {count} windows", 0 <= least <= count)
    alike = window_similarity(x, of, count)
    rank = rank_of(alike)
    merges = (alike >= threshold) | (rank < least)
    # Merged windows are the most alike ones, so their ranks count from 0.
    mine, place = merges[:, of[0]], rank[:, of[0]]
    merged = merges.sum(-1, keepdims=True)
    slot = jnp.where(mine, place, merged + jnp.cumsum(~mine, axis=-1) - 1).astype(jnp.int32)
    rows = n - least * (size * size - 1)
    first = jnp.full((b, rows), n).at[jnp.arange(b)[:, None], slot].min(jnp.arange(n)[None], mode="drop")
    return slot, jnp.where(first < n, first, 0).astype(jnp.int32), first < n


@contract
class _Merge:
    threshold: float = operand("scalar", 0.8)
    grid: tuple | None = None
    size: int = 3
    least: int = 0
    positions: str = "fresh"

    def check(self):
        check_budget(1, "keep", self.positions)
        expect("least", self.least, "0 or more", self.least >= 0)

    def shape(self, n):
        side = math.isqrt(n)
        expect("grid", self.grid, f"(rows, columns) of {n} patches", self.grid is not None or side * side == n)
        return (side, side) if self.grid is None else self.grid

    def rows(self, n):
        return n - self.least * (self.size**2 - 1)

    def apply(self, params, state, tokens, evidence, ctx):
        grid = self.shape(tokens.x.shape[1])
        slot, index, valid = mustdrop_merge_plan(tokens.x, grid, params["threshold"], size=self.size, least=self.least)
        x = merge_tokens(tokens.x, slot, index.shape[1], mode="mean")
        return reduce_merge(tokens, x, slot, index, valid, positions=self.positions), state, {}


@register("tokens")
def mustdrop_merge(threshold: float = 0.8, grid: tuple[int, int] | None = None, size: int = 3, least: int = 0,
                   positions: str = "fresh"):
    """Merge windows of alike patches, every patch being valid. For the site "vision.1".

    Args:
      threshold: mean pairwise cosine from which a window merges; above 1 none does.
      grid: (rows, columns) of patches, None for a square.  size: side of a window.
      least: windows that merge in any case, most alike first; what is saved for certain shortens the arrays, what an
        image merges beyond it leaves rows that are not valid.
      positions: "fresh", the order of the rows that leave is their order in time; "original", a merged row stands where
        its first patch stood.
    """  # fmt: skip
    return _Merge(threshold, grid, size, least, positions)


def mustdrop_key_set(attention_cls: Array, ratio: float = 0.08, *, valid: Array | None = None) -> Array:
    """bool [B, N]: the ceil(ratio (N - 1)) patches of largest [CLS] attention [B, N], N the valid ones."""
    valid = jnp.ones(attention_cls.shape, bool) if valid is None else valid
    # A hair below, so that a product that is whole stays whole in float32.
    count = jnp.ceil(ratio * (valid.sum(-1) - 1) - 1e-4).astype(jnp.int32)
    return choose(attention_cls, count, valid)


@contract
class _Keys:
    ratio: float = operand("scalar", 0.08)
    layer: int = -1

    def check(self):
        expect("ratio", self.ratio, "a share in [0, 1]", 0 <= self.ratio <= 1)

    def needs(self):
        return (Need("cls", what="received", at=f"vision.{self.layer}", rows="cls"),)

    def rows(self, n):
        return n

    def apply(self, params, state, tokens, evidence, ctx):
        keys = mustdrop_key_set(evidence_rows(evidence, "cls", tokens), params["ratio"], valid=valid_rows(tokens))
        labels = {**tokens.meta.labels, "protected": keys.astype(jnp.int32)}
        return tokens.replace(meta=tokens.meta.replace(labels=labels)), state, {}


@register("tokens")
def mustdrop_keys(ratio: float = 0.08, layer: int = -1):
    """Label the patches that must stay ("protected" = 1); no row leaves. For the site "vision".

    ratio: their share of the patches.  layer: of the tower, whose [CLS] attention decides.
    """
    return _Keys(ratio, layer)


# ------------------------------------------------------------------------------------------------- the language model
def mustdrop_keep(attention: Array, share, individual, *, protected: Array | None = None,
                  valid: Array | None = None) -> Array:
    """bool [B, N]: image tokens that stay.

    Args:
      attention: [B, T, N], heads' mean attention of the rows behind the image to image tokens (rows that do not count: 0).
      share: threshold of a token's sum, as a share of all sums.  individual: threshold of its largest entry.
      protected, valid: bool [B, N].
    """  # fmt: skip
    valid = jnp.ones((attention.shape[0], attention.shape[2]), bool) if valid is None else valid
    attention = jnp.where(valid[:, None], attention, 0)
    total, most = attention.sum(1), attention.max(1)
    stay = (total >= share * total.sum(-1, keepdims=True)) | (most >= individual)
    return (stay if protected is None else stay | protected) & valid


@contract
class _Drop:
    share: float = operand("scalar", 0.001)
    individual: float = operand("scalar", 0.001)
    capacity: int | None = None
    mode: str = "keep"
    positions: str = "fresh"

    def needs(self):
        return (Need("rows", what="rows", at="last", rows="text"),)

    def rows(self, n):
        return n if self.mode == "mask" or self.capacity is None else min(n, self.capacity)

    def apply(self, params, state, tokens, evidence, ctx):
        (b, n), valid = tokens.x.shape[:2], valid_rows(tokens)
        expect("evidence", sorted(evidence) or "none", "the entry 'rows'", "rows" in evidence)
        rows = evidence["rows"]
        expect("evidence['rows']", f"shape {tuple(rows.shape)}", f"[{b}, T, {n}]", rows.ndim == 3 and rows.shape[2] == n)
        protected = tokens.meta.labels.get("protected")
        protected = None if protected is None else jnp.broadcast_to(protected, (b, n)) > 0
        keep = mustdrop_keep(rows, params["share"], params["individual"], protected=protected, valid=valid)
        if self.capacity is not None and self.capacity < n:
            scores = rows.sum(1) if protected is None else protect(rows.sum(1), protected)
            keep = (rank_of(forbid(scores, ~keep)) < self.capacity) & keep
        left = self.rows(n)
        # Without a capacity the rows that stay move to the front of as many rows.
        return dispose(tokens, keep, left, self.mode, self.positions), state, {"kept": keep.sum(-1)}


@contract
class _MustDrop:
    share: float = operand("scalar", 0.001)
    individual: float = operand("scalar", 0.001)
    layers: tuple | None = None
    capacity: tuple | None = None
    mode: str = "keep"
    positions: str = "fresh"

    def check(self):
        check_budget(1, self.mode, self.positions)
        ok = self.capacity is None or (len(self.capacity) >= 1 and all(c >= 1 for c in self.capacity))
        expect("capacity", self.capacity, "rows left by each cut, at least 1", ok)

    def sites(self, layers):
        given = None if self.layers is None else tuple(i + 1 for i in self.layers)
        return stage_sites(given, (3, 7, 11, 15), 32, layers)

    def schedule(self, layers):
        sites = self.sites(layers)
        capacity = (None,) * len(sites) if self.capacity is None else self.capacity
        expect("capacity", capacity, f"one per cut, {len(sites)}", len(capacity) == len(sites))
        return tuple((site, _Drop(self.share, self.individual, c, self.mode, self.positions))
                     for site, c in zip(sites, capacity, strict=True))  # fmt: skip


@register("tokens")
def mustdrop(share: float = 0.001, individual: float = 0.001, layers: tuple[int, ...] | None = None,
             capacity: tuple[int, ...] | None = None, mode: str = "keep", positions: str = "fresh"):
    """Drop image tokens by two thresholds in stages inside the language model (site "llm").

    Args:
      share, individual: thresholds of the sum (as a share) and of the largest entry; both must be missed to leave.
        Published: 0.001, 0.001 for about 192 tokens of 576; 0.0012, 0.001 for 128; 0.011, 0.01 for 64.
      layers: 0-based layers after which tokens leave; None: the published 2, 6, 10 and 14 of 32, scaled to the depth.
      capacity: rows that each cut leaves at most (largest sums and protected tokens first), which shortens the arrays;
        None: as many as needed, so that rows are only marked invalid.
      mode: "keep" or "mask".  positions: rotary positions "fresh" (as published) or "original".
    """
    return _MustDrop(share, individual, layers, capacity, mode, positions)


def mustdrop_trim(layer: cache.Slots, final: Meta, image: Array, *, which: Array | None = None,
                  width: int | None = None) -> cache.Slots:
    """Cached rows without the image tokens that did not survive to the end of the prompt.

    Args:
      layer: Slots, leaves stacked [L, ...].  final: Meta [B, M] of the image rows that the last layer saw.
      image: int32 [B, N], the places in time (``meta.pos``) of all image tokens.
      which: bool [L], the layers to trim (published: from the first stage's layer on); None: all.
      width: slots of the result, with room for the rows that stay and those to come; None: as many as before.
    Returns Slots with the rows that stay in front, in their order, the others emptied.
    """  # fmt: skip
    pos, valid = layer.meta.pos, layer.meta.valid
    big = jnp.iinfo(jnp.int32).max

    def among(table):  # bool [L, B, 1|G, W]: whether a row's place in time is in table [B, K]
        table = jnp.sort(table, axis=-1)

        def one(p, t):
            at = jnp.minimum(jnp.searchsorted(t, p), t.shape[0] - 1)
            return (t[at] == p) & (p < big)

        return jax.vmap(one, in_axes=(1, 0), out_axes=1)(pos, table)

    b = pos.shape[1]
    last = jnp.broadcast_to(jnp.where(final.valid, final.pos, big), (b, final.n))
    stay = ~among(jnp.broadcast_to(image, (b, image.shape[-1]))) | among(last)
    if which is not None:
        stay = stay | ~jnp.asarray(which)[:, None, None, None]
    stay = stay & valid
    width = layer.width if width is None else width
    index, live = compact(stay.reshape(-1, stay.shape[-1]), width)
    shape = (*stay.shape[:-1], width)
    out = cache.take(layer, index.reshape(shape), live.reshape(shape))
    stats = dict(out.stats)
    if "rank" in stats:
        stats["rank"] = cache.rank_in_time(stats["rank"], out.meta.valid)
    return out.replace(used=stay.sum(-1).max((1, 2)).astype(jnp.int32), stats=stats)
