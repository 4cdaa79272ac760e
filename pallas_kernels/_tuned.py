"""Sizes that were measured on a chip, kept as data: ``tuned/<chip>.json``, written by ``python -m benchmarks tune``.

A body asks ``sizes(op, implementation, shape, dtype, default)`` while it is traced and gets the default's numbers where
nothing was measured for this chip. ``shape`` is a class of shapes, in words the body chose ("forward d128").
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

DIRECTORY = Path(__file__).parent / "tuned"
KEYS = ("op", "implementation", "shape", "dtype")
_trial: dict[tuple[str, ...], dict[str, int]] = {}


def chip() -> str:
    """The first device's kind as a file name: "cpu", "tpu-v5-lite", "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def width(*head_dims: int) -> str:
    """The shape class of head sizes: "d128" from 65 to 128."""
    return f"d{max(16, 1 << (max(head_dims) - 1).bit_length())}"


@functools.cache
def _table(path: Path, changed: float) -> dict[tuple[str, ...], dict[str, int]]:
    return {tuple(entry[x] for x in KEYS): entry["sizes"] for entry in read(path)}


def read(path: Path) -> list[dict]:
    """The entries of a file: the four ``KEYS``, "sizes" {name: int}, and how they were found.

    Raises ValueError that names the file if it holds anything else."""
    try:
        entries = json.loads(path.read_text())["entries"]
        for entry in entries:
            sizes = entry["sizes"]
            if not all(isinstance(entry[x], str) for x in KEYS) or not all(isinstance(x, int) for x in sizes.values()):
                raise KeyError
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        expected = f"{{'entries': [{{{', '.join(KEYS)}, sizes}}]}} with whole numbers as sizes"
        raise ValueError(f"{path}: expected {expected}, got something else") from error
    return entries


def sizes(op: str, implementation: str, shape: str, dtype, default: Mapping[str, int]) -> dict[str, int]:
    """``default`` with what was measured on this chip in place of its numbers."""
    key = (op, implementation, shape, jax.numpy.dtype(dtype).name)
    if key in _trial:
        return {**default, **_trial[key]}
    path = DIRECTORY / f"{chip()}.json"
    if not path.exists():
        return dict(default)
    found = _table(path, path.stat().st_mtime).get(key, {})
    return {name: found.get(name, value) for name, value in default.items()}


@contextlib.contextmanager
def trying(op: str, implementation: str, shape: str, dtype, candidate: Mapping[str, int]) -> Iterator[None]:
    """Programs traced inside use ``candidate``. Trace a new function for each: jit keeps what it traced before."""
    key = (op, implementation, shape, jax.numpy.dtype(dtype).name)
    _trial[key] = dict(candidate)
    try:
        yield
    finally:
        del _trial[key]


def write(entry: Mapping, path: Path | None = None) -> Path:
    """Put an entry in this chip's file, in place of the one with its ``KEYS``."""
    path = DIRECTORY / f"{chip()}.json" if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [e for e in (read(path) if path.exists() else []) if any(e[x] != entry[x] for x in KEYS)]
    entries = sorted([*kept, dict(entry)], key=lambda e: [e[x] for x in KEYS])
    path.write_text(json.dumps({"entries": entries}, indent=1) + "\n")
    return path
