"""VTC-CLS: [CLS] attention of several layers of the vision tower together ("[CLS] Token Tells Everything Needed for
Training-free Efficient MLLMs").

    s_j = sum_{l = start}^{L-2} mean_h A_l[h, CLS, j],   kept = the K largest, in raster order

With ``start = L - 2`` it is FasterVLM. The last layer never counts. Bound to the tower's output ("vision"), rows are cut
before the projector, which then has less to do and gives the same rows.
"""

from __future__ import annotations

import dataclasses
from functools import reduce

import jax.numpy as jnp

from jaxattn.core.reduce import check_budget, choose, count_of, dispose, evidence_rows, rows_left, valid_rows
from jaxattn.core.types import Array, Need, contract, expect, operand
from jaxattn.registry import register

COMBINE = {"sum": jnp.add, "min": jnp.minimum, "max": jnp.maximum}


def vtc_cls_scores(attention_cls: Array, start: int = 0, combine: str = "sum") -> Array:
    """Scores [..., N] from the CLS rows of all L layers, [L, ..., heads, 1 + N], CLS column first.

    Layers ``start`` (counted from the end if negative) to L - 2 count, the last one does not."""
    depth = attention_cls.shape[0]
    expect("combine", repr(combine), f"one of {sorted(COMBINE)}", combine in COMBINE)
    expect("start", start, f"a layer of {depth} before the last", -depth <= start < depth - 1 and start != -1)
    rows = jnp.mean(attention_cls[start:-1, ..., 1:], axis=-2)
    return {"sum": jnp.sum, "min": jnp.min, "max": jnp.max}[combine](rows, axis=0)


@contract
class _VTCCls:
    keep: int = operand("budget")
    start: int | None = None
    depth: int | None = None
    combine: str = "sum"
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)
        expect("combine", repr(self.combine), f"one of {sorted(COMBINE)}", self.combine in COMBINE)

    def resolve(self, layers: int):
        """The record for a tower of ``layers`` layers; the first layer that counts is the 17th of 24 by default."""
        start = round(layers * 16 / 24) if self.start is None else self.start % layers
        start = min(start, layers - 2) if self.start is None else start
        expect("start", self.start, f"a layer of {layers} before the last", 0 <= start <= layers - 2)
        return dataclasses.replace(self, start=start, depth=layers)

    def layers(self) -> range:
        expect("depth", self.depth, "resolve(layers) called before needs()", self.depth is not None)
        return range(self.start, self.depth - 1)

    def needs(self):
        return tuple(Need(f"cls.{i}", what="received", at=f"vision.{i}", rows="cls") for i in self.layers())

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        scores = reduce(COMBINE[self.combine], [evidence_rows(evidence, f"cls.{i}", tokens) for i in self.layers()])
        keep = choose(scores, count_of(params, tokens.x.shape[1]), valid_rows(tokens))
        return dispose(tokens, keep, self.rows(tokens.x.shape[1]), self.mode, self.positions), state, {"scores": scores}


@register("tokens")
def vtc_cls(keep: int, start: int | None = None, combine: str = "sum", mode: str = "keep", positions: str = "original"):
    """Keep the ``keep`` image tokens of largest [CLS] attention, summed over layers ``start`` to the last but one.

    Args:
      keep: image tokens per image.  start: 0-based layer of the tower (from the end if negative); None: 2/3 of the
        depth, the code's 16 of 24.  combine: "sum", "min" or "max" over the layers.
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    """
    return _VTCCls(keep, start, None, combine, mode, positions)
