"""TransPrune: tokens that layers still move ("TransPrune: Token Transition Pruning for Efficient Large Vision-Language
Model").

For each sub-block (attention, feed-forward) with normalised input x and output y before the residual sum:

    T_j = |y_j| / |x_j| * softmax_j(1 - cos(x_j, y_j))        the softmax over the whole sequence

V sums T over both sub-blocks of the accumulation layers done so far; g is the attention that the prompt's rows give in
the layer that comes next. Rows are kept by V / sum V + g / sum g. The published code takes the softmax over the batch as
well; here over each sequence, so that rows of a batch do not meet.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.reduce import check_budget, choose, dispose, evidence_rows, follow_rows, valid_rows
from jaxattn.core.statistics import transition
from jaxattn.core.types import Array, Need, State, contract, expect
from jaxattn.registry import register
from jaxattn.tokens.staged import check_ratios, stage_count, stage_sites


def token_transition(attention_in: Array, attention_out: Array, mlp_in: Array, mlp_out: Array,
                     valid: Array | None = None) -> Array:
    """[B, S]: one layer's transition values, from the normalised inputs and raw outputs [B, S, C] of its sub-blocks."""
    return transition(attention_in, attention_out, valid) + transition(mlp_in, mlp_out, valid)


def transprune_scores(transitions: Array, attention: Array | None = None, *, valid: Array | None = None) -> Array:
    """[B, N]: each of the two scores of the image rows scaled to sum 1, and added. transitions: summed over layers;
    attention: received from the prompt, or None for transitions alone."""
    valid = True if valid is None else valid

    def share(x):
        x = jnp.where(valid, x, 0)
        return x / (x.sum(-1, keepdims=True) + 1e-8)

    return share(transitions) if attention is None else share(transitions) + share(attention)


@contract
class _TransPruneCut:
    layers: tuple  # 0-based accumulation layers since the cut before
    before: float
    ratio: float
    attention: bool = True
    mode: str = "keep"
    positions: str = "fresh"

    carries = "transprune"

    def needs(self):
        moved = tuple(Need(f"transition.{i}", what="transition", at=f"llm.{i}") for i in self.layers)
        return (*moved, Need("prompt", what="received", at="next", rows="text")) if self.attention else moved

    def rows(self, n):
        return n if self.mode == "mask" else max(1, stage_count(n, self.before, self.ratio, self.mode))

    def apply(self, params, state, tokens, evidence, ctx):
        n, valid = tokens.x.shape[1], valid_rows(tokens)
        total = sum(evidence_rows(evidence, f"transition.{i}", tokens) for i in self.layers)
        total = total if isinstance(state.shared, tuple) else total + state.shared
        given = evidence_rows(evidence, "prompt", tokens) if self.attention else None
        total = jnp.broadcast_to(total, valid.shape)
        scores = transprune_scores(total, given, valid=valid)
        keep = choose(scores, stage_count(n, self.before, self.ratio, self.mode), valid)
        state = State(shared=follow_rows(total, keep, self.rows(n), self.mode))
        return dispose(tokens, keep, self.rows(n), self.mode, self.positions), state, {"scores": scores}


@contract
class _TransPrune:
    layers: tuple | None = None
    ratios: tuple = (0.875, 0.625, 0.125)
    accumulate: tuple | None = None
    attention: bool = True
    mode: str = "keep"
    positions: str = "fresh"

    def check(self):
        check_budget(1, self.mode, self.positions)
        check_ratios(self.ratios, None if self.layers is None else len(self.layers))
        expect("layers", None, "numbers for ratios of another length than 3", self.layers is not None or len(self.ratios) == 3)

    def sites(self, layers):
        return stage_sites(self.layers, (7, 9, 12), 32, layers)

    def schedule(self, layers):
        sites = self.sites(layers)
        done = tuple(range(sites[0], sites[-1] + 1)) if self.accumulate is None else self.accumulate
        ok = all(1 <= i <= layers for i in done) and any(i <= sites[0] for i in done)
        expect("accumulate", done, f"1-based layers, one of them by the first cut at {sites[0]}", ok)
        cuts = zip((0, *sites), sites, (1.0, *self.ratios), self.ratios, strict=False)
        return tuple((site, _TransPruneCut(tuple(i - 1 for i in done if last < i <= site), before, ratio, self.attention,
                                           self.mode, self.positions)) for last, site, before, ratio in cuts)  # fmt: skip


@register("tokens")
def transprune(layers: tuple[int, ...] | None = None, ratios: tuple[float, ...] = (0.875, 0.625, 0.125),
               accumulate: tuple[int, ...] | None = None, attention: bool = True, mode: str = "keep",
               positions: str = "fresh"):
    """Drop image tokens in stages inside the language model by transition and attention (site "llm").

    Args:
      layers: numbers of layers done when the cuts happen; None: the published 7, 9 and 12 of 32, scaled to the depth.
      ratios: what each cut leaves, as fractions of the image tokens that entered.
      accumulate: layers (1-based) whose transitions are summed; None: all from the first cut's to the last cut's.
      attention: False scores by transitions alone, without any attention.
      mode: "keep" (gather) or "mask".  positions: rotary positions "fresh" (as published) or "original".
    """
    return _TransPrune(layers, ratios, accumulate, attention, mode, positions)
