"""HoloV: a budget for every part of the image ("Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual
Holistic Context Retention").

The N tokens fall into P runs of the raster (crops). With G the cosines inside a crop of n tokens, its diagonal 0, and s
the [CLS] attention:

    mu_i = sum_j G_ij / (n - 1),   v_i = sum_j (G_ij - mu_i)^2 / (n - 1)        the zeroed diagonal counts in v
    a_i = 1000 s_i,   t_i = a_i + alpha (mean a / mean v) v_i                   a crop's weight: its mean t

Crops share the budget by weight (floors, then one more for the heaviest); inside a crop attention alone chooses. A crop
asked for more than it has gives what it has, so fewer than K tokens may come out.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxattn.core.reduce import check_budget, count_of, dispose, evidence_rows, rows_left, valid_rows
from jaxattn.core.select import forbid, gather_tokens, per_group, rank_of
from jaxattn.core.slots import compact
from jaxattn.core.types import Array, Need, contract, expect, operand
from jaxattn.registry import register


def holov_crops(n: int, keep: int) -> int:
    """Number of crops of the Qwen version, for ``n`` tokens of which ``keep`` stay: more when little stays."""
    return min(n, max(1, int(1024 / 576 * n / keep)))


def crop_of(n: int, crops: int) -> np.ndarray:
    """int32 [n]: the crop of each token; the first n mod crops crops have one token more."""
    sizes = np.full(crops, n // crops) + (np.arange(crops) < n % crops)
    return np.repeat(np.arange(crops), sizes).astype(np.int32)


def holov_quotas(x: Array, scores: Array, keep, crops: int, *, alpha=0.09, valid: Array | None = None) -> Array:
    """int32 [B, crops]: how many tokens each crop may keep; they sum to ``keep``.

    Args:
      x: [B, N, D] projected tokens in raster order.  scores: [B, N], [CLS] attention.  keep: int or int32 scalar.
      crops: P, at most N.  alpha: weight of the context term.  valid: bool [B, N].
    Similarities are taken inside a crop only, N^2 / P numbers per image.
    """
    b, n, d = x.shape
    expect("crops", crops, f"between 1 and the {n} tokens", 1 <= crops <= n)
    expect("scores", f"shape {scores.shape}", f"{(b, n)}", scores.shape == (b, n))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    valid = jnp.ones((b, n), bool) if valid is None else valid
    sizes = np.bincount(crop_of(n, crops), minlength=crops)
    member = np.arange(sizes.max()) < sizes[:, None]
    index = np.where(member, np.cumsum(sizes)[:, None] - sizes[:, None] + np.arange(sizes.max()), 0)

    live = valid[:, index] & member  # [B, P, n]
    s = jnp.where(live, scores[:, index].astype(wide), 0)
    unit = x[:, index].astype(wide)
    unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), 1e-6)
    unit = jnp.where(live[..., None], unit, 0)
    pairs = jnp.matmul(unit, unit.swapaxes(-1, -2), precision="highest") * (1 - np.eye(sizes.max()))
    count = live.sum(-1, keepdims=True)
    others = jnp.maximum(count - 1, 1)
    mu = pairs.sum(-1) / others
    spread = jnp.where(live[..., None, :], jnp.square(pairs - mu[..., None]), 0).sum(-1) / others
    spread = jnp.where(live, spread, 0)

    def mean(y):
        return y.sum(-1, keepdims=True) / jnp.maximum(count, 1)

    a = 1000 * s
    scale = mean(jnp.abs(a)) / (mean(jnp.abs(spread)) + 1e-6)
    weight = jnp.where(count > 1, mean(a + alpha * scale * spread), mean(s))[..., 0]
    weight = weight / (weight.sum(-1, keepdims=True) + 1e-6)
    keep = jnp.asarray(keep, jnp.int32)
    quota = jnp.floor(weight * keep).astype(jnp.int32)
    left = keep - quota.sum(-1, keepdims=True)
    return quota + left // crops + (rank_of(weight) < left % crops)


def holov_select(x: Array, scores: Array, keep: int, crops: int = 16, *, alpha: float = 0.09) -> tuple[Array, Array]:
    """(index int32 [B, keep], valid bool [B, keep]) in the order of the published code: crop by crop, inside a crop by
    falling attention (a crop that stays whole: in raster order); invalid where crops gave less.

    Arguments as in :func:`holov_quotas`."""
    n = x.shape[1]
    expect("keep", keep, f"between 1 and the {n} tokens", 1 <= keep <= n)
    crop, quota = crop_of(n, crops), holov_quotas(x, scores, keep, crops, alpha=alpha)
    chosen = per_group(scores, crop, quota)
    whole = (quota >= np.bincount(crop, minlength=crops))[:, crop]
    order = jnp.argsort(crop * n + jnp.where(whole, jnp.arange(n), rank_of(scores)), axis=-1)
    place, valid = compact(gather_tokens(chosen, order), keep)
    return jnp.where(valid, gather_tokens(order, place), 0), valid


def holov_tokens(x: Array, scores: Array, keep: int, crops: int = 16, *, alpha: float = 0.09) -> Array:
    """[B, keep, D]: the rows of :func:`holov_select`, zero where a crop had fewer than its share."""
    index, valid = holov_select(x, scores, keep, crops, alpha=alpha)
    return jnp.where(valid[..., None], gather_tokens(x, index), 0)


@contract
class _HoloV:
    keep: int = operand("budget")
    crops: int | None = 16
    alpha: float = operand("scalar", 0.09)
    layer: int = -2
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)
        expect("crops", self.crops, "at least 1, or None", self.crops is None or self.crops >= 1)

    def needs(self):
        return (Need("cls", what="received", at=f"vision.{self.layer}", rows="cls"),)

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        n = tokens.x.shape[1]
        scores, valid, keep = evidence_rows(evidence, "cls", tokens), valid_rows(tokens), count_of(params, n)
        crops = holov_crops(n, self.keep) if self.crops is None else min(self.crops, n)
        quota = holov_quotas(tokens.x, scores, keep, crops, alpha=params["alpha"], valid=valid)
        chosen = per_group(forbid(scores, ~valid), crop_of(n, crops), quota) & valid
        return dispose(tokens, chosen, self.rows(n), self.mode, self.positions), state, {"scores": scores, "quota": quota}


@register("tokens")
def holov(keep: int, crops: int | None = 16, alpha: float = 0.09, layer: int = -2, mode: str = "keep",
          positions: str = "original"):
    """Keep ``keep`` projected image tokens (fewer where a crop overflows), a share for each part of the image. For the
    site "project".

    Args:
      keep: image tokens per image.  crops: runs of the raster, 16 as for LLaVA; None: by the ratio N / keep, as for Qwen
        (then the compiled program belongs to the bucket's capacity).
      alpha: weight of the context term.  layer: of the vision tower whose [CLS] attention scores.
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    """  # fmt: skip
    return _HoloV(keep, crops, alpha, layer, mode, positions)
