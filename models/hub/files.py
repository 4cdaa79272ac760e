"""Checkpoint files: config.json, safetensors shards and their index. Tensors are memory maps until they are asked for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
          "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip
NAMES = {np.dtype(v): k for k, v in DTYPES.items()}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class Stored(NamedTuple):
    """A tensor in a file: nothing is read before ``array``."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def array(self) -> np.ndarray:
        """A read-only view of the file's pages (not anonymous memory)."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.start, self.shape)


def read_config(path: str | Path) -> dict:
    """config.json of a local checkpoint directory."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"path: expected a local directory with config.json and *.safetensors, got {str(path)!r}")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"path: expected config.json in {folder}, it has {_listing(folder)}")
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected an object, got {type(found).__name__}")
    return found


def _listing(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:20]) or "nothing"


def read_headers(path: str | Path) -> dict[str, Stored]:
    """{tensor name: Stored} of a checkpoint directory, from the shards' headers alone.

    Raises ValueError for a missing shard, a truncated or damaged file, a tensor that is not where the index says, and for
    directories that hold nothing but pickles.
    """
    folder = Path(path)
    index = folder / INDEX
    if index.is_file():
        try:
            where = dict(json.loads(index.read_text())["weight_map"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{index}: expected a weight_map, got {error!r}") from None
        names = sorted(set(where.values()))
        if outside := [n for n in names if Path(n).name != n]:
            raise ValueError(f"{index}: expected file names of this directory, got {outside}")
        if missing := [n for n in names if not (folder / n).is_file()]:
            raise ValueError(f"{index}: expected {len(names)} shards, missing {missing}")
    else:
        where, names = None, sorted(p.name for p in folder.glob("*.safetensors"))
        if len(names) > 1 and SINGLE not in names:
            raise ValueError(f"path: expected {INDEX} beside {len(names)} shards in {folder}")
        names = [SINGLE] if SINGLE in names else names
    if not names:
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ValueError(f"path: expected *.safetensors, got {pickles}: pickled weights run code when read and are "
                             "refused; convert them to safetensors")  # fmt: skip
        raise ValueError(f"path: expected *.safetensors in {folder}, it has {_listing(folder)}")
    found: dict[str, Stored] = {}
    for name in names:
        here = read_header(folder / name)
        if twice := sorted(found.keys() & here.keys()):
            raise ValueError(f"{folder / name}: tensors that another shard has as well: {twice[:10]}")
        found |= here
    if where is not None and (lost := sorted(k for k, f in where.items() if k not in found or found[k].file.name != f)):
        raise ValueError(f"{index}: tensors not in the shard it names: {lost[:10]}")
    return found


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, checked against its size."""
    size = file.stat().st_size
    with file.open("rb") as f:
        lead = f.read(8)
        length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else size
        if length > size - 8:
            raise ValueError(f"{file}: truncated: a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(f.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not a safetensors file: {error}") from None
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError(f"{file}: not a safetensors file: its header is no table of tensors")
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{file}: {name} has dtype {entry['dtype']}, expected one of {sorted(DTYPES)}")
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
        start, stop = (8 + length + int(n) for n in entry["data_offsets"])
        if stop > size:
            raise ValueError(f"{file}: truncated: {name} ends at byte {stop} of {size}")
        if start < 8 + length or stop - start != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
            raise ValueError(f"{file}: {name} {dtype}{list(shape)} does not fill its {stop - start} bytes")
        found[name] = Stored(file, dtype, shape, start)
    return found


class Planned(NamedTuple):
    """A tensor to be written: its value is made when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write(folder: Path, tensors: Iterable[Planned], shard_bytes: int) -> None:
    """Tensors as one file, or as shards of at most ``shard_bytes`` with an index; one tensor is in memory at a time."""
    shards: list[list[Planned]] = [[]]
    for tensor in sorted(tensors, key=lambda t: t.name):
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    where = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        where |= {t.name: name for t in shard}
    total = sum(t.nbytes for shard in shards for t in shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True))


def write_file(file: Path, tensors: list[Planned]) -> None:
    """One safetensors file."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            f.write(np.ascontiguousarray(t.make()).tobytes())
