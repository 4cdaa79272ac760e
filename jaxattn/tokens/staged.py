"""Cuts inside the language model by the attention image tokens receive: the two hosts that others refine.

FastV ("An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
Models", arXiv 2403.06764): one cut, scored by the last row of the layer just done. PyramidDrop ("PyramidDrop:
Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction"): several cuts, each scored with
the queries and keys of the layer that comes next, counts as fractions of the tokens that entered.
"""

from __future__ import annotations

import math

from jaxattn.core.reduce import check_budget, choose, count_of, dispose, evidence_rows, label, rows_left, valid_rows
from jaxattn.core.types import Need, contract, expect, operand
from jaxattn.registry import register


def stage_sites(layers: tuple[int, ...] | None, default: tuple[int, ...], of: int, depth: int) -> tuple[int, ...]:
    """Numbers of layers done when the cuts happen in a stack of ``depth``: as given, or ``default`` of ``of`` scaled."""
    sites: list[int] = []
    for layer in default if layers is None else layers:
        scaled = layer if layers is not None else max(round(layer * depth / of), sites[-1] + 1 if sites else 1)
        sites.append(scaled)
    ok = all(a < b for a, b in zip((0, *sites), (*sites, depth), strict=True))
    expect("layers", tuple(sites), f"ascending numbers of layers done, between 1 and {depth - 1}", ok)
    return tuple(sites)


def stage_count(n: int, before: float, ratio: float, mode: str) -> int:
    """int(N ratio) of the N tokens that entered, from the ``n`` rows at the cut, int(N before) of them in mode "keep"."""
    entered = n if mode == "mask" else math.ceil(n / before - 1e-3)
    return int(entered * ratio + 1e-3)


def check_ratios(ratios: tuple[float, ...], stages: int | None = None) -> None:
    ok = len(ratios) >= 1 and all(0 < b <= a for a, b in zip((1.0, *ratios), ratios, strict=False))
    expect("ratios", ratios, "fractions of the tokens that entered, in (0, 1], not rising", ok)
    expect("ratios", ratios, f"one per cut, {stages}", stages is None or len(ratios) == stages)


def average_rows(first: int, cuts: tuple[tuple[int, int], ...], layers: int) -> float:
    """Mean number of rows over ``layers`` layers, ``first`` at the start and m from layer s on for (s, m) in ``cuts``."""
    sites, rows = [0, *(s for s, _ in cuts), layers], [first, *(m for _, m in cuts)]
    return sum((b - a) * m for a, b, m in zip(sites, sites[1:], rows, strict=False)) / layers


@contract
class _FastV:
    keep: int = operand("budget")
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)

    def needs(self):
        return (Need("last", what="received", at="last", rows="last"),)

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        n, scores = tokens.x.shape[1], evidence_rows(evidence, "last", tokens)
        keep = choose(scores, count_of(params, n), valid_rows(tokens))
        return dispose(tokens, keep, self.rows(n), self.mode, self.positions), state, {"scores": scores}


@register("tokens")
def fastv(keep: int, mode: str = "keep", positions: str = "original"):
    """Keep the ``keep`` image tokens that the last row of the prompt attends to in the layer just done. The paper cuts
    after two layers: the site "llm.2".

    mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    """
    return _FastV(keep, mode, positions)


@contract
class _Stage:
    """One cut of a staged schedule; ``before``: the fraction that the cut before left."""

    before: float
    ratio: float
    query: str | int = "last"
    mode: str = "keep"
    positions: str = "fresh"

    def needs(self):
        return (Need("rows", what="received", at="next", rows=self.query),)

    def rows(self, n):
        return n if self.mode == "mask" else max(1, stage_count(n, self.before, self.ratio, self.mode))

    def apply(self, params, state, tokens, evidence, ctx):
        n, scores = tokens.x.shape[1], evidence_rows(evidence, "rows", tokens)
        keep = choose(scores, stage_count(n, self.before, self.ratio, self.mode), valid_rows(tokens))
        return dispose(tokens, keep, self.rows(n), self.mode, self.positions), state, {"scores": scores}


@contract
class _PyramidDrop:
    layers: tuple | None = None
    ratios: tuple = (0.5, 0.25, 0.125)
    query: str | int = "last"
    mode: str = "keep"
    positions: str = "fresh"

    def check(self):
        check_budget(1, self.mode, self.positions)
        check_ratios(self.ratios, None if self.layers is None else len(self.layers))

    def sites(self, layers):
        return stage_sites(self.layers, (8, 16, 24), 32, layers)

    def schedule(self, layers):
        before = (1.0, *self.ratios)
        return tuple((s, _Stage(a, b, self.query, self.mode, self.positions))
                     for s, a, b in zip(self.sites(layers), before, self.ratios, strict=False))  # fmt: skip


@register("tokens")
def pyramiddrop(layers: tuple[int, ...] | None = None, ratios: tuple[float, ...] = (0.5, 0.25, 0.125),
                query: str | int = "last", mode: str = "keep", positions: str = "fresh"):
    """Drop image tokens in stages inside the language model (site "llm").

    Args:
      layers: numbers of layers done when the cuts happen; None: a quarter, half and three quarters of the depth.
      ratios: what each cut leaves, as fractions of the image tokens that entered.
      query: whose attention scores: "last", "text", "vision" or a number of last rows.
      mode: "keep" (gather) or "mask".  positions: rotary positions "fresh" (as published) or "original".
    """  # fmt: skip
    return _PyramidDrop(layers, ratios, query, mode, positions)


@contract
class RankCut:
    """One cut of a schedule of shares: ceil(rate N) rows stay, by what rows of ``query`` gave them in the layer just done.

    before: the share that the cut before left.  name: of the label whose rows (value 1) may leave, None for all;
    ``others``: how many rows of the image group do not carry it. They stay."""

    before: float
    rate: float
    query: str | int = "last"
    mode: str = "keep"
    positions: str = "original"
    name: str | None = None
    others: int = 0

    def needs(self):
        return (Need("rank", what="received", at="last", rows=self.query),)

    def count(self, n: int) -> int:
        """ceil(rate N), N the rows that entered: of the ``n`` at the cut, ceil(N before) in mode "keep"."""
        n = n - self.others
        entered = n if self.mode == "mask" else math.floor(n / self.before + 1e-6)
        return min(n, math.ceil(entered * self.rate - 1e-6))

    def rows(self, n):
        return n if self.mode == "mask" else max(1, self.count(n) + self.others)

    def apply(self, params, state, tokens, evidence, ctx):
        n, scores = tokens.x.shape[1], evidence_rows(evidence, "rank", tokens)
        always = None if self.name is None else label(tokens, self.name) != 1
        keep = choose(scores, self.count(n), valid_rows(tokens), always=always)
        return dispose(tokens, keep, self.rows(n), self.mode, self.positions), state, {"scores": scores}


def rank_cuts(rates: tuple[float, ...], query: str | int, mode: str, positions: str, *, least: float = 0.0,
              name: str | None = None, others: int = 0) -> tuple[tuple[int, RankCut], ...]:
    """(layer, cut) pairs for one share per layer. A layer that would drop at most ``least`` of the tokens waits for the
    next, so that runs of alike layers stay one segment."""
    cuts, before = [], 1.0
    for layer, rate in enumerate(rates):
        if layer and before > 0 and before - rate > least:
            cuts.append((layer, RankCut(before, rate, query, mode, positions, name, others)))
            before = rate
    return tuple(cuts)


def check_rates(rates) -> tuple[float, ...]:
    """One share per layer, 1 first, never rising."""
    rates = tuple(float(r) for r in rates)
    ok = len(rates) >= 2 and rates[0] == 1 and all(0 <= b <= a for a, b in zip(rates, rates[1:], strict=False))
    expect("rates", rates, "shares that start at 1 and never rise, one per layer", ok)
    return rates
