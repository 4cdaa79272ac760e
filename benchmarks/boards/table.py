"""A board as a table: Markdown for the file, rich for the terminal, from the same cells."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from benchmarks.boards.budgets import FULL
from benchmarks.boards.tokens import RANKED, UNFAIR, Result, slowdown

COLUMNS = (
    "tokens", "method", "mean", *RANKED, "yes", "no", "digits kept", "ms / image", "time", "MFLOP", "cache KB",
    *(f"{kind}*" for kind in UNFAIR),
)  # fmt: skip
LEGEND = (
    f"mean: of {', '.join(RANKED)} (percent of questions answered right); methods are in its order at each budget.",
    "yes, no: share of presence questions answered right where the answer is yes, and where it is no (a false yes is a "
    "hallucination).",
    "tokens: visual tokens in a layer of the language model, on average over its layers.",
    "digits kept: share of the digits' patches that enter the language model; merging methods average patches and lose none "
    "as a whole.",
    "ms / image and time: all questions of an image answered, from pixels to words, in batches on this machine (median; "
    "share of the full model's time on the same batch). MFLOP: matrix products of an image. cache: keys, values and "
    "positions of an image, a short prompt and its answer.",
    f"*{' and '.join(UNFAIR)}: unfair to pruning without retraining, so shown and not ranked: the language model counts by "
    "the share of digits among the tokens, and every selection that finds digits changes that share.",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Cells in the order of COLUMNS; ``best``: highest mean of its budget; ``budget`` groups rows."""

    budget: int
    cells: tuple[str, ...]
    best: bool = False


def rows(results: Sequence[Result]) -> list[Row]:
    """The full model, then each budget from the largest, methods from the best."""
    full = next(r for r in results if r.entry.method == FULL)
    made = [Row(full.entry.budget, _cells(full, full))]
    for budget in sorted({r.entry.budget for r in results if r is not full}, reverse=True):
        here = sorted((r for r in results if r is not full and r.entry.budget == budget), key=lambda r: -r.mean)
        made += [Row(budget, _cells(r, full), best=i == 0) for i, r in enumerate(here)]
    return made


def _cells(r: Result, full: Result) -> tuple[str, ...]:
    accuracy = r.scores["accuracy"]
    size = float(np.median(r.seconds)) / r.batch * 1e3
    return (
        f"{r.entry.tokens:.4g}", r.entry.method, percent(r.mean), *(percent(accuracy[kind]) for kind in RANKED),
        percent(r.scores["yes_recall"]), percent(r.scores["no_recall"]), "merged" if r.kept is None else percent(r.kept),
        f"{size:.2f}", f"{slowdown(r, full):.2f}", f"{r.flops / 1e6:.0f}", f"{r.cache / 1024:.0f}",
        *(percent(accuracy[kind]) for kind in UNFAIR),
    )  # fmt: skip


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def markdown(results: Sequence[Result]) -> str:
    """The board as a Markdown table; the best mean of each budget is bold."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "".join(" ---: |" if c != "method" else " --- |" for c in COLUMNS)]
    for row in rows(results):
        cells = list(row.cells)
        if row.best:
            cells[2] = f"**{cells[2]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TERMINAL = ("tokens", "method", "mean", *RANKED, "digits kept", "time", "MFLOP")


def rich_table(results: Sequence[Result], title: str) -> Table:
    """The columns of the board that a terminal has room for."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    chosen = [COLUMNS.index(name) for name in TERMINAL]
    for name in TERMINAL:
        table.add_column(name.removeprefix("digits "), justify="left" if name == "method" else "right",
                         no_wrap=name != "method", overflow="fold",
                         min_width=12 if name == "method" else None)  # fmt: skip
    before = None
    for row in rows(results):
        if before not in (None, row.budget):
            table.add_section()
        before = row.budget
        table.add_row(*(row.cells[i] for i in chosen), style="bold" if row.best else None)
    return table


def below_random(results: Sequence[Result]) -> list[str]:
    """A sentence for each method that is behind ``random`` at its budget by more than chance, with what it kept."""
    sentences = []
    at_random = {r.entry.budget: r for r in results if r.entry.method == "random"}
    for r in results:
        base = at_random.get(r.entry.budget)
        if base is None or r is base or r.entry.method == FULL:
            continue
        questions = sum(r.scores["count"][kind] for kind in RANKED)
        noise = 2 * math.sqrt(0.5 / max(questions, 1))  # two standard errors of a difference, at most
        if r.mean >= base.mean - noise:
            continue
        sentences.append(f"{r.entry.label} is below random ({percent(r.mean)} against {percent(base.mean)}): {_why(r, base)}")
    return sentences


def _why(r: Result, base: Result) -> str:
    yes, no = (r.scores[k] - base.scores[k] for k in ("yes_recall", "no_recall"))
    worst = min(RANKED, key=lambda kind: r.scores["accuracy"][kind] - base.scores["accuracy"][kind])
    hit = f"it loses most on {worst} ({percent(r.scores['accuracy'][worst])} against {percent(base.scores['accuracy'][worst])})"
    if r.kept is None:
        mixed = f"{percent(r.mixed)} % of the digits' patches are averaged with patches of something else"
        if "positions=original" in r.entry.method:
            return f"{mixed}; {hit}."
        return f"merged tokens get new positions in the order of the matching, so patches move, and {mixed}; {hit}."
    if len(set(r.entry.layers)) > 1:
        return f"it drops tokens between the layers, before all of them have read the image; {hit}."
    if r.kept < base.kept:
        return (f"its scores do not find the digits of this model: {percent(r.kept)} % of their patches are left, at random "
                f"{percent(base.kept)} %; {hit}.")  # fmt: skip
    lean = "says yes too often" if no < yes else "misses what is there"
    return f"it keeps more of the digits ({percent(r.kept)} % against {percent(base.kept)} %) and {lean}; {hit}."
