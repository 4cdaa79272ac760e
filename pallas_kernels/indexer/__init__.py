"""Which key units each query reads: scores fused with top-k, so that no table of queries by units is ever stored.

``select(operands, options)`` takes plain arrays and knows no method. ``operands`` is a dict:

  q [B, N, H, D], k [B, U, G, D]                floats, H % G == 0: a query (or a tile's pooled query), a key per unit
  optional: weight float32 [B, N, H]
  q_valid bool [B|1, N] or [B|1, G, N], k_valid bool [B|1, U] or [B|1, G, U]
  q_low, q_high, k_low, k_high {name: int32, shaped as the valid of their side}: the range of each field the mask reads

The score of unit u for query i in list l is, over the heads h of the list,

  s(i, u) = sum_h | max_h  weight(i, h) gate(scale q(i, h) . k(u, kv head of h))       gate: identity or ReLU

A list is a query head (``heads="each"``, L = H) or the heads of a kv head (``"sum"``, ``"max"``, L = G). ReLU and weights
with one kv head is the lightning indexer of DeepSeek sparse attention (arXiv:2512.02556). A unit is eligible where
both valids hold and ``mask.interval`` says that some pair of the two ranges may be visible; NaN scores are never chosen.

Returns ``(index int32 [B, L, N, K], count int32 [B, L, N], values float32 [B, L, N, K])``, K = min(options.k, U): the K
eligible units with the largest scores, ties to the lowest index, in ascending order of index; behind ``count`` index is 0
and values are -inf. Gradients flow from the values to q, k and weight (which units are chosen has none), by gathering the
chosen keys of a few queries at a time.

Implementations: "reference" (the full table), "xla" (chunks of units merged into a running top-k), "tpu" (scores of a few
queries stay in VMEM: exact threshold by counting, then compaction by products with one-hot matrices) and "gpu"
(Triton: a buffer of candidates per query that is cut back to K when it is full).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._dispatch import choose, kernels
from pallas_kernels._mesh import Dims
from pallas_kernels.indexer import reference, xla
from pallas_kernels.indexer.top_k import top_k

# Bodies that a call without a name may use; an accelerator's joins once it has been measured on a device.
MEASURED = frozenset({"xla"})
IMPLEMENTATIONS = {"reference": reference.select, "xla": xla.select} | kernels(__name__, "select")


@dataclasses.dataclass(frozen=True)
class Options:
    """Static side of a call. ``k``: units per list, at least 1. ``mask``: a value-hashed record with ``interval``, or
    None. ``heads``: "each" | "sum" | "max". ``gate``: None | "relu". ``scale`` multiplies the products."""

    k: int
    mask: Any = None
    heads: str = "each"
    gate: str | None = None
    scale: float = 1.0


def dims(operands: dict, options: Options) -> Dims:
    """What the dimensions are called, for a mesh: queries and lists are cut, units are not."""
    one = options.heads != "each" and operands["k"].shape[2] == 1  # then every query head belongs to the same list
    heads = None if one else "heads"
    names = {"q": ("batch", "length", heads, None), "k": ("batch", None, "heads", None), "weight": ("batch", "length", heads)}

    def field(long):  # [b, N|U] or [b, G, N|U]
        return lambda x: ("batch", long) if x.ndim == 2 else ("batch", "heads", long)

    found = {
        x: names[x] if x in names else jax.tree.map(field("length" if x.startswith("q") else None), a)
        for x, a in operands.items()
    }
    lists = ("batch", heads, "length")
    return Dims(found, ((*lists, None), lists, (*lists, None)))


def select(operands: dict, options: Options, implementation: str | None = None, mesh=None):
    """See the module's docstring. ``implementation=None`` picks the fast path that works here. ``mesh``: devices to cut a
    kernel's call over, None for those of ``jax.set_mesh``."""
    operands = {x: a for x, a in operands.items() if a is not None}
    _check(operands, options)

    def refusal(name: str) -> str | None:
        from pallas_kernels.indexer import body

        return body.unsupported(operands, options, name)

    names = functools.partial(dims, operands, options)
    return choose(IMPLEMENTATIONS, MEASURED, implementation, refusal, names, mesh)(operands, options)


def _check(o: dict, opt: Options) -> None:
    q, k = o["q"].shape, o["k"].shape
    if len(q) != 4 or len(k) != 4 or q[0] != k[0] or q[3] != k[3] or q[2] % k[2]:
        raise ValueError(f"k: expected [B, units, kv heads, D] beside q {q} of as many batch rows and channels, got {k}")
    if o.get("weight") is not None and o["weight"].shape != q[:3]:
        raise ValueError(f"weight: expected the shape {q[:3]} of q's heads, got {o['weight'].shape}")
    for name, value, known in (("heads", opt.heads, ("each", "sum", "max")), ("gate", opt.gate, (None, "relu"))):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    if opt.k < 1:
        raise ValueError(f"k: expected at least 1 unit per list, got {opt.k}")
    for side, n in (("q", q[1]), ("k", k[1])):
        valid = o[f"{side}_valid"]
        if valid.shape[-1] != n or valid.dtype != jnp.bool_:
            raise ValueError(f"{side}_valid: expected bool [..., {n}], got {valid.dtype} {valid.shape}")


__all__ = ["IMPLEMENTATIONS", "MEASURED", "Options", "select", "top_k"]
