"""AdaptInfer: text that text attends to says which image tokens matter ("AdaptInfer: Adaptive Token Pruning for
Vision-Language Model Inference with Dynamical Text Guidance").

At a layer with probabilities A [H, S, S], T the rows behind the image and v its columns:

    W = A[:, T, T],   W2 = W + W^T - diag(W),   omega[h, j] = sum_i W2[h, i, j]
    score_v = sum_h sum_{j in T} omega[h, j] A[h, j, v]

The prior omega is taken per head, from the same layer, anew at every cut. Where to cut is found offline: the layers at
which the attention of text to image changes most (``adaptinfer_layers``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.artifact import load
from jaxattn.core.labels import KIND_TEXT, KIND_VISION, kind
from jaxattn.core.reduce import check_budget, choose, dispose, evidence_rows, valid_rows
from jaxattn.core.types import Array, Meta, Need, contract, expect
from jaxattn.registry import register
from jaxattn.tokens.staged import average_rows, stage_sites

# Image tokens left by the three cuts, by the mean over LLaVA-1.5-7B's 32 layers as the authors count it: one layer reads
# all 576. With cuts after 0-based layers 1, 10 and 20 two do, and the mean is 18 higher.
PUBLISHED = {128: (290, 72, 18), 64: (133, 27, 3), 48: (80, 24, 2), 32: (40, 12, 0)}


def text_prior(attention: Array) -> Array:
    """omega [..., H, T]: what text rows give each other, from their probabilities [..., H, T, T]; the diagonal once."""
    expect("attention", f"shape {attention.shape}", "[..., heads, T, T]",
           attention.ndim >= 3 and attention.shape[-1] == attention.shape[-2])  # fmt: skip
    diagonal = jnp.diagonal(attention, axis1=-2, axis2=-1)
    return attention.sum(-2) + attention.sum(-1) - diagonal


def adaptinfer_scores(attention: Array, text: Array, image: Array) -> Array:
    """Scores [B, N] of image tokens from probabilities [B, H, S, S]; text int32 [T], image int32 [N]: their columns."""
    rows = attention[:, :, text]
    return jnp.einsum("bhj,bhjv->bv", text_prior(rows[..., text]), rows[..., image])


@contract
class _Prior:
    """Row weights omega [B, S, H] of the text behind the image, from the same layer's text rows."""

    at: str = "last"
    group: str = "text"

    @property
    def given(self):
        return Need("adaptinfer.text", what="rows", at=self.at, rows="text", over_heads=None)

    def __call__(self, meta: Meta, evidence: dict) -> Array:
        rows = evidence["adaptinfer.text"]  # [B, H, T, S]
        what, (t, s) = jnp.broadcast_to(kind(meta), meta.pos.shape), rows.shape[2:]
        column = jnp.argsort(what != KIND_TEXT, axis=-1, stable=True)[:, :t]  # of the text group, padding included
        last = jnp.max(jnp.where((what == KIND_VISION) & meta.valid, meta.pos, -1), -1, keepdims=True)
        behind = meta.valid & (what == KIND_TEXT) & (meta.pos > last)

        def one(rows, column, behind):
            live = behind[column]
            w = jnp.where(live[:, None] & live, rows[:, :, column], 0.0)
            return jnp.zeros((s, rows.shape[0]), w.dtype).at[column].set(text_prior(w).T)

        return jax.vmap(one)(rows, column, behind)


@contract
class _Cut:
    keep: int
    mode: str = "keep"
    positions: str = "fresh"

    def needs(self):
        return (Need("adaptinfer", what="received", at="last", rows=_Prior(), over_heads="sum"),)

    def rows(self, n):
        return n if self.mode == "mask" else min(n, max(1, self.keep))

    def apply(self, params, state, tokens, evidence, ctx):
        scores = evidence_rows(evidence, "adaptinfer", tokens)
        keep = choose(scores, min(self.keep, tokens.x.shape[1]), valid_rows(tokens))
        left = self.rows(tokens.x.shape[1])
        return dispose(tokens, keep, left, self.mode, self.positions), state, {"scores": scores}


@contract
class _AdaptInfer:
    keep: tuple = PUBLISHED[64]
    layers: tuple | None = None
    mode: str = "keep"
    positions: str = "fresh"

    def check(self):
        check_budget(1, self.mode, self.positions)
        ok = len(self.keep) >= 1 and all(isinstance(k, int) and k >= 0 for k in self.keep)
        ok = ok and all(a >= b for a, b in zip(self.keep, self.keep[1:], strict=False))
        expect("keep", self.keep, "rows that each cut leaves, not rising", ok)
        expect("layers", self.layers, f"one layer per cut, {len(self.keep)}",
               len(self.keep) == (3 if self.layers is None else len(self.layers)))  # fmt: skip

    def sites(self, layers):
        given = None if self.layers is None else tuple(i + 1 for i in self.layers)
        return stage_sites(given, (2, 11, 21), 32, layers)

    def schedule(self, layers):
        cuts = zip(self.sites(layers), self.keep, strict=True)
        return tuple((site, _Cut(k, self.mode, self.positions)) for site, k in cuts)

    def average(self, first: int, layers: int) -> float:
        """Mean number of image rows over the layers, of ``first`` that enter the language model."""
        return average_rows(first, tuple(zip(self.sites(layers), self.keep, strict=True)), layers)


@register("tokens")
def adaptinfer(keep: tuple[int, ...] = PUBLISHED[64], layers: tuple[int, ...] | None = None, mode: str = "keep",
               positions: str = "fresh", artifact: str | None = None):
    """Drop image tokens in stages inside the language model, guided by the text's own attention (site "llm").

    Args:
      keep: image tokens that each cut leaves; the default is the published setting of 64 on average, others are in
        ``adaptinfer_counts``. A cut to 0 leaves one invalid row in mode "keep".
      layers: 0-based layers after which tokens leave; None: the published 1, 10 and 20 of 32, scaled to the depth.
      mode: "keep" (gather) or "mask".  positions: rotary positions "fresh" (as published) or "original".
      artifact: a file of ``adaptinfer_inflections``, in place of layers.
    """  # fmt: skip
    if artifact is not None:
        layers = tuple(map(int, load(artifact, "adaptinfer_inflections")[0]["layers"]))
    return _AdaptInfer(tuple(keep), layers, mode, positions)


def adaptinfer_counts(average: int, tokens: int = 576) -> tuple[int, ...]:
    """The published counts for a mean of 128, 64, 48 or 32 tokens of 576, scaled to another number of tokens."""
    expect("average", average, f"one of {sorted(PUBLISHED)}", average in PUBLISHED)
    return tuple(round(k * tokens / 576) for k in PUBLISHED[average])


# ------------------------------------------------------------------------------------------------------ where to cut
def attention_shift(attention: np.ndarray) -> np.ndarray:
    """[L - 1] Jensen-Shannon divergences (nats) between neighbouring layers' mean text-to-image attention [L, N]."""
    p = np.asarray(attention, np.float64)
    expect("attention", f"shape {p.shape}", "[layers, image tokens], at least two layers", p.ndim == 2 and p.shape[0] > 1)
    p = p / p.sum(-1, keepdims=True)
    a, b = p[1:], p[:-1]
    middle = 0.5 * (a + b)

    def divergence(x):
        return np.where(x > 0, x * np.log(np.where(x > 0, x, 1) / np.where(middle > 0, middle, 1)), 0).sum(-1)

    return 0.5 * divergence(a) + 0.5 * divergence(b)


def adaptinfer_layers(attention: np.ndarray, cuts: int = 3) -> tuple[int, ...]:
    """0-based layers after which to cut: the ``cuts`` largest local maxima of the shift (then the largest others), none
    behind the last layer. attention: [L, N], mean over calibration samples of what text rows give image tokens."""
    shift = attention_shift(attention)
    expect("cuts", cuts, f"between 1 and {len(shift)}", 1 <= cuts <= len(shift))
    # shift[i] is the step from layer i to layer i + 1; the cut lies behind layer i, before attention has moved on.
    padded = np.concatenate([[-np.inf], shift, [-np.inf]])
    peak = (shift >= padded[:-2]) & (shift > padded[2:])
    order = np.lexsort((np.arange(len(shift)), -shift, ~peak))
    return tuple(sorted(int(i) for i in order[:cuts]))


@register("conversion")
def adaptinfer_inflections(model, batches, key=None, *, cuts: int | None = None):
    """Find the layers of a trained model at which the attention of text to image changes most (AdaptInfer).

    Args:
      model: a ``core.types.Trained``.  batches: of its data.  key: unused.  cuts: how many layers; None: three, or as many as
        there are steps between layers.
    Returns: (model, {layers [cuts], 0-based, after which to cut; shift [L - 1]; attention [L, N], its mean over samples}).
    """
    need = Need("text_to_image", what="received", at="llm.*", rows="text")
    total, count = 0.0, 0
    for batch in batches:
        found = np.asarray(model.run(batch, needs=(need,)).evidence["text_to_image"], np.float64)[..., : model.visual]
        total, count = total + found.sum(1), count + found.shape[1]
    expect("batches", "none", "at least one", count > 0)
    mean = total / count
    layers = adaptinfer_layers(mean, min(3, len(mean) - 1) if cuts is None else cuts)
    return model, {"layers": np.asarray(layers, np.int32), "shift": attention_shift(mean).astype(np.float32),
                   "attention": mean.astype(np.float32)}  # fmt: skip
