"""Attention debiasing: any attention-scored pruner without its taste for late rows and for padding ("Attention Debiasing
for Token Pruning in Vision Language Models").

Averaged over many images a pruner's score rises with the raster index j, f(j) = a exp(b j). Scores are divided by that
trend, and patches of the padding that made the image square do not compete:

    s'_j = s_j m_j w_j,   w_j = f(0) / f(j) = exp(-b j)

In a pruner of several stages both act in the first one only. ``fit_trend`` finds b (or w) from measured scores; published
fits lie near b = 0.002 to 0.004 for 576 tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxattn import registry
from jaxattn.core.artifact import load
from jaxattn.core.reduce import original_rows, valid_rows
from jaxattn.core.types import Array, Tokens, contract, expect, is_contract, operand
from jaxattn.registry import register

PER_KEY = ("received", "rows")


def fit_trend(scores) -> tuple[float, float]:
    """(a, b) of the least-squares exponential trend a exp(b j) through mean scores.

    scores: [..., N], a pruner's raw scores of N tokens in raster order, over images; the mean over leading axes is
    fitted. A straight line through the logarithms starts a Gauss-Newton fit of the curve itself.
    """
    y = np.asarray(scores, np.float64)
    y = y.reshape(-1, y.shape[-1]).mean(0)
    expect("scores", f"shape {np.shape(scores)}", "[..., N] with at least two positive means", (y > 0).sum() >= 2)
    j, some = np.arange(len(y)), y > 0
    b, log_a = np.polyfit(j[some], np.log(y[some]), 1)
    a, n = np.exp(log_a), len(y)
    for _ in range(50):
        e = np.exp(b * j)
        step, *_ = np.linalg.lstsq(np.stack([e, a * j * e / n], -1), y - a * e, rcond=None)
        new = a + step[0], b + step[1] / n
        if not np.isfinite(new).all() or np.sum((y - new[0] * np.exp(new[1] * j)) ** 2) > np.sum((y - a * e) ** 2):
            break
        a, b = new
    return float(a), float(b)


def trend_weights(n: int, decay: float) -> np.ndarray:
    """float32 [n]: exp(-decay j), the weight of raster index j."""
    return np.exp(-decay * np.arange(n)).astype(np.float32)


def real_patches(width: int, height: int, grid: int = 24, threshold: float = 0.5) -> np.ndarray:
    """bool [grid * grid]: patches that are image and not padding.

    width, height: of the image in pixels before it was padded to a centred square and resized.  grid: patches per side.
    threshold: a patch is padding if more than this share of its area is (published: 0.5 for FastV, 0.01 for PyramidDrop).
    """
    expect("width, height", (width, height), "sizes above 0", width > 0 and height > 0)

    def inside(size):  # share of each patch's extent that the image covers
        side = max(width, height)
        start = (side - size) / 2 / side * grid
        edges = np.clip(np.arange(grid + 1), start, start + size / side * grid)
        return np.diff(edges)

    padded = 1 - inside(height)[:, None] * inside(width)[None, :]
    return (padded <= threshold + 1e-9).reshape(-1)


def debias(scores: Array, decay: float | Array = 0.0, real: Array | None = None) -> Array:
    """Debiased scores [..., N] of raw scores [..., N] in raster order; real: bool [..., N], see ``real_patches``."""
    out = scores * jnp.exp(-decay * jnp.arange(scores.shape[-1], dtype=jnp.promote_types(scores.dtype, jnp.float32)))
    return out if real is None else jnp.where(real, out, 0)


@contract
class _Debiased:
    """A single cut of a host, its attention evidence debiased."""

    host: object
    decay: float = operand("scalar", 0.0)
    weights: object = operand("array", None)
    real: object = None

    @property
    def positions(self):
        return getattr(self.host, "positions", "original")

    @property
    def acts_on(self):
        return getattr(self.host, "acts_on", "vision")

    @property
    def carries(self):
        return getattr(self.host, "carries", None)

    def resolve(self, layers: int):
        host = self.host.resolve(layers) if hasattr(self.host, "resolve") else self.host
        return dataclasses.replace(self, host=host)

    def needs(self):
        return self.host.needs()

    def rows(self, n):
        return self.host.rows(n)

    def weight(self, params, tokens: Tokens) -> Array:
        """float32 [B, N]: w of the rows, by the raster index that each had."""
        place = original_rows(tokens)
        if "weights" not in params:
            return jnp.exp(-params["decay"] * place.astype(jnp.float32))
        table = jnp.asarray(params["weights"], jnp.float32)
        n0 = tokens.x.shape[1] if tokens.slot is None else tokens.slot.shape[1]
        expect("weights", f"shape {table.shape}", f"({n0},), one per image token", table.shape == (n0,))
        return jnp.take(table, jnp.minimum(place, n0 - 1))

    def real_rows(self, tokens: Tokens) -> Array | None:
        if "padding" in tokens.meta.labels:
            return jnp.broadcast_to(tokens.meta.labels["padding"] == 0, tokens.x.shape[:2])
        if self.real is None:
            return None
        place, table = original_rows(tokens), self.real.numpy()
        n0 = tokens.x.shape[1] if tokens.slot is None else tokens.slot.shape[1]
        expect("size", f"a grid of {len(table)} patches", f"the {n0} image tokens", len(table) == n0)
        return jnp.take(jnp.asarray(table), jnp.minimum(place, n0 - 1))

    def apply(self, params, state, tokens, evidence, ctx):
        w, real = self.weight(params, tokens), self.real_rows(tokens)
        if real is not None:
            # Padding is no candidate: where less than the budget is real, less is kept.
            valid = valid_rows(tokens) & real
            tokens = tokens_with(tokens, valid)
            w = jnp.where(real, w, 0)
        mine = dict(evidence)
        for need in self.host.needs():
            if need.what in PER_KEY and mine.get(need.name) is not None:
                x = mine[need.name]
                mine[need.name] = x * w.reshape(w.shape[0], *[1] * (x.ndim - 2), -1)
        return self.host.apply(params.get("host", {}), state, tokens, mine, ctx)


def tokens_with(tokens: Tokens, valid: Array) -> Tokens:
    return tokens.replace(meta=tokens.meta.replace(valid=valid))


@contract
class _DebiasedStages:
    """A host of several cuts, the first one debiased."""

    host: object
    decay: float
    weights: object
    real: object

    def resolve(self, layers: int):
        host = self.host.resolve(layers) if hasattr(self.host, "resolve") else self.host
        return dataclasses.replace(self, host=host)

    def sites(self, layers):
        return self.host.sites(layers)

    def schedule(self, layers):
        (site, first), *rest = self.host.schedule(layers)
        return ((site, _Debiased(first, self.decay, self.weights, self.real)), *rest)


@register("tokens")
def attention_debiasing(host, decay: float = 0.003, weights=None, size: tuple[int, int] | None = None, grid: int = 24,
                        threshold: float = 0.5, artifact: str | None = None):
    """A pruner that scores by attention, debiased.

    Args:
      host: the pruner's record or its name, such as ``fastv(keep=64)`` or "pyramiddrop"; sites are the host's.
      decay: b of the trend, in 1 / raster index (``fit_trend`` of the host's own mean scores).
      weights: [N] weights of the image tokens in place of exp(-decay j).
      size: (width, height) of all images before padding to a square of ``grid`` x ``grid`` patches; where sizes differ,
        label the padded patches' rows ``padding = 1`` instead.  threshold: see ``real_patches``.
      artifact: a file of ``attention_debiasing_trend``, in place of decay.
    """  # fmt: skip
    if artifact is not None:
        decay = float(load(artifact, "attention_debiasing_trend")[0]["decay"])
    host = registry.parse("tokens", host) if isinstance(host, str) else host
    staged = hasattr(host, "schedule")
    ok = is_contract(host) and (staged or any(need.what in PER_KEY for need in _needs(host)))
    expect("host", host, "a token method that scores by attention", ok)
    real = None if size is None else real_patches(*size, grid, threshold)
    return (_DebiasedStages if staged else _Debiased)(host, decay, weights, real)


def _needs(host):
    if hasattr(host, "resolve"):
        host = host.resolve(24)
    return host.needs() if hasattr(host, "needs") else ()


@register("conversion")
def attention_debiasing_trend(model, batches, key=None, *, host, site: str | None = None):
    """Fit the trend of a pruner's raw scores on a trained model ("Attention Debiasing for Token Pruning in Vision Language
    Models").

    Args:
      model: a ``core.types.Trained``.  batches: of its data.  key: unused.
      host: the pruner, a record or its name ("fastv:keep=64" in quotes), which tells its ``scores``.  site: where it is bound;
        None: "llm" with a schedule, "llm.2" where it asks for language layers, else "vision".
    Returns: (model, {decay, scale: b and a of a exp(b j), scores [N], the mean raw scores, weights [N]}).
    """
    host = registry.parse("tokens", host) if isinstance(host, str) else host
    if site is None:
        staged, near = hasattr(host, "schedule"), any(need.at in ("last", "next") for need in _needs(host))
        site = "llm" if staged else f"llm.{min(2, model.layers['llm'] - 1)}" if near else "vision"
    total, count = 0.0, 0
    for batch in batches:
        told = model.run(batch, reduce={site: host}).told
        cuts = [aux["scores"] for part in told.values() for aux in part.values() if "scores" in aux]
        expect("host", host, "a method that tells the scores of its first cut", len(cuts) >= 1)
        total, count = total + np.asarray(cuts[0], np.float64).sum(0), count + len(cuts[0])
    expect("batches", "none", "at least one", count > 0)
    scale, decay = fit_trend(total / count)
    found = {"decay": decay, "scale": scale, "scores": total / count, "weights": trend_weights(len(total), decay)}
    return model, {name: np.asarray(x, np.float32) for name, x in found.items()}
