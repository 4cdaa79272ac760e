"""The long board of token methods as Markdown, JSON and pictures, from the same figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.boards import plots, ranking
from benchmarks.boards.budgets import FULL, Entry, Unfit
from benchmarks.boards.outcomes import Exam, Outcome
from benchmarks.boards.ranking import Standing

ENOUGH = 0.92  # of the full model's accuracy
PLAIN = ("random", "uniform", "mean_pool")


def percent(share: float | None) -> str:
    return "-" if share is None or np.isnan(share) else f"{100 * share:.1f}"


def span(low: float, high: float, signed: bool = False) -> str:
    return f"{100 * low:+.1f} to {100 * high:+.1f}" if signed else f"{100 * low:.1f}-{100 * high:.1f}"


def write(path: Path, entries: Sequence[Entry], outcomes: Mapping[tuple[str, str], Outcome], costs: Mapping[str, dict],
          unfit: Sequence[Unfit], exam: Exam, facts: Mapping[str, Any], *, unfair: tuple[str, ...] = (), images=None,
          grid=None, resamples: int = 2000) -> None:  # fmt: skip
    """Write ``path``.md, .json, .png and, with images, -kept.png."""
    found = ranking.standings(entries, outcomes, facts["checkpoints"], exam, resamples=resamples)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {e.label: figures(s, found, costs) for s in found for e in (s.entry,)}
    summary = statements(found, exam)
    record = {**facts, "summary": summary, "entries": list(lines.values()), "unfit": [vars(u) for u in unfit]}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1, default=float) + "\n")
    plots.standings(found, path.with_suffix(".png"), exam.ranked)
    kept = images is not None and any(s.outcomes[0].slot is not None for s in found)
    if kept:
        middle = sorted({s.entry.budget for s in found if s.entry.method != FULL})
        budget = middle[min(1, len(middle) - 1)]
        plots.kept(ranking.at_budget(found, budget), images, grid, path.with_name(path.name + "-kept.png"), budget)
    path.with_suffix(".md").write_text(markdown(path.name, found, lines, costs, summary, unfit, exam, facts, unfair, kept))


def figures(s: Standing, found: Sequence[Standing], costs: Mapping[str, dict]) -> dict[str, Any]:
    """One row as plain data."""
    e, here = s.entry, ranking.at_budget(found, s.entry.budget)
    base = next((x for x in here if x.entry.method == "random"), None)
    low, high = ranking.interval(s.means)
    row = {"method": e.method, "budget": e.budget, "note": e.note, "layers": list(e.layers), "tokens": e.tokens,
           "mean": s.mean, "interval": [low, high], "accuracy": {n: s.share(n) for n in s.names},
           "by_checkpoint": [float(o.right.mean()) for o in s.outcomes],
           "kept": s.average("kept"), "mixed": s.average("mixed"), "merged": any(o.merged for o in s.outcomes),
           "live": np.mean([o.live for o in s.outcomes], 0).tolist()}  # fmt: skip
    if e.method != FULL:
        row["vs_random"] = None if base is None or base is s else ranking.difference(s, base)
        row["vs_best"] = None if s is here[0] else ranking.difference(s, here[0])
    return {**row, **{k: v for k, v in costs.get(e.label, {}).items() if k != "batch"}}


# ---------------------------------------------------------------------------------------------------------- statements
def statements(found: Sequence[Standing], exam: Exam) -> list[str]:
    """What can be said of each budget, and what cannot."""
    full = next((s for s in found if s.entry.method == FULL), None)
    lines = []
    for budget in sorted({s.entry.budget for s in found if s.entry.method != FULL}, reverse=True):
        here = ranking.at_budget(found, budget)
        best, base = here[0], next((s for s in here if s.entry.method == "random"), None)
        near = [s.entry.method for s in here[1:] if not ranking.separated(s, best)]
        pairs = [ranking.separated(a, b) for i, a in enumerate(here) for b in here[i + 1 :]]
        text = f"**{budget} tokens**: {best.entry.method} is best ({percent(best.mean)})"
        text += f"; not separated from it: {', '.join(near)}" if near else "; every other method is behind it"
        if pairs:
            text += f". {sum(pairs)} of {len(pairs)} pairs of methods are separated by their paired intervals"
        if base is not None:
            gaps = {s.entry.method: ranking.difference(s, base) for s in here if s is not base}
            above = sum(low > 0 for _, low, _ in gaps.values())
            below = [m for m, (_, _, high) in gaps.items() if high < 0]
            even = [m for m, (_, low, high) in gaps.items() if low <= 0 <= high]
            text += f"; {above} of {len(gaps)} are above random"
            text += f", not separated from it: {', '.join(even)}" if even else ""
            text += f", below it: {', '.join(below)}" if below else ""
        lines.append(text + ".")
        if full is not None:
            lines.append(_retained(here, full, exam, budget))
    return lines


def _retained(here: Sequence[Standing], full: Standing, exam: Exam, budget: int) -> str:
    kinds = [k for k in ("presence", "place", "compare") if k in exam.names] or list(exam.ranked)
    least = {s.entry.method: min(ranking.retained(s, full, k)[0] for k in kinds) for s in here}
    method = max(least, key=lambda m: least[m])
    s = next(x for x in here if x.entry.method == method)
    parts = []
    for k in kinds:
        share, low, high = ranking.retained(s, full, k)
        parts.append(f"{k} {percent(share)} ({span(low, high)})")
    text = f"{budget} tokens, percent of the full model's accuracy that {method} keeps (its weakest kind keeps most of all "
    text += f"methods'): {', '.join(parts)}"
    missed = [k for k in kinds if ranking.retained(s, full, k)[0] < ENOUGH]
    if not missed:
        return f"{text}: at least {100 * ENOUGH:.0f} % of each."
    by_kind = []
    for k in missed:
        best = max(here, key=lambda x, k=k: ranking.retained(x, full, k)[0])
        by_kind.append(f"on {k} {best.entry.method} keeps most, {percent(ranking.retained(best, full, k)[0])}")
    text += f"; below {100 * ENOUGH:.0f} %: {', '.join(missed)} ({'; '.join(by_kind)})"
    if "compare" in missed and "place" in kinds:  # its answer needs the digits of two cells
        square = ranking.retained(s, full, "place")[0] ** 2
        text += f". compare reads two cells: two independent readings would keep the square of place's share, {percent(square)}"
    return text + "."


def below_random(found: Sequence[Standing], exam: Exam) -> list[str]:
    """A sentence for each method whose paired difference from random is below 0, with what was measured on the way."""
    lines = []
    for s in found:
        base = next((x for x in found if x.entry.method == "random" and x.entry.budget == s.entry.budget), None)
        if base is None or s is base or s.entry.method == FULL:
            continue
        gap, low, high = ranking.difference(s, base)
        if high < 0:
            lines.append(f"{s.entry.label} ({100 * gap:+.1f} points, {span(low, high, True)}): {why(s, base, exam)}")
    return lines


def why(s: Standing, base: Standing, exam: Exam) -> str:
    worst = min(exam.ranked, key=lambda k: s.share(k) - base.share(k))
    hit = f"it loses most on {worst} ({percent(s.share(worst))} against {percent(base.share(worst))})"
    kept, at_random, mixed = s.average("kept"), base.average("kept"), s.average("mixed")
    reasons = []
    if kept is None:
        return f"{hit}."
    if any(o.merged for o in s.outcomes):
        reasons.append(f"{percent(mixed)} % of the digits' patches are averaged with patches of something else")
    elif s.entry.layers[-1] <= 1:  # what its last layer reads is no matter of scores
        reasons.append("its last layers read no image, and these models are not done with it by then")
    elif kept < at_random:
        reasons.append(f"its scores do not find the digits of these models: {percent(kept)} % of their patches are left, at "
                       f"random {percent(at_random)} %")  # fmt: skip
    else:
        reasons.append(f"it keeps more of the digits ({percent(kept)} % against {percent(at_random)} %)")
        if "yes" in s.names:
            lean = "no" if s.share("no") - base.share("no") < s.share("yes") - base.share("yes") else "yes"
            said = "says yes too often" if lean == "no" else "misses what is there"
            reasons.append(f"but {said} ({lean}: {percent(s.share(lean))} against {percent(base.share(lean))})")
    if len(set(s.entry.layers)) > 1:
        rows = " ".join(map(str, s.entry.layers))
        reasons.append(f"it spends its budget on the first layers (rows by layer: {rows})")
    return f"{'; '.join(reasons)}; {hit}."


# --------------------------------------------------------------------------------------------------------------- pages
def by_kind(o: Outcome, exam: Exam) -> str:
    right, asked = exam.correct(o.right).sum(0), exam.count.sum(0)
    return ", ".join(f"{n} {percent(r / max(a, 1))}" for n, r, a in zip(exam.names, right, asked, strict=True))


def columns(exam: Exam, unfair: tuple[str, ...], slots: bool) -> list[str]:
    more = [n for n in exam.names if n not in (*exam.ranked, *unfair)]
    return ["method", "tokens", "mean", "interval", "against random", "against the best", *exam.ranked, *more,
            *(["digits kept"] if slots else []), "prefill", "decode", "MFLOP", "cache KB",
            *(f"{k}*" for k in unfair)]  # fmt: skip


def cells(row: Mapping[str, Any], names: Sequence[str], exam: Exam, unfair: tuple[str, ...]) -> list[str]:
    gap = lambda x: "" if not x else f"{100 * x[0]:+.1f} ({span(x[1], x[2], True)})"  # noqa: E731
    ratio = lambda x: "-" if x is None else f"{x:.2f}"  # noqa: E731
    kept = "merged" if row["merged"] else percent(row["kept"])
    known = {
        "method": row["method"] + (" †" if row["note"].startswith("behind") else ""), "tokens": f"{row['tokens']:.4g}",
        "mean": percent(row["mean"]), "interval": span(*row["interval"]), "against random": gap(row.get("vs_random")),
        "against the best": gap(row.get("vs_best")), "digits kept": kept, "prefill": ratio(row.get("prefill")),
        "decode": ratio(row.get("decode")), "MFLOP": f"{row['flops'] / 1e6:.1f}" if "flops" in row else "-",
        "cache KB": f"{row['cache'] / 1024:.0f}" if "cache" in row else "-",
        **{n: percent(row["accuracy"][n]) for n in exam.names}, **{f"{n}*": percent(row["accuracy"][n]) for n in unfair},
    }  # fmt: skip
    return [known[n] for n in names]


def markdown(name, found, lines, costs, summary, unfit, exam, facts, unfair, kept) -> str:
    from benchmarks.tokens import device

    slots = any(s.average("kept") is not None for s in found)
    names = columns(exam, unfair, slots)
    full = next((s for s in found if s.entry.method == FULL), None)
    about = f"{facts['about']}. {facts['tokens']} visual tokens, {facts['layers']} layers in the language model; {device()}. "
    about += f"Rotary positions of what is left: {facts['positions']}."
    page = [f"# {facts['title']}", "", about, "", *(f"- {x}" for x in summary)]
    if full and len(full.outcomes) > 1:
        each = zip(facts["checkpoints"], full.outcomes, strict=True)
        page += [f"- The full model of {c}: {by_kind(o, exam)}." for c, o in each]
    page += [f"- {x}." for x in facts.get("left_out", ())]
    page += ["", f"![accuracy]({name}.png)", ""]
    head = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    for budget in sorted({s.entry.budget for s in found if s.entry.method != FULL}, reverse=True):
        page += [f"## {budget} tokens ({100 * budget / facts['tokens']:.0f} %)", "", *head]
        here = ([full] if full else []) + ranking.at_budget(found, budget)
        page += ["| " + " | ".join(cells(lines[s.entry.label], names, exam, unfair)) + " |" for s in here]
        page += [""]
    if kept:
        page += ["## What is kept", "", f"![kept]({name}-kept.png)", ""]
    behind = below_random(found, exam)
    page += ["## Below random", "", *(f"- {x}" for x in behind or ["No method is."]), "", "## Not on the board", ""]
    page += [f"- {u.method}{'' if u.budget is None else f' at {u.budget}'}: {u.reason}." for u in unfit] or ["- Nothing."]
    times = [c["full_prefill"] / c["batch"] for c in costs.values() if c.get("full_prefill")]
    steps = [c["full_decode"] / c["batch"] for c in costs.values() if c.get("full_decode")]
    timed = f" ({1e3 * np.median(times):.2f} ms an image, {1e3 * np.median(steps):.2f} ms a step)" if times else ""
    said = legend(exam, unfair, slots, timed, len(facts["checkpoints"]))
    page += ["", "## How to read it", "", *(f"- {x}" for x in said), ""]
    notes = {f"- {s.entry.method}: {n}." for s in found for n in s.entry.note.split("; ") if n and not n.startswith("behind")}
    page += sorted(notes)
    return "\n".join(page) + "\n"


def legend(exam: Exam, unfair, slots: bool, timed: str, checkpoints: int) -> list[str]:
    drawn = "images alone, since there is one checkpoint"
    if checkpoints > 1:
        drawn = f"checkpoints and images, drawn independently of each other ({checkpoints} checkpoints are few)"
    lines = [
        f"mean: of {', '.join(exam.ranked)} (percent of questions answered right). interval, against random, against the "
        f"best: 95 % of the resamples of {drawn}, the same for all methods: differences are paired.",
        "tokens: visual tokens in a layer of the language model, on average over its layers, at most the budget. Schedules "
        "keep their published shape, scaled by one number that is searched. †: the first layers alone exceed the budget, or "
        "the method is published behind another: what stands in front is in the JSON (note).",
        "prefill: time of all answers of an image, from pixels to words; decode: of one more word; both as shares of the full "
        f"model's{timed}, in turns in the same run on a busy machine (medians). MFLOP: matrix products of an image. cache: "
        "keys, values and positions of an image, a short prompt and its answer.",
    ]
    if "yes" in exam.names:
        lines.append("yes, no: presence questions by their answer; a false yes is a hallucination.")
    if slots:
        lines.append("digits kept: share of the digits' patches that enter the language model, or that its last layer reads "
                     "for methods that cut inside it; merging averages patches.")  # fmt: skip
    if unfair:
        lines.append(f"*{' and '.join(unfair)}: unfair to pruning without retraining, shown and not ranked: the model counts "
                     "by the share of digits among the tokens, and every selection that finds digits changes it.")  # fmt: skip
    return lines
