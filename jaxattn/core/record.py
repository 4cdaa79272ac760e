"""How records are made: ``@data`` pytrees, ``@contract`` value-hashed records, operands and ``split``.

A ``@contract`` record compares and hashes by value, so rebuilding a model from equal arguments reuses every compiled
function. Fields declared with :func:`operand` are what may change without compiling: :func:`split` moves them out.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import field
from typing import Any

import jax
import numpy as np


def static(default: Any = dataclasses.MISSING) -> Any:
    """A static (hashed, not traced) field of a ``@data`` record."""
    return field(default=default, metadata={"static": True})


def data(cls):
    """Class decorator: a frozen dataclass that is a pytree; fields made with :func:`static` are its treedef."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    meta = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]
    jax.tree_util.register_dataclass(cls, [n for n in names if n not in meta], meta)
    cls.replace = lambda self, **changes: dataclasses.replace(self, **changes)
    return cls



class _Operand:
    """Stands in a program for a value that lives in its params."""

    def __repr__(self):
        return "<operand>"

    def __eq__(self, other):
        return isinstance(other, _Operand)

    def __hash__(self):
        return 7919


OPERAND = _Operand()


@dataclasses.dataclass(frozen=True)
class Const:
    """A numpy array compared and hashed by value: how artifacts and tables sit in a record."""

    blob: bytes
    shape: tuple[int, ...]
    dtype: str

    @staticmethod
    def of(x) -> Const:
        x = np.asarray(x)
        return Const(x.tobytes(), x.shape, x.dtype.str)

    def numpy(self) -> np.ndarray:
        return np.frombuffer(self.blob, self.dtype).reshape(self.shape)

    def __repr__(self):
        return f"Const({self.dtype}{list(self.shape)})"


BUCKETS = tuple([1, 2, 4, 8, 12] + list(range(16, 128, 8)) + list(range(128, 512, 32)) + list(range(512, 4096, 256)))


def bucket(n: int) -> int:
    """The capacity that serves a budget of ``n``: equal for budgets that share compiled programs."""
    for size in BUCKETS:
        if n <= size:
            return size
    return -(-n // 1024) * 1024


class Capacity(int):
    """What ``split`` leaves of a budget: a static upper bound, told apart from a budget that was asked for."""


def operand(kind: str = "scalar", default: Any = dataclasses.MISSING) -> Any:
    """A field whose value is an array at run time. Kinds and what ``split`` makes of a value:

    scalar: float32 [];  int: int32 [];  array: the array;
    layers: tuple of layer numbers (negative from the end) or None for all -> bool [L];
    heads: None, an [L, H] or [H] table, or a tuple of head numbers -> float32 [L, H];
    budget: n -> int32 [] beside the static capacity ``bucket(n)``.
    """
    if kind not in ("scalar", "int", "array", "layers", "heads", "budget"):
        raise ValueError(f"kind: expected scalar, int, array, layers, heads or budget, got {kind!r}")
    return field(default=default, metadata={"operand": kind})


def _normal(value):
    """Field values as plain, hashable values: equal arguments make equal records."""
    if isinstance(value, (list, tuple)):
        return tuple(_normal(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _normal(v)) for k, v in value.items()))
    if isinstance(value, (np.ndarray, jax.Array)) and np.ndim(value):
        return Const.of(value)
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        value = value.item()
    if isinstance(value, float):
        return float(np.float32(value))
    return value


def contract(cls):
    """Class decorator: a frozen record of values, with behaviour as methods. Never a pytree.

    Lists become tuples, arrays become :class:`Const`, floats are rounded to float32, so records made from equal
    arguments are equal and hash equal. An optional ``check(self)`` method validates the fields.
    """
    def post(self):
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _normal(getattr(self, f.name)))
        if hasattr(self, "check"):
            self.check()

    cls.__post_init__ = post
    cls = dataclasses.dataclass(frozen=True)(cls)
    cls.__contract__ = True
    return cls


def is_contract(x: Any) -> bool:
    return getattr(type(x), "__contract__", False)


@contract
class Spec:
    """Static sizes of a stack of layers: what ``init`` methods need to make parameters and states."""

    layers: int = 1
    dim: int = 0
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 0
    value_dim: int = 0
    batch: int = 1
    length: int = 0  # rows a cache must be able to hold; of a transform, those that enter it, 0: not known
    features: int = 0  # width of the rows that a projector reads, where these are behind it
    dtype: str = "float32"

    def replace(self, **changes) -> Spec:
        return dataclasses.replace(self, **changes)


def _as_array(kind: str, value, spec: Spec | None):
    if isinstance(value, Const):
        value = value.numpy()
    if kind == "scalar":
        return OPERAND, np.float32(value)
    if kind == "int":
        return OPERAND, np.int32(value)
    if kind == "array":
        return OPERAND, np.asarray(value)
    if kind == "budget":
        return Capacity(bucket(value)), np.int32(value)
    layers, heads = (spec.layers, spec.heads) if spec is not None else (1, 1)
    if kind == "layers":
        on = np.zeros(layers, bool)
        on[np.arange(layers) if value is None else _indices(value, layers, "layers")] = True
        return OPERAND, on
    table = np.ones(heads, np.float32)
    if value is not None:
        table = np.asarray(value)
        if table.dtype.kind in "iu" and table.ndim == 1:  # a tuple of head numbers, not a table
            table = np.zeros(heads, np.float32)
            table[_indices(value, heads, "heads")] = 1.0
    try:
        return OPERAND, np.broadcast_to(table.astype(np.float32), (layers, heads)).copy()
    except ValueError:
        raise ValueError(f"heads: expected a table that broadcasts to {(layers, heads)}, got {table.shape}") from None


def _indices(value, n: int, name: str):
    for i in value:
        if not -n <= i < n:
            raise ValueError(f"{name}: expected numbers in [{-n}, {n}), got {i}")
    return [i % n for i in value]


def split(record, spec: Spec | None = None) -> tuple[Any, Any]:
    """Separate a record into ``(program, params)``.

    ``program`` is the record with its operands taken out (hashable: a jit static argument); ``params`` a dict of
    arrays under the operands' field names, nested like the record (tuples of records give dicts "0", "1", ...).
    """
    if isinstance(record, tuple):
        pairs = [split(r, spec) for r in record]
        return tuple(p for p, _ in pairs), {str(i): a for i, (_, a) in enumerate(pairs) if a}
    if not is_contract(record):
        return record, {}
    program = object.__new__(type(record))
    params = {}
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        kind = f.metadata.get("operand")
        if kind is None:
            value, sub = split(value, spec)
            if sub:
                params[f.name] = sub
        elif not (value is None and kind not in ("layers", "heads")):
            value, params[f.name] = _as_array(kind, value, spec)
        object.__setattr__(program, f.name, value)
    return program, params


def settle(program, **fields):
    """A record or program with other static fields, which are not checked again: for what only a forward pass knows."""
    new = copy.copy(program)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new


def init_params(record, spec: Spec, key=None) -> dict:
    """Operands of a record and, where it declares ``init(key, spec)``, freshly initialised trainable arrays."""
    _, params = split(record, spec)
    if hasattr(record, "init") and hasattr(record, "apply"):
        params = {**params, **record.init(jax.random.key(0) if key is None else key, spec)}
    return params


def expect(name: str, got: Any, expected: str, ok: bool) -> None:
    """Raise ValueError naming the argument, what was expected and what came, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")
