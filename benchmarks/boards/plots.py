"""Pictures of a board: accuracy against budget, and the tokens that each method keeps. Needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.boards.budgets import FULL
from benchmarks.boards.tokens import RANKED, Result

COLOURS = ("#8a8a8a", "#1f5fa8", "#d1495b", "#2e933c", "#e09f3e", "#6f4e9c", "#1b998b", "#a44a3f")


def require() -> None:
    """Raises ImportError that names the extra when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'jaxattn[plot]'") from error


def blank(width: float, height: float):
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def chart(results: Sequence[Result], path: Path) -> None:
    """Accuracy of each ranked kind of question over the visual tokens that are left, a line per method (PNG)."""
    full = next(r for r in results if r.entry.method == FULL)
    methods = list(dict.fromkeys(r.entry.method for r in results if r is not full))
    figure = blank(3 * len(RANKED), 3.3)
    panels = figure.subplots(1, len(RANKED), sharey=True)
    budgets = sorted({r.entry.budget for r in results})
    for panel, kind in zip(panels, RANKED, strict=True):
        panel.axhline(100 * full.scores["accuracy"][kind], color="black", linewidth=0.8, linestyle="--", label="full")
        for number, method in enumerate(methods):
            points = sorted((r.entry.tokens, 100 * r.scores["accuracy"][kind]) for r in results if r.entry.method == method)
            plain = method in ("random", "uniform")
            panel.plot(*zip(*points, strict=True), label=method, color=COLOURS[number % len(COLOURS)], linewidth=1.4,
                       marker="o", markersize=3.5, linestyle=":" if plain else "-")  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, [str(b) for b in budgets])
        panel.minorticks_off()
        panel.set(title=kind, xlabel=f"visual tokens of {full.entry.budget}")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("questions answered right, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, format="png", dpi=90)


def overlays(results: Sequence[Result], budget: int, images: np.ndarray, grid: tuple[int, int], path: Path) -> None:
    """Scenes (rows) by methods (columns) at one budget: dropped patches are dark; patches that were merged into one
    token share a colour (PNG).

    images: [S, H, W]; grid: patches (rows, columns).
    """
    here = [r for r in results if r.entry.budget == budget and r.entry.method != FULL]
    figure = blank(1.55 * (len(here) + 1), 1.6 * len(images) + 0.35)
    panels = figure.subplots(len(images), len(here) + 1, squeeze=False)
    for row, image in enumerate(images):
        grey = np.repeat(np.clip(image, 0, 1)[..., None], 3, -1)
        pictures = [("scene", grey)] + [(r.entry.method, shade(grey, r.slot[row], grid)) for r in here]
        for column, (title, picture) in enumerate(pictures):
            panel = panels[row, column]
            panel.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
            panel.set_axis_off()
            if row == 0:
                panel.set_title(title if column else f"{budget} of {grid[0] * grid[1]}", fontsize=9)
    figure.savefig(path, format="png", dpi=64)


def shade(grey: np.ndarray, slot: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] in [0, 1]: ``grey`` with dropped patches darkened; kept ones stay, on blue; groups of merged ones take a
    colour each. slot: int [N], the row that now carries each patch, -1 none."""
    number = slot.max(initial=-1) + 1
    size = np.bincount(slot[slot >= 0], minlength=max(number, 1))
    colour = np.tile(np.array([0.16, 0.36, 0.72]), (max(number, 1), 1))
    groups = np.flatnonzero(size > 1)
    turn = 2 * np.pi * (np.arange(len(groups)) * 0.61803 % 1)
    wheel = 0.45 + 0.35 * np.cos(turn[:, None] + np.array([0, 2.1, 4.2]))
    colour[groups] = wheel
    # The largest group is the background that became one token: dark, so that the rest can be seen.
    if len(groups):
        colour[size.argmax()] = 0.3
    tint = np.where((slot >= 0)[:, None], colour[np.maximum(slot, 0)], 0.0).reshape(*grid, 3)
    height, width = grey.shape[0] // grid[0], grey.shape[1] // grid[1]
    tint = tint.repeat(height, 0).repeat(width, 1)
    kept = (slot >= 0).reshape(grid).repeat(height, 0).repeat(width, 1)[..., None]
    return np.where(kept, np.maximum(tint * 0.75, grey), 0.22 * grey)


def standings(found, path: Path, kinds: Sequence[str], most: int = 6) -> None:
    """Accuracy of each kind over the budget: the methods that are best at the second smallest budget in colour, plain
    baselines dotted, all others thin and grey (PNG). found: ``ranking.Standing``s."""
    full = [s for s in found if s.entry.method == FULL]
    budgets = sorted({s.entry.budget for s in found if s.entry.method != FULL})
    by_method: dict = {}
    for s in found:
        if s.entry.method != FULL:
            by_method.setdefault(s.entry.method, []).append(s)
    middle = budgets[min(1, len(budgets) - 1)]
    at = {m: next((s.mean for s in rows if s.entry.budget == middle), 0.0) for m, rows in by_method.items()}
    plain = [m for m in ("random", "uniform", "mean_pool") if m in by_method]
    best = [m for m in sorted(at, key=lambda m: -at[m]) if m not in plain][:most]
    columns = list(kinds) if len(kinds) <= 4 else list(kinds)[:4]
    figure = blank(3.1 * len(columns), 3.5)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, columns, strict=True):
        if full:
            panel.axhline(100 * full[0].share(kind), color="black", linewidth=0.8, linestyle="--", label="full")
        for method, rows in by_method.items():
            points = sorted((s.entry.budget, 100 * s.share(kind)) for s in rows)
            style = dict(color="#c8c8c8", linewidth=0.7, zorder=1)
            if method in best:
                colour = COLOURS[1 + best.index(method) % 7]
                style = dict(color=colour, linewidth=1.6, marker="o", markersize=3, label=method, zorder=3)
            elif method in plain:
                dots = (":", "-.", (0, (1, 3)))[plain.index(method)]
                style = dict(color="#555555", linewidth=1.2, linestyle=dots, label=method, zorder=2)
            panel.plot(*zip(*points, strict=True), **style)
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, [str(b) for b in budgets])
        panel.minorticks_off()
        panel.set(title=kind, xlabel="visual tokens per layer")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("questions answered right, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    figure.savefig(path, format="png", dpi=90)


def kept(here, images: np.ndarray, grid: tuple[int, int], path: Path, budget: int, across: int = 10) -> None:
    """Scenes by methods at one budget, ``across`` methods in a line, the best first (PNG). here: ``ranking.Standing``s."""
    count = min(len(images), *(len(s.outcomes[0].slot) for s in here))
    lines = -(-len(here) // across)
    figure = blank(1.15 * across, 1.3 * lines * count)
    panels = figure.subplots(lines * count, across, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for i, s in enumerate(here):
        for row in range(count):
            grey = np.repeat(np.clip(images[row], 0, 1)[..., None], 3, -1)
            panel = panels[i // across * count + row, i % across]
            panel.imshow(shade(grey, s.outcomes[0].slot[row], grid), interpolation="nearest", vmin=0, vmax=1)
            if row == 0:
                panel.set_title(s.entry.method, fontsize=7)
    figure.suptitle(f"{budget} of {grid[0] * grid[1]} tokens", fontsize=9)
    figure.savefig(path, format="png", dpi=64)
