"""Trained methods on the board: runs of `python -m train vlm --init CHECKPOINT --tokens METHOD`, whose parameters answer in
place of the checkpoint's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.boards import budgets
from benchmarks.boards.budgets import Entry, Unfit
from jaxattn.core.types import expect
from train import methods


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained method. method: as it was trained, "name:arg=value"; of: the folder of the checkpoint it started from;
    identity: what tells it from other runs; params: all of the model's, and the method's."""

    method: str
    of: Path
    identity: str
    params: Any

    @property
    def name(self) -> str:
        """On the board."""
        return f"{budgets.name_of(self.method)} (trained)"


def answering(params: Any, record: dict) -> tuple[str, Any]:
    """(what identifies a finished training, the parameters that answer), of what a checkpoint holds."""
    identity = f"step {record['step']} of {sorted((record.get('config') or {}).items())}"
    return identity, {name: tree for name, tree in params.items() if name != "aux"}


def read(folder: Path) -> Run:
    """The run in ``folder``."""
    params, record = methods.load(folder)
    config = record.get("config") or {}
    expect("trained", f"{folder}: a run of the task {config.get('task')}", "a run of vlm", config.get("task") == "vlm")
    ok = bool(config.get("tokens")) and bool(config.get("init"))
    expect("trained", f"{folder}: a run with --tokens {config.get('tokens')} --init {config.get('init')}", "both", ok)
    return Run(config["tokens"], Path(config["init"]), *answering(params, record))


def plan(runs: Sequence[Run], counts: Sequence[int], model, *, positions: str | None = None) -> tuple[list[Entry], list[Unfit]]:
    """(entries of every trained method at every budget, what does not fit)."""
    entries, unfit = [], []
    for method in dict.fromkeys(run.method for run in runs):
        run = next(r for r in runs if r.method == method)
        for budget in counts:
            found = budgets.entry(method, budget, model, positions=positions, trained=True)
            found = dataclasses.replace(found, method=run.name)
            (entries if isinstance(found, Entry) else unfit).append(found)
    return entries, list(dict.fromkeys(unfit))


def by_checkpoint(runs: Sequence[Run], folders: dict[str, Path]) -> dict[tuple[str, str], Run]:
    """{(name on the board, checkpoint): run} of checkpoints in ``folders``. Raises ValueError for two of a pair."""
    found: dict[tuple[str, str], Run] = {}
    for run in runs:
        for name, folder in folders.items():
            if run.of.resolve() == folder.resolve():
                once = (run.name, name) not in found
                expect("trained", f"two runs of {run.name} from {name}", "one for each checkpoint", once)
                found[run.name, name] = run
    return found
