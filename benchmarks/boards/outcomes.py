"""What was answered right and what it cost, kept on disk entry by entry: a board that was stopped goes on, a new method is
added without asking the others again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.boards.budgets import Entry

FORMAT = 1  # of the files; another number makes all of them anew


@dataclasses.dataclass(frozen=True)
class Exam:
    """Questions in groups that share an image. ``member`` bool [K, S, Q]: which of the Q questions of image s count for
    column k; ``names`` of the columns; ``ranked``: those whose mean decides."""

    names: tuple[str, ...]
    ranked: tuple[str, ...]
    member: np.ndarray

    @property
    def count(self) -> np.ndarray:
        """int [S, K]: questions of each column."""
        return self.member.sum(-1).T

    def correct(self, right: np.ndarray) -> np.ndarray:
        """int [S, K] of right bool [S, Q]."""
        return (self.member & right).sum(-1).T


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One entry on one checkpoint. right bool [S, Q]; kept: share of the digits' patches that are left (None where it is
    not known); mixed: share of them averaged with something else; merged: whether tokens were averaged at all; live: visual
    rows that enter the language model and that its last layer reads, mean; slot int [images, N]: where the patches of the
    first images went, -1 nowhere."""

    right: np.ndarray
    kept: float | None = None
    mixed: float | None = None
    merged: bool = False
    live: tuple[float, float] = (0.0, 0.0)
    slot: np.ndarray | None = None

    def as_json(self) -> dict[str, Any]:
        bits = ["".join("01"[int(x)] for x in row) for row in self.right]
        slot = None if self.slot is None else self.slot.tolist()
        return {**dataclasses.asdict(self), "right": bits, "live": list(self.live), "slot": slot}

    @staticmethod
    def of_json(found: dict[str, Any]) -> Outcome:
        right = np.array([[c == "1" for c in row] for row in found["right"]])
        slot = None if found["slot"] is None else np.array(found["slot"])
        return Outcome(right, found["kept"], found["mixed"], found["merged"], tuple(found["live"]), slot)


class Store:
    """Files of one folder. A key is whatever decides a result, as values of JSON; a file is found by its key alone."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: dict[str, Any]) -> Path:
        text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
        name = "-".join(str(key[k]) for k in ("what", "method", "budget", "checkpoint") if k in key)
        clean = "".join(c if c.isalnum() or c in "-_" else "." for c in name)
        return self.folder / f"{clean}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"

    def load(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """What was saved under the key; None where nothing was, or where the file is damaged."""
        try:
            return json.loads(self.path(key).read_text())["found"]
        except (OSError, json.JSONDecodeError, KeyError):
            return None

    def save(self, key: dict[str, Any], found: dict[str, Any]) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{os.getpid()}.part")
        whole.write_text(json.dumps({"key": key, "found": found}))
        whole.replace(path)  # a file is there whole or not at all


def entry_key(e: Entry) -> dict[str, Any]:
    """What decides an entry's results: its settings and the text of the files its records are made in."""
    files = sorted({sys.modules[type(record).__module__].__file__ for _, record in e.reduce})
    source = hashlib.sha256(b"".join(Path(f).read_bytes() for f in files)).hexdigest()[:12]
    return {"method": e.method, "budget": e.budget, "reduce": repr(e.reduce), "source": source}
