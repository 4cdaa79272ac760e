"""G-Search and P-Sigmoid: how many image tokens each layer of the language model needs ("Accelerating Multimodal Large
Language Models by Searching Optimal Vision Token Reduction").

The order of image tokens by received attention hardly changes from layer to layer, so one number per layer, the share
r_i of tokens that it reads, describes a whole schedule: layer i keeps the ceil(r_i N) tokens of largest attention in
layer i - 1, and what has left does not return.

``g_search``: shares for a loss that may not be exceeded. From shallow to deep, with the layers above fixed and the layers
below tied to layer i, the smallest r_i in [0, r_{i-1}] that still performs; a bisection, valid because more tokens in one
layer never hurt by assumption.
``p_sigmoid``: shares for a budget b. r_i = 1 / (1 + exp(k (i - alpha))) with alpha such that the mean over the L layers is
b exactly; one number k is left to search (``p_sigmoid_search``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxattn.core.artifact import load
from jaxattn.core.reduce import check_budget, choose, evidence_rows, reduce_mask, valid_rows
from jaxattn.core.search import Search, maximise
from jaxattn.core.types import Need, contract, expect, operand
from jaxattn.registry import register
from jaxattn.tokens.staged import check_rates, rank_cuts


@contract
class _Masked:
    """The cut of ``staged.RankCut`` with every row in its place: its share is an operand, so one program serves a search."""

    rate: float = operand("scalar", 1.0)
    query: str | int = "last"

    def needs(self):
        return (Need("rank", what="received", at="last", rows=self.query),)

    def rows(self, n):
        return n

    def apply(self, params, state, tokens, evidence, ctx):
        count = jnp.ceil(tokens.x.shape[1] * params["rate"] - 1e-4).astype(jnp.int32)
        scores = evidence_rows(evidence, "rank", tokens)
        return reduce_mask(tokens, choose(scores, count, valid_rows(tokens))), state, {"scores": scores}


@contract
class _Rates:
    rates: tuple | None = None
    keep: float = 0.25
    steepness: float = 1.0
    query: str | int = "last"
    least: float = 0.0
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(1, self.mode, self.positions)
        if self.rates is not None:
            check_rates(self.rates)
        expect("keep", self.keep, "a mean share in (0, 1]", 0 < self.keep <= 1)
        expect("least", self.least, "a share of the tokens in [0, 1)", 0 <= self.least < 1)

    def shares(self, layers: int) -> tuple[float, ...]:
        if self.rates is None:
            return reachable(p_sigmoid(layers, self.keep, self.steepness))
        expect("rates", len(self.rates), f"one share per layer, {layers}", len(self.rates) == layers)
        return check_rates(self.rates)

    def schedule(self, layers):
        shares = self.shares(layers)
        if self.mode == "keep" or self.positions == "fresh":
            return rank_cuts(shares, self.query, self.mode, self.positions, least=self.least)
        cuts = []  # a cut at every layer, whether its share falls or not: shares do not decide what is compiled
        for layer in range(1, layers):
            before = cuts[-1][1].rate if cuts else 1.0
            cuts.append((layer, _Masked(shares[layer] if before - shares[layer] > self.least else before, self.query)))
        return tuple(cuts)


def reachable(rates) -> tuple[float, ...]:
    """Shares as a model can execute them: the first layer ranks, so it reads everything, and none reads more than the
    layer above."""
    out = [1.0]
    for rate in rates[1:]:
        out.append(min(out[-1], float(rate)))
    return tuple(out)


@register("tokens")
def g_search(rates: tuple[float, ...] | None = None, keep: float = 0.25, steepness: float = 1.0, query: str | int = "last",
             least: float = 0.0, mode: str = "keep", positions: str = "original", artifact: str | None = None):
    """Read a share of the image tokens in each layer, ranked by the layer above (site "llm").

    Args:
      rates: shares per layer, 1 first, never rising, as ``g_search_rates`` or ``p_sigmoid`` return them. None: a
        P-Sigmoid of mean share ``keep`` and ``steepness``.
      keep: mean share over the layers.  steepness: k of the sigmoid; 0 is uniform, large is an exit at layer keep * L.
      query: whose attention ranks: "last", "text" or a number of last rows.
      least: cuts that would drop a smaller share of the tokens wait for the next layer (fewer, longer segments).
      mode: "keep" (gather) or "mask", with original positions one program for all shares.  positions: rotary positions
        "original" or "fresh".
      artifact: a file of ``g_search_shares``, in place of rates.
    A share of 0 leaves one row in mode "keep" (marked invalid), since an array of no rows cannot be scanned.
    """  # fmt: skip
    if artifact is not None:
        rates = tuple(map(float, load(artifact, "g_search_shares")[0]["rates"]))
    return _Rates(None if rates is None else tuple(rates), keep, steepness, query, least, mode, positions)


# ------------------------------------------------------------------------------------------------------------ schedules
def p_sigmoid(layers: int, budget: float, steepness: float) -> tuple[float, ...]:
    """Shares r_i = 1 / (1 + exp(k (i - alpha))) of ``layers`` layers whose mean is ``budget``; alpha by bisection."""
    expect("layers", layers, "at least 1", layers >= 1)
    expect("budget", budget, "a mean share in (0, 1]", 0 < budget <= 1)
    expect("steepness", steepness, "0 or more", steepness >= 0)
    if budget == 1 or steepness == 0:
        return (float(budget),) * layers
    i, odds = np.arange(layers), math.log(budget / (1 - budget))

    def shares(alpha):
        return 0.5 * (1 - np.tanh(0.5 * steepness * (i - alpha)))

    # The smallest and the largest share bracket the mean: alpha lies where layer 0 or layer L - 1 has share b.
    low, high = odds / steepness, odds / steepness + layers - 1
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if shares(middle).mean() < budget else (low, middle)
    return tuple(float(x) for x in shares(0.5 * (low + high)))


def g_search_rates(performance: Callable[[tuple[float, ...]], float], layers: int, loss: float = 0.0, *,
                   precision: float = 1 / 64, baseline: float | None = None) -> tuple[float, ...]:
    """The smallest shares that perform, layer by layer.

    Args:
      performance: shares of all ``layers`` -> a number, larger is better, say accuracy on calibration data of a model
        bound with ``g_search(shares)``.
      loss: what may be lost of ``baseline`` (None: the performance of all tokens).
      precision: width at which the bisection of a layer stops; shares are multiples of it if 1 / precision is whole.
    Returns shares; about layers * log2(1 / precision) evaluations.
    """  # fmt: skip
    expect("precision", precision, "in (0, 1]", 0 < precision <= 1)
    rates = [1.0] * layers
    goal = (performance(tuple(rates)) if baseline is None else baseline) - loss
    for i in range(1, layers):
        enough = round(rates[i - 1] / precision)
        fails = -1  # in steps of the precision; -1 is below the smallest share
        while enough - fails > 1:
            step = (enough + fails) // 2
            share = min(step * precision, rates[i - 1])
            if performance((*rates[:i], *[share] * (layers - i))) >= goal:
                enough = step
            else:
                fails = step
        rates[i:] = [min(enough * precision, rates[i - 1])] * (layers - i)
    return tuple(rates)


def p_sigmoid_search(performance: Callable[[tuple[float, ...]], float], layers: int, budget: float, *, calls: int = 30,
                     initial: int = 8, seed: int = 42, steepest: float = 4.0) -> tuple[tuple[float, ...], Search]:
    """(shares, the Search) of mean ``budget`` whose steepness performs best, by Bayesian optimisation of
    log2(1 + k) in [0, log2(1 + steepest)]; ``performance`` as in ``g_search_rates``."""  # fmt: skip

    def at(point):
        return p_sigmoid(layers, budget, 2.0 ** point["steepness"] - 1)

    bounds = {"steepness": (0.0, math.log2(1 + steepest))}
    search = maximise(lambda x: performance(reachable(at(x))), bounds, calls=calls, initial=initial, seed=seed)
    return at(search.best[0]), search


@register("conversion")
def g_search_shares(model, batches, key=None, *, loss: float = 0.01, precision: float = 1 / 64, budget: float | None = None,
                    calls: int = 30, initial: int = 8, query: str | int = "last", seed: int = 42):
    """Search how many image tokens each layer of a trained model needs (G-Search, or P-Sigmoid for a given budget).

    Args:
      model: a ``core.types.Trained``; what performs is its share of right answers.  batches: of its data.  key: unused.
      loss: accuracy that may be lost.  precision: of a share.  query: whose attention ranks, as in ``g_search``.
      budget: mean share of the tokens to meet instead; then calls, initial and seed are of ``p_sigmoid_search``.
    Returns: (model, {rates [L], accuracy, baseline, even, evaluations}); even: the accuracy of as many tokens, one share
      behind the first layer. Shares are operands of one program.
    """  # fmt: skip
    batches, depth, asked = list(batches), model.layers["llm"], []

    def accuracy(rates=None):
        asked.append(rates)
        reduce = None if rates is None else {"llm": g_search(rates, query=query, mode="mask")}
        right = np.concatenate([np.asarray(model.run(batch, reduce=reduce).right) for batch in batches])
        return float(right.mean())

    baseline = accuracy()
    if budget is None:
        rates = g_search_rates(accuracy, depth, loss, precision=precision, baseline=baseline)
    else:
        rates = reachable(p_sigmoid_search(accuracy, depth, budget, calls=calls, initial=min(initial, calls), seed=seed)[0])
    flat = (1.0, *[(sum(rates) - 1) / (depth - 1)] * (depth - 1))  # as many tokens, alike in all layers behind the first
    found = {"rates": np.asarray(rates, np.float32), "accuracy": accuracy(rates), "baseline": baseline, "even": accuracy(flat),
             "evaluations": len(asked)}
    return model, {name: np.asarray(x, np.float32) for name, x in found.items()}
