"""Attention over lists of tokens, pages or blocks: decoding, paged caches, token-level top-k.

``gather(operands, options)`` takes plain arrays and knows no method. ``operands`` is a dict:

  q [B, N, H, D], k [B|1, M, G, D], v [B|1, M, G, Dv]       floats, H % G == 0; a leading 1 is a pool that all rows share
  index int32 [B|1, Hs, 1|N, K], count int32 [B|1, Hs, 1|N]  units of ``unit`` keys, Hs in {1, G, H}; one list for all
      queries (decoding, speculative rows) or one per query (token-level top-k); both absent: every key
  optional: bounds int32 [B|1, Hs, 1|N, K, 2] (live range inside a unit), log_weight [B|1, Hs, 1|N, K] (per unit),
  key_bias [B|1, M, 1|G|H], k_valid bool [B|1, M] or [B|1, G, M], q_fields, k_fields {name: int32 [B|1, N|M] or
  [B|1, G, N|M]} (what the mask reads)
  optional, rotary on the fly: freqs float32 [R] (the first 2 R channels turn), k_rope number [B|1, M] or [B|1, G, M],
  pos number [B|1, Hs, 1|N, K]

A paged cache is a pool: k, v [1, pages * page, G, D] with ``unit`` = page, the page table as ``index`` and the last
page's live range in ``bounds``. A key is turned by ``freqs`` times the sum of ``k_rope`` of its slot and ``pos`` of its
entry plus its offset in the unit, whichever are given: unrotated keys at k_rope, retrieved units at pos, and keys that
are already rotated at p moved elsewhere by k_rope = -p.

Returns ``(out [B, N, H, Dv] in v's dtype, lse float32 [B, N, H], sums)``; rows that see nothing give 0 and -inf. ``sums``
is None or, as ``options.sums`` asks, the probabilities in list order: float32 [B, H, N, K * unit] ("heads") or summed over
the query heads of a kv head [B, G, N, K * unit] ("kv"); ``received`` adds them up per key. Gradients flow to q, k, v,
key_bias and log_weight from out and lse; sums, positions and frequencies carry none. Entries beyond ``count`` and
indices outside the keys are ignored, a unit listed twice counts once, and lists may be empty (K = 0 too). A NaN or infinity
in a key or its value makes the rows that see it NaN and reaches no others; what is hidden (invalid, outside a live range,
masked) may hold anything.

Implementations: "reference" (the full table), "xla" (everything, every backend), "tpu" and "gpu" (Pallas kernels for
float32 and bfloat16). Keys are read heads first: a cache stored [B, G, M, D] is passed transposed at no cost.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._dispatch import choose, kernels
from pallas_kernels._mesh import Dims
from pallas_kernels.flash import lists as units
from pallas_kernels.gather import lists, reference, xla
from pallas_kernels.gather.lists import received

# Bodies that a call without a name may use: each joins once its values and its speed have been measured on a device.
MEASURED = frozenset({"xla"})
IMPLEMENTATIONS = {"reference": reference.gather, "xla": xla.gather} | kernels(__name__, "gather")


@dataclasses.dataclass(frozen=True)
class Options:
    """Static side of a call.

    mask: a value-hashed record or None. scale: multiplies q.k. unit: keys per entry. sums: None | "kv" | "heads".
    rope_layout: "half" | "interleaved", channel pairs (i, i + R) or (2i, 2i + 1). rope_scale: factor on turned channels.
    distinct: no list holds a unit twice, so that none has to be sorted to find out.
    """

    mask: Any = None
    scale: float = 1.0
    unit: int = 1
    sums: str | None = None
    rope_layout: str = "half"
    rope_scale: float = 1.0
    distinct: bool = False


def dims(o: dict, opt: Options) -> Dims:
    """What the dimensions are called, for a mesh: queries with lists of their own are cut by length, keys not at all."""
    own = o.get("index") is not None and o["index"].shape[2] == o["q"].shape[1]
    length = "length" if own else None
    rows, keys, listed = ("batch", length, "heads"), ("batch", None, "heads"), ("batch", "heads", length)

    def field(long):  # [b, N|M] or [b, G, N|M]
        return lambda x: ("batch", long) if x.ndim == 2 else ("batch", "heads", long)

    names = {
        "q": (*rows, None), "k": (*keys, None), "v": (*keys, None), "index": (*listed, None), "count": listed,
        "bounds": (*listed, None, None), "log_weight": (*listed, None), "pos": (*listed, None), "key_bias": keys,
        "freqs": (None,),
    }  # fmt: skip
    fields = {"q_fields": field(length), "k_fields": field(None), "k_valid": field(None), "k_rope": field(None)}
    found = {x: jax.tree.map(fields[x], a) if x in fields else names[x] for x, a in o.items() if a is not None}
    return Dims(found, ((*rows, None), rows, None if opt.sums is None else (*listed, None)))


def gather(operands: dict, options: Options, implementation: str | None = None, mesh=None):
    """(out, lse, sums); see the module's docstring. ``implementation=None`` picks the fast path that works here; a named
    one raises a ValueError that says what it does not support. ``mesh``: devices to cut a kernel's call over, None for
    those of ``jax.set_mesh``."""
    operands = {x: a for x, a in operands.items() if a is not None}
    check(operands, options)
    if "index" in operands:
        if "pos" in operands and operands["index"].shape[3] == 0:
            operands["pos"] = jnp.pad(operands["pos"], [(0, 0)] * 3 + [(0, 1)])
        if not options.distinct or operands["index"].shape[3] == 0:  # else nothing to mark: bodies look at every entry
            operands = units.clean(operands, options)

    def refusal(name: str) -> str | None:
        return lists.unsupported(operands, options, name)

    names = functools.partial(dims, operands, options)
    return choose(IMPLEMENTATIONS, MEASURED, implementation, refusal, names, mesh)(operands, options)


def _expect(name: str, got, want: str, ok: bool) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {want}, got {got}")


def check(o: dict, opt: Options) -> None:
    """The shape rules, as errors that name the operand."""
    for name in ("q", "k", "v"):
        _expect(name, f"shape {o[name].shape}", "[batch, tokens, heads, head_dim]", o[name].ndim == 4)
        _expect(name, o[name].dtype, "a floating dtype", jnp.issubdtype(o[name].dtype, jnp.floating))
    (b, n, h, d), (bk, m, g, dk) = o["q"].shape, o["k"].shape
    _expect("k", f"shape {o['k'].shape}", f"batch 1 or {b}, head_dim {d}", bk in (1, b) and dk == d)
    _expect("v", f"shape {o['v'].shape}", f"batch, tokens and heads of k, {(bk, m, g)}", o["v"].shape[:3] == (bk, m, g))
    _expect("q", f"{h} heads", f"a multiple of the {g} kv heads", h % g == 0)
    _expect("unit", opt.unit, "at least 1", opt.unit >= 1)
    _expect("sums", repr(opt.sums), "None, 'kv' or 'heads'", opt.sums in (None, "kv", "heads"))
    _expect("rope_layout", repr(opt.rope_layout), "'half' or 'interleaved'", opt.rope_layout in ("half", "interleaved"))
    has = lambda name: o.get(name) is not None  # noqa: E731
    _expect("count", "none", "one beside index", has("count") == has("index"))
    if has("index"):
        shape = tuple(o["index"].shape)
        ok = len(shape) == 4 and shape[0] in (1, b) and shape[1] in (1, g, h) and shape[2] in (1, n)
        _expect("index", f"shape {shape}", f"[1|{b}, 1|{g}|{h}, 1|{n}, K]", ok)
        _expect("index", o["index"].dtype, "int32", o["index"].dtype == jnp.int32)
        for name, want in (("count", shape[:3]), ("bounds", (*shape, 2)), ("log_weight", shape), ("pos", shape)):
            if has(name):
                _expect(name, f"shape {o[name].shape}", f"{want}", tuple(o[name].shape) == want)
    else:
        extra = [name for name in ("bounds", "log_weight", "pos") if has(name)]
        _expect("index", f"none beside {extra}", "lists", not extra)
    for name in ("k_valid", "k_rope"):
        if has(name):
            x = o[name].shape
            ok = x[0] in (1, b) and x[-1] == m and (len(x) == 2 or len(x) == 3 and x[1] == g)
            _expect(name, f"shape {x}", f"[1|{b}, {m}] or [1|{b}, {g}, {m}]", ok)
    if has("key_bias"):
        x = o["key_bias"].shape
        ok = len(x) == 3 and x[0] in (1, b) and x[1] == m and x[2] in (1, g, h)
        _expect("key_bias", f"shape {x}", f"[1|{b}, {m}, 1|{g}|{h}]", ok)
    _expect("freqs", "none", "frequencies beside k_rope or pos", has("freqs") or not (has("k_rope") or has("pos")))
    if has("freqs"):
        _expect("freqs", f"shape {o['freqs'].shape}", f"[R], 2 R <= {d}", o["freqs"].ndim == 1 and 2 * len(o["freqs"]) <= d)


__all__ = ["IMPLEMENTATIONS", "MEASURED", "Options", "check", "gather", "received"]
