"""VisionDrop: one select-and-merge step, scored by image rows alone, in the tower and in stages of the language model
("Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment").

The step, of rows x with scores s and metric m: the K largest s stay as they are, in order (dominant). Of the R others,
every (R // C)-th is a target (C of them); each remaining row joins the target of largest cos(m, m_target), and

    contextual_c = x_target + mean of the rows that joined it        a sum of both, not a mean over all

``visiondrop``, on the tower's output: s is the [CLS] row, m the heads' mean key of the same layer; the [CLS] row itself
is one of the dominant rows. ``visiondrop_stages``, in the language model: s is the attention that image rows give to
image rows in the layer that comes next, m its heads' mean rotated key; text has no say.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.reduce import check_budget, choose, evidence_rows, reduce_merge, valid_rows
from jaxattn.core.select import gather_tokens, keep_top
from jaxattn.core.slots import merge_tokens, nearest, strided
from jaxattn.core.types import Array, Need, contract, expect
from jaxattn.registry import register
from jaxattn.tokens.staged import average_rows, stage_sites


def dominant_contextual(x: Array, scores: Array, metric: Array, dominant: int, contextual: int, *,
                        valid: Array | None = None):
    """One select-and-merge step.

    Args:
      x: [B, N, C].  scores: [B, N].  metric: [B, N, d], compared by cosine.
      dominant: rows kept as they are.  contextual: merged rows made of the others.  valid: bool [B, N].
    Returns: (rows [B, dominant + contextual, C], dominant in order, then contextual; slot int32 [B, N], the row that
      each went into or -1; index int32 [B, dominant + contextual], the row that each stands for; valid).
    """  # fmt: skip
    b, n = scores.shape
    ok = dominant >= 0 and contextual >= 0 and 1 <= dominant + contextual <= n
    expect("dominant, contextual", (dominant, contextual), f"counts that sum to between 1 and the {n} rows", ok)
    valid = jnp.ones((b, n), bool) if valid is None else valid
    keep = choose(scores, dominant, valid) if dominant else jnp.zeros((b, n), bool)
    slot = jnp.where(keep, jnp.cumsum(keep, -1) - 1, -1)
    rows, index, live = [], [], []
    if dominant:
        kept, ok = keep_top(jnp.where(keep, 0.0, -jnp.inf), dominant)
        rows, index, live = [gather_tokens(x, kept)], [kept], [ok]
    if contextual:
        rest = valid & ~keep
        targets, ok = strided(rest, contextual)
        joined = nearest(metric, targets, rest, valid=ok)
        merged = merge_tokens(x, joined, contextual, mode="target_plus_mean", targets=targets)
        slot = jnp.where(joined >= 0, dominant + joined, slot)
        rows, index, live = [*rows, jnp.where(ok[..., None], merged, 0)], [*index, targets], [*live, ok]
    return (jnp.concatenate(rows, 1), slot.astype(jnp.int32), jnp.concatenate(index, 1).astype(jnp.int32),
            jnp.concatenate(live, 1))  # fmt: skip


def visiondrop_encode(hidden: Array, attention_cls: Array, keys: Array, dominant: int, contextual: int) -> Array:
    """The encoder's step on plain arrays: [B, dominant + contextual, C], [CLS] first.

    hidden: [B, 1 + N, C] output of the layer.  attention_cls: [B, H, 1 + N], its [CLS] row.  keys: [B, 1 + N, H, D], its
    key projections. ``dominant`` counts the [CLS] row.
    """
    expect("dominant", dominant, "at least 2: the [CLS] row and a patch", dominant >= 2)
    scores, metric = attention_cls[..., 1:].sum(1), keys[:, 1:].mean(2)
    rows, *_ = dominant_contextual(hidden[:, 1:], scores, metric, dominant - 1, contextual)
    return jnp.concatenate([hidden[:, :1], rows], 1)


def _reduced(tokens, scores, metric, dominant, contextual, positions):
    valid = valid_rows(tokens)
    x, slot, index, live = dominant_contextual(tokens.x, scores, metric, dominant, contextual, valid=valid)
    return reduce_merge(tokens, x, slot, index, live, positions=positions)


def _mean_key(evidence, tokens):
    b, n = tokens.x.shape[:2]
    expect("evidence", sorted(evidence) or "none", "the entry 'keys'", "keys" in evidence)
    keys = evidence["keys"]
    ok = keys.ndim == 4 and keys.shape[:2] == (b, n)
    expect("evidence['keys']", f"shape {tuple(keys.shape)}", f"[{b}, {n}, heads, D]", ok)
    return keys.astype(jnp.promote_types(keys.dtype, jnp.float32)).mean(2)


@contract
class _VisionDrop:
    dominant: int
    contextual: int
    layer: int = -2
    cls: bool = True
    positions: str = "fresh"

    def check(self):
        check_budget(1, "keep", self.positions)
        expect("dominant", self.dominant, "at least 1 patch", self.dominant - self.cls >= 1)
        expect("contextual", self.contextual, "0 or more", self.contextual >= 0)

    def needs(self):
        at = f"vision.{self.layer}"
        return (Need("cls", what="received", at=at, rows="cls", over_heads="sum"), Need("keys", what="keys", at=at))

    def rows(self, n):
        left = self.dominant + self.contextual
        expect("dominant + contextual", left, f"at most the {n} rows", left <= n)
        return left

    def apply(self, params, state, tokens, evidence, ctx):
        n, scores = tokens.x.shape[1], evidence_rows(evidence, "cls", tokens)
        self.rows(n)
        metric = _mean_key(evidence, tokens)
        if not self.cls:
            out = _reduced(tokens, scores, metric, self.dominant, self.contextual, self.positions)
            return out, state, {"scores": scores}
        expect("evidence", "no rows", "the entry 'special', the tower's [CLS] row", evidence.get("special") is not None)
        first = evidence["special"][:, :1]
        valid = valid_rows(tokens)
        x, slot, index, live = dominant_contextual(tokens.x, scores, metric, self.dominant - 1, self.contextual, valid=valid)
        # The class row takes the place of the last row that is not dominant, which is never a target.
        own = jnp.zeros((len(x), n), bool).at[jnp.arange(len(x))[:, None], index].set(True)
        place = (n - 1 - jnp.argmax((~own)[:, ::-1], axis=-1))[:, None].astype(jnp.int32)
        x = jnp.concatenate([first.astype(x.dtype), x], 1)
        slot = jnp.where(slot >= 0, slot + 1, -1)
        index, live = jnp.concatenate([place, index], 1), jnp.concatenate([jnp.ones_like(live[:, :1]), live], 1)
        marked = tokens.replace(meta=tokens.meta.replace(valid=_with(valid, place)))
        out = reduce_merge(marked, x, slot, index, live, positions=self.positions)
        return out, state, {"scores": scores}


def _with(valid, place):
    return valid.at[jnp.arange(len(valid))[:, None], place].set(True)


@register("tokens")
def visiondrop(dominant: int, contextual: int, layer: int = -2, cls: bool = True, positions: str = "fresh"):
    """``dominant`` rows by [CLS] attention and ``contextual`` merges of the others. For the site "vision".

    Args:
      dominant: rows kept as they are, the [CLS] row among them if ``cls``.  contextual: merged rows.
      layer: of the tower, for scores and keys.  cls: hand the tower's [CLS] row on as the first image row.
      positions: "fresh", the order of the rows that leave is their order in time; "original", contextual rows stand where
        their targets stood, and the [CLS] row where a row that went stood.
    """
    return _VisionDrop(dominant, contextual, layer, cls, positions)


@contract
class _VisionDropCut:
    dominant: int
    contextual: int
    positions: str = "fresh"

    def needs(self):
        return (
            Need("image", what="received", at="next", rows="vision"),
            Need("keys", what="rotated_keys", at="next"),
        )

    def rows(self, n):
        left = self.dominant + self.contextual
        expect("keep", left, f"at most the {n} rows at the cut", left <= n)
        return left

    def apply(self, params, state, tokens, evidence, ctx):
        scores = evidence_rows(evidence, "image", tokens)
        out = _reduced(tokens, scores, _mean_key(evidence, tokens), self.dominant, self.contextual, self.positions)
        return out, state, {"scores": scores}


@contract
class _VisionDropStages:
    keep: tuple = ((30, 5), (22, 4), (16, 3))
    layers: tuple | None = None
    positions: str = "fresh"

    def check(self):
        check_budget(1, "keep", self.positions)
        ok = len(self.keep) >= 1 and all(isinstance(k, tuple) and len(k) == 2 and k[0] >= 1 and k[1] >= 0 for k in self.keep)
        expect("keep", self.keep, "pairs (dominant, contextual), one per cut", ok)
        expect("layers", self.layers, f"{len(self.keep)} numbers", self.layers is None or len(self.layers) == len(self.keep))

    def sites(self, layers):
        default = tuple(32 * (i + 1) // (len(self.keep) + 1) for i in range(len(self.keep)))
        return stage_sites(self.layers, default, 32, layers)

    def schedule(self, layers):
        cuts = zip(self.sites(layers), self.keep, strict=True)
        return tuple((site, _VisionDropCut(*keep, self.positions)) for site, keep in cuts)

    def average(self, first: int, layers: int) -> float:
        """Mean number of image rows over the layers, of ``first`` that enter the language model."""
        cuts = zip(self.sites(layers), self.keep, strict=True)
        return average_rows(first, tuple((site, sum(keep)) for site, keep in cuts), layers)


@register("tokens")
def visiondrop_stages(keep: tuple = ((30, 5), (22, 4), (16, 3)), layers: tuple[int, ...] | None = None,
                      positions: str = "fresh"):
    """Select and merge image rows inside the language model, stage by stage, scored by image rows (site "llm").

    Args:
      keep: (dominant, contextual) rows that each cut leaves. The default, behind ``visiondrop(42, 6)``, is the published
        setting of 32 tokens on average (``.average(48, 32)``).
      layers: numbers of layers done when the cuts happen; None: evenly over the depth, 8, 16 and 24 of 32.
      positions: rotary positions "fresh" (as published) or "original".
    """  # fmt: skip
    return _VisionDropStages(keep, layers, positions)
