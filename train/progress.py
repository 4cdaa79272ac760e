"""What a run shows: a progress line, metrics as JSON lines, and a picture of the loss."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Show:
    """A live bar with loss, rate and time left on a terminal; elsewhere one line per report."""

    def __init__(self, title: str, steps: int, start: int, *, unit: str = "tokens", quiet: bool = False):
        self.title, self.steps, self.start, self.unit, self.quiet = title, steps, start, unit, quiet
        self.began = time.perf_counter()
        self.last = (start, self.began)
        self.bar = None
        if not quiet and sys.stdout.isatty():
            columns = TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[text]}")
            self.bar = Progress(*columns, console=Console(file=sys.stdout))
            self.task = self.bar.add_task(title, total=steps, completed=start, text="compiling")
            self.bar.start()

    def step(self, done: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=done)

    def report(self, done: int, values: Mapping[str, float], amount: int) -> float:
        """Show `values` after `done` steps of `amount` units each; returns units per second since the last
        call."""
        now = time.perf_counter()
        before, then = self.last
        self.last = (done, now)
        pace = (now - then) / max(done - before, 1)
        rate = amount / max(pace, 1e-9)
        figure = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        # What a narrow terminal must not cut comes first.
        head = f"{done}/{self.steps}  loss {values['loss']:.4g}  {figure} {self.unit}/s"
        rest = "  ".join(f"{name} {x:.4g}" for name, x in values.items() if name not in ("loss", "weight"))
        text = f"{head}  left {clock(pace * (self.steps - done))}  {rest}"
        if self.bar:
            self.bar.update(self.task, completed=done, text=text)
        elif not self.quiet:
            print(f"{self.title}  {text}", flush=True)
        return rate

    def seconds(self) -> float:
        """Since the run began or was resumed."""
        return time.perf_counter() - self.began

    def note(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text)
        elif not self.quiet:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


class Metrics:
    """Rows of numbers in a file of JSON lines, one per report, in order of step."""

    def __init__(self, path: str | Path | None, *, after: int = 0):
        """Continue the file behind step `after`: rows of steps that will be made again are dropped."""
        self.path = None if path is None else Path(path)
        self.file = None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.path) if row["step"] <= after] if self.path.exists() else []
        new = self.path.with_name(self.path.name + ".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(new, self.path)
        self.file = self.path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.file:
            self.file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a kill cut short is left out."""
    lines = Path(path).read_text().splitlines()
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) - 1:
                break
            raise ValueError(
                f"metrics file {path}, line {number + 1}: expected a JSON object with a step, got {line[:60]!r}"
            ) from error
        rows.append(row)
    return rows


def plot_curve(rows: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "") -> bool:
    """Draw every `...loss` of the rows over steps as a PNG; False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = dict.fromkeys(name for row in rows for name in row if name.endswith("loss"))
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    if names:
        axes.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    return True
