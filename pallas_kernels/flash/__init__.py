"""Block-list attention: each tile of queries reads a list of key units; masks are evaluated per tile pair.

``flash(operands, options)`` takes plain arrays and knows no method. ``operands`` is a dict:

  q [B, N, H, D], k [B, M, G, D], v [B, M, G, Dv]                          floats, H % G == 0
  index int32 [B|1, Hs, Nq, K], count int32 [B|1, Hs, Nq]                  key units per query tile, Hs in {1, G, H}
  k_valid bool [B|1, M] or [B|1, G, M]
  q_fields, k_fields {name: int32 [B|1, N|M] or [B|1, G, N|M]}             what the mask and score_mod read
  optional: bounds int32 [B|1, Hs, Nq, K, 2] (live range inside a unit), log_weight [B|1, Hs, Nq, K] (per unit),
  key_bias [B|1, M, 1|G|H], bias [B|1, 1|H, N, M], row {name: [B|1, N, 1|H]}, key {name: [B|1, M, 1|G|H]}

Returns ``(out [B, N, H, Dv] in v's dtype, lse float32 [B, N, H])``; rows that see nothing give 0 and -inf. With
``normalizer="none"`` the scores weigh the values directly and lse is 0. Gradients flow to every float operand and from
both outputs. A unit that stands in a list twice counts once, where it stands first; indices outside the keys do not count.
A NaN or infinity in a key or its value makes the rows that see it NaN and reaches no others; invalid keys may hold anything.

Implementations: "reference" (the full table), "xla" (everything, every backend), "tpu" and "gpu" (Pallas kernels for
float32 and bfloat16, on GPU float16 too; heads up to 256, units and tiles up to 1024, bias with units of 8 keys or more,
and the operations in mask and score_mod that kernels lower). Pairs of tiles whose keys are all valid and, by the intervals
of the fields, surely all seen skip the mask. "hopper" (Mosaic GPU kernels for an H100 or H200): bfloat16 and float16, heads
up to 128, without floats per row or key, and no masks under CUDA 12.8 and 12.9, whose compiler breaks them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import jax

from pallas_kernels import _mesh
from pallas_kernels._dispatch import alone, choose, kernels, on_cpu
from pallas_kernels._mesh import Dims
from pallas_kernels.flash import cpu, lists, reference, xla


def _by_core(operands: dict, options: Options):
    """On CPU: the call as every device makes it that walks its heads one by one, alone or where a mesh can cut the call
    over all of its devices. None elsewhere."""
    if not (on_cpu() and cpu.takes(operands, options)):
        return None
    if alone():
        return cpu.flash
    sizes, names = _mesh.free_axes(), dims(operands, options)
    cut = {axis for axes in _mesh.cuts(operands, names, sizes).values() for axis in axes}
    if sizes and all(n == 1 or axis in cut for axis, n in sizes.items()):
        return _mesh.spread(cpu.flash, names)
    return None


def _xla(operands: dict, options: Options):
    """Head by head on the cores of a CPU. Elsewhere heads stay an array axis, which XLA cuts as it likes."""
    return (_by_core(operands, options) or xla.flash)(operands, options)


def walks(operands: dict, options: Options) -> bool:
    """Whether a few queries with one list per head are faster here than by ``pallas_kernels.gather``: on the cores of a CPU,
    where whole units are listed."""
    return options.unit >= UNIT and _by_core(operands, options) is not None


UNIT = 16  # keys of a unit from which on a core reads units one by one as fast as all heads together
# Bodies that a call without a name may use. The accelerator bodies compile for their targets and agree with the reference
# in interpret mode; each joins once its values and its speed have been measured on a device.
MEASURED = frozenset({"xla"})
IMPLEMENTATIONS = {"reference": reference.flash, "xla": _xla} | kernels(__name__, "flash", ("tpu", "gpu", "hopper"))


@dataclasses.dataclass(frozen=True)
class Options:
    """Static side of a call: mask and score_mod are value-hashed records, or None.

    ``unit`` keys per entry of the list, ``tile`` queries per row of it, ``step`` entries read at a time, ``distinct``: no
    list holds a unit twice."""

    mask: Any = None
    score_mod: Any = None
    normalizer: str = "softmax"
    scale: float = 1.0
    unit: int = 1
    tile: int = 1
    step: int = 1
    distinct: bool = False


def dims(operands: dict, options: Options) -> Dims:
    """What the dimensions are called, for a mesh: queries are cut between tiles, keys not at all."""
    n, tiles = operands["q"].shape[1], operands["index"].shape[2]
    length = "length" if n == tiles * options.tile else None
    rows, keys, lists = ("batch", length, "heads"), ("batch", None, "heads"), ("batch", "heads", length)

    def field(long):  # [b, N|M] or [b, G, N|M]
        return lambda x: ("batch", long) if x.ndim == 2 else ("batch", "heads", long)

    names = {
        "q": (*rows, None), "k": (*keys, None), "v": (*keys, None), "index": (*lists, None), "count": lists,
        "bounds": (*lists, None, None), "log_weight": (*lists, None), "key_bias": keys, "bias": (*lists, None),
    }  # fmt: skip
    sides = {"row": lambda x: rows, "key": lambda x: keys, "q_fields": field(length), "k_fields": field(None)}
    sides["k_valid"] = field(None)
    found = {x: jax.tree.map(sides[x], a) if x in sides else names[x] for x, a in operands.items() if a is not None}
    return Dims(found, ((*rows, None), rows))


def flash(operands: dict, options: Options, implementation: str | None = None, mesh=None):
    """See the module's docstring. ``implementation=None`` picks the fast path that works here; a named one raises a
    ValueError that says what it does not support. ``mesh``: devices to cut a kernel's call over, None for those of
    ``jax.set_mesh``."""
    operands = lists.clean({x: a for x, a in operands.items() if a is not None}, options)

    def refusal(name: str) -> str | None:
        return importlib.import_module(f"{__name__}.{name}").BODY.refusal(operands, options)

    names = functools.partial(dims, operands, options)
    return choose(IMPLEMENTATIONS, MEASURED, implementation, refusal, names, mesh)(operands, options)
