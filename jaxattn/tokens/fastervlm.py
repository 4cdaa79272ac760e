"""FasterVLM: keep the image tokens the vision tower's [CLS] attends to ("[CLS] Attention is All You Need for
Training-Free Visual Token Pruning: Make VLM Inference Faster").

    s_j = mean_h A_{L-2}[h, CLS, j],   kept = the K largest, in raster order

The CLS column is left out and nothing is renormalised. With several crops each keeps K / crops of its own tokens, and
the newline tokens between lines of patches stay, whatever the budget.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.reduce import (
    check_budget,
    choose,
    count_of,
    dispose,
    evidence_rows,
    label,
    newline_rows,
    rows_left,
    valid_rows,
)
from jaxattn.core.types import Array, Need, contract, expect, operand
from jaxattn.registry import register


def fastervlm_scores(attention_cls: Array) -> Array:
    """Scores [..., N] from the CLS row of one layer's probabilities, [..., heads, 1 + N], CLS column first."""
    expect("attention_cls", f"shape {attention_cls.shape}", "[..., heads, 1 + N]", attention_cls.ndim >= 2)
    return jnp.mean(attention_cls[..., 1:], axis=-2)


@contract
class _FasterVLM:
    keep: int = operand("budget")
    layer: int = -2
    crops: int | None = None
    newlines: int = 0
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)
        expect("crops", self.crops, f"None, or between 1 and keep = {self.keep}", 1 <= (self.crops or 1) <= self.keep)
        expect("newlines", self.newlines, "0 or more", self.newlines >= 0)

    def needs(self):
        return (Need("cls", what="received", at=f"vision.{self.layer}", rows="cls", over_heads="mean"),)

    def rows(self, n):
        return rows_left(self.keep, n, self.mode, self.newlines)

    def apply(self, params, state, tokens, evidence, ctx):
        n = tokens.x.shape[1]
        scores = evidence_rows(evidence, "cls", tokens)
        keep = choose(
            scores, count_of(params, n - self.newlines), valid_rows(tokens), crops=self.crops or 1,
            always=newline_rows(tokens) if self.newlines else None,
            crop=label(tokens, "crop") if (self.crops or 1) > 1 else None,
        )  # fmt: skip
        return dispose(tokens, keep, self.rows(n), self.mode, self.positions), state, {"scores": scores}


@register("tokens")
def fastervlm(keep: int, layer: int = -2, crops: int | None = None, newlines: int = 0, mode: str = "keep",
              positions: str = "original"):
    """Keep the ``keep`` image tokens of largest [CLS] attention.

    Args:
      keep: image tokens per image, all crops together.  layer: of the vision tower, from the end if negative.
      crops: number of crops, None: as many as the model made of the pictures. Above 1, rows carry the label "crop" in
        [0, crops) and each crop keeps ``keep // crops``.
      newlines: rows labelled ``kind == KIND_NEWLINE``; they are kept besides ``keep``.
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    """  # fmt: skip
    return _FasterVLM(keep, layer, crops, newlines, mode, positions)
