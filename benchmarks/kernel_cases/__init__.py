"""What ``benchmarks.kernel_report`` compiles: one module per operation of ``pallas_kernels``, found by its file name.

A module has ``case(sizes, sharding, implementation) -> (floats, ints, programs)``: the differentiable operands and the
others as dicts of ShapeDtypeStructs, and ``{"forward": f(floats, ints), ...}``. With ``DIFFERENTIABLE = True`` the
report adds "backward", the gradient of ``floats`` from all outputs of "forward". The operation's kernels bear its name:
"flash_forward" is a kernel of flash.

One whose sizes can be measured also has ``tuning(sizes, dtype, implementation) -> list of Tunable``.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The size of a call; a case reads what it has a use for."""

    tokens: int = 131072
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block: int = 128
    """Keys of a unit and queries of a tile."""
    entries: int = 64
    """Units in a list."""
    lists: Literal["shared", "kv heads", "query heads"] = "kv heads"
    decay: Literal["none", "head", "token", "channel"] = "token"
    """What a recurrence decays by."""


class Tunable(NamedTuple):
    """Sizes to choose: the body looks them up under ``shape`` and ``dtype``; ``program(*args)`` is what they speed up."""

    shape: str
    dtype: str
    candidates: tuple[dict[str, int], ...]
    program: Callable
    args: tuple


def names() -> tuple[str, ...]:
    """The operations that have a case."""
    return tuple(sorted(x.name for x in pkgutil.iter_modules(__path__)))


def load(name: str) -> ModuleType:
    if name not in names():
        raise ValueError(f"ops: expected some of {', '.join(names())}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
