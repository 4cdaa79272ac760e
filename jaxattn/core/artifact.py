"""Artifacts: what a search or a calibration found, as one file that a factory takes.

An artifact is a .npz of plain arrays beside one entry, ``header``, a JSON object: the conversion that made it, its arguments,
the model and the data. Nothing in it is code; a file of another method or a damaged one is a ValueError that names the file.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np

from jaxattn.core.record import expect

HEADER = "header"


def save(path: str | Path, arrays: dict, **header) -> Path:
    """Write named arrays (numbers and lists become arrays) and a header of JSON values; returns the path, which ends in .npz.

    Raises ValueError for an entry that is no array of numbers or booleans and for one called "header"."""
    path = Path(path)
    path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
    found = {name: np.asarray(x) for name, x in arrays.items()}
    for name, x in found.items():
        expect(f"arrays[{name!r}]", x.dtype, "numbers or booleans under another name than 'header'",
               name != HEADER and x.dtype.kind in "biuf")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **{HEADER: np.array(json.dumps(header))}, **found)
    return path


def load(path: str | Path, maker: str | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, header) of a file; ``maker``: the conversion that must have made it."""
    path = Path(path)
    expect("artifact", path, "a file that exists", path.is_file())
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop(HEADER)))
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"artifact: expected an .npz with a header, got {path}: {error}") from None
    made = header.get("maker")
    expect("artifact", f"{path}, made by {made}", f"one made by {maker}", maker is None or made == maker)
    return arrays, header


__all__ = ["load", "save"]
