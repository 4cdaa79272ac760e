"""Who is ahead of whom: accuracies over checkpoints and images, with intervals.

Checkpoints and images are drawn anew, with replacement and independently of each other (all entries answer the same
images on the same checkpoints), and every figure is computed on the same draws for all entries: differences are paired.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.boards.budgets import FULL, Entry
from benchmarks.boards.outcomes import Exam, Outcome


@dataclasses.dataclass(frozen=True)
class Draws:
    """How often each checkpoint [R, C] and each image [R, S] is in each of R resamples; row 0 has each once."""

    checkpoints: np.ndarray
    images: np.ndarray


def draws(checkpoints: int, images: int, number: int = 2000, seed: int = 0) -> Draws:
    rng = np.random.default_rng(seed)
    pick = lambda n: rng.multinomial(n, np.full(n, 1 / n), number) if n > 1 else np.ones((number, 1), int)  # noqa: E731
    return Draws(*(np.concatenate([np.ones((1, n), int), pick(n)]) for n in (checkpoints, images)))


def shares(correct: np.ndarray, count: np.ndarray, d: Draws) -> np.ndarray:
    """float [R, K]: share of right answers in each resample. correct int [C, S, K]; count int [S, K]."""
    c, s, k = correct.shape
    by_images = (d.images.astype(float) @ correct.transpose(1, 0, 2).reshape(s, -1)).reshape(-1, c, k)
    right = np.einsum("rc,rck->rk", d.checkpoints.astype(float), by_images)
    asked = d.images.astype(float) @ count * d.checkpoints.sum(1, keepdims=True)
    return right / np.where(asked > 0, asked, np.nan)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentiles of the resamples, the first of which is the estimate itself."""
    known = values[1:][~np.isnan(values[1:])]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Standing:
    """An entry's figures: shares of right answers by column; mean of the ranked ones, in each resample [R] (the first is the
    estimate); outcomes by checkpoint."""

    entry: Entry
    names: tuple[str, ...]
    by_kind: np.ndarray
    means: np.ndarray
    outcomes: tuple[Outcome, ...]

    @property
    def mean(self) -> float:
        return float(self.means[0])

    def share(self, name: str) -> float:
        return float(self.by_kind[0, self.names.index(name)])

    def average(self, field: str) -> float | None:
        """Mean over the checkpoints of a figure that every outcome has, else None."""
        values = [getattr(o, field) for o in self.outcomes]
        return None if any(v is None for v in values) else float(np.mean(values))


def standings(entries: Sequence[Entry], outcomes: Mapping[tuple[str, str], Outcome], checkpoints: Sequence[str],
              exam: Exam, *, resamples: int = 2000) -> list[Standing]:  # fmt: skip
    """Of the entries that answered on every checkpoint. outcomes: by (label, checkpoint)."""
    d = draws(len(checkpoints), exam.member.shape[1], resamples)
    ranked, found = [exam.names.index(name) for name in exam.ranked], []
    for e in entries:
        mine = [outcomes.get((e.label, c)) for c in checkpoints]
        if any(o is None for o in mine):
            continue
        by_kind = shares(np.stack([exam.correct(o.right) for o in mine]), exam.count, d)
        found.append(Standing(e, exam.names, by_kind, by_kind[:, ranked].mean(1), tuple(mine)))
    return found


LEARNED = 0.75  # of each ranked kind: below, the model itself has not learned it, and pruning shows nothing


def unlearned(full: Outcome, exam: Exam) -> dict[str, float]:
    """Ranked kinds that a full model has not learned, with its share of right answers."""
    right, asked = exam.correct(full.right).sum(0), exam.count.sum(0)
    share = {n: float(r / max(a, 1)) for n, r, a in zip(exam.names, right, asked, strict=True)}
    return {n: share[n] for n in exam.ranked if share[n] < LEARNED}


def at_budget(found: Sequence[Standing], budget: int) -> list[Standing]:
    """Methods at a budget, the best first."""
    return sorted((s for s in found if s.entry.budget == budget and s.entry.method != FULL), key=lambda s: -s.mean)


def difference(a: Standing, b: Standing) -> tuple[float, float, float]:
    """(mean of a - mean of b, low, high)."""
    gap = a.means - b.means
    return float(gap[0]), *interval(gap)


def separated(a: Standing, b: Standing) -> bool:
    """Whether the interval of their paired difference leaves 0 out."""
    _, low, high = difference(a, b)
    return low > 0 or high < 0


def retained(s: Standing, full: Standing, name: str) -> tuple[float, float, float]:
    """(share of the full model's accuracy on a kind, low, high)."""
    at = s.names.index(name)
    whole = full.by_kind[:, at]
    ratio = s.by_kind[:, at] / np.where(whole > 0, whole, np.nan)
    return float(ratio[0]), *interval(ratio)
