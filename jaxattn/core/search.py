"""Black-box search for the few numbers that a method is configured by: a Gaussian process asks, the objective tells.

Offline and in numpy: one evaluation runs a model over a calibration set, which costs more than all of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jaxattn.core.types import expect

LENGTHS = np.geomspace(0.05, 3.0, 12)  # of the kernel, in sides of the unit cube
NOISES = (1e-6, 1e-3, 1e-1)  # variances beside a signal of variance 1


@dataclass
class Search:
    """State of a search that maximises.

    Attributes:
      bounds: {name: (low, high)}.  tried: points so far, each {name: value}.  values: what was told of them.
    """

    bounds: dict[str, tuple[float, float]]
    initial: int = 27
    seed: int = 42
    tried: list[dict[str, float]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __post_init__(self):
        ok = len(self.bounds) >= 1 and all(low < high for low, high in self.bounds.values())
        expect("bounds", self.bounds, "{name: (low, high)} with low < high", ok)
        expect("initial", self.initial, "at least 1 random point", self.initial >= 1)

    def ask(self) -> dict[str, float]:
        """The next point: at random for the first ``initial``, then where the expected improvement is largest."""
        rng = np.random.default_rng((self.seed, len(self.tried)))
        d = len(self.bounds)
        if len(self.values) < self.initial:
            return self._point(rng.uniform(size=d))
        x, y = self._data()
        best = x[y.argmax()]
        near = np.clip(best + rng.normal(size=(512, d)) * np.geomspace(0.005, 0.3, 512)[:, None], 0, 1)
        candidates = np.concatenate([rng.uniform(size=(1024, d)), near])
        mean, deviation = posterior(x, y, candidates)
        return self._point(candidates[expected_improvement(mean, deviation, y.max()).argmax()])

    def tell(self, point: dict[str, float], value: float) -> None:
        """Record the objective at a point; a value that is not finite counts as the worst seen."""
        self.tried.append(dict(point))
        self.values.append(float(value))

    @property
    def best(self) -> tuple[dict[str, float], float]:
        """(point, value) of the largest finite value."""
        finite = [v if math.isfinite(v) else -math.inf for v in self.values]
        expect("values", self.values, "at least one finite value", any(v > -math.inf for v in finite))
        i = int(np.argmax(finite))
        return self.tried[i], self.values[i]

    def _point(self, unit):
        return {n: float(lo + u * (hi - lo)) for (n, (lo, hi)), u in zip(self.bounds.items(), unit, strict=True)}

    def _data(self):
        x = np.array([[(p[n] - lo) / (hi - lo) for n, (lo, hi) in self.bounds.items()] for p in self.tried])
        y = np.array(self.values)
        finite = np.isfinite(y)
        y = np.where(finite, y, y[finite].min() if finite.any() else 0.0)
        return x, (y - y.mean()) / (y.std() or 1.0)


def maximise(objective: Callable[[dict[str, float]], float], bounds: dict[str, tuple[float, float]], *, calls: int = 300,
             initial: int = 27, seed: int = 42) -> Search:
    """``calls`` evaluations of the objective; ``.best`` of the result is what they found."""  # fmt: skip
    search = Search(bounds, initial, seed)
    for _ in range(calls):
        point = search.ask()
        search.tell(point, objective(point))
    return search


def posterior(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, deviation) [M] at points [M, d] of a Gaussian process through y [N] at x [N, d] in the unit cube: a Matern
    5/2 kernel of variance 1, length and noise of largest marginal likelihood."""
    best = None
    for length in LENGTHS:
        k = _matern(x, x, length)
        for noise in NOISES:
            chol = np.linalg.cholesky(k + noise * np.eye(len(x)) + 1e-10 * np.eye(len(x)))
            alpha = np.linalg.solve(chol.T, np.linalg.solve(chol, y))
            likelihood = -0.5 * y @ alpha - np.log(np.diag(chol)).sum()
            if best is None or likelihood > best[0]:
                best = likelihood, length, chol, alpha
    _, length, chol, alpha = best
    cross = _matern(at, x, length)
    half = np.linalg.solve(chol, cross.T)
    return cross @ alpha, np.sqrt(np.maximum(1 - (half * half).sum(0), 1e-12))


def expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """E max(f - best, 0) for f normal with the given means and deviations."""
    z = (mean - best) / deviation
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    return deviation * (z * below + density)


def _matern(a, b, length):
    r = math.sqrt(5) * np.sqrt(np.maximum(((a[:, None] - b[None]) ** 2).sum(-1), 0)) / length
    return (1 + r + r * r / 3) * np.exp(-r)


__all__ = ["Search", "expected_improvement", "maximise", "posterior"]
