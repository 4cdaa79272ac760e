"""What the accelerator bodies share: facts as rows of integers, eligibility inside a kernel, what they refuse."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._vmap import folding
from pallas_kernels.flash import layout
from pallas_kernels.indexer import reference, xla

FLOOR = -1e30  # the score of a unit that is not eligible, and below every real one: times 0 it is 0, as -inf is not


def facts(side: dict):
    """int32 [b, l, F, n]: validity, then both ends of each range; b and l are 1 or those of the call."""
    rows = [side["valid"].astype(jnp.int32)]
    for name in sorted(side["low"]):
        rows += [side[end][name].astype(jnp.int32) for end in ("low", "high")]
    shape = jnp.broadcast_shapes(*(x.shape for x in rows))
    return jnp.stack([jnp.broadcast_to(x, shape) for x in rows], 2)


def eligible(opt, names, row, key, shape):
    """bool of ``shape`` from facts that broadcast to it: ``row(i)`` and ``key(i)`` are the i-th of ``facts``."""
    # Facts broadcast first, because booleans do not.
    ok = jnp.broadcast_to(row(0), shape) * jnp.broadcast_to(key(0), shape) != 0
    if opt.mask is not None:
        ranges = lambda at: {  # noqa: E731
            x: tuple(jnp.broadcast_to(at(1 + 2 * i + end), shape) for end in (0, 1)) for i, x in enumerate(names)
        }
        ok = ok & opt.mask.interval(ranges(row), ranges(key))[0]
    return ok


def kept(ok, s, other):
    """Scores of eligible units; -0 as 0, and never NaN."""
    return jnp.where(ok & (s == s), jnp.where(s == 0.0, 0.0, s), other)


def ordered(x):
    """float32 <-> int32 of the same order (its own inverse, between bit patterns)."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


def midpoint(low, high):
    """(low + high) // 2 without overflow."""
    return (low & high) + ((low ^ high) >> 1)


def unsupported(o: dict, opt, name: str) -> str | None:
    """What an accelerator body cannot do with this call, or None."""
    for x in ("q", "k"):
        if o[x].dtype not in (jnp.float32, jnp.bfloat16) or o[x].dtype != o["q"].dtype:
            return f"{x} of {o[x].dtype}: expected float32 or bfloat16, the same for q and k"
    if o["q"].shape[3] > 256:
        return f"a head size of {o['q'].shape[3]}: expected at most 256"
    units = o["k"].shape[1]
    if name == "tpu" and units > MOST_UNITS:
        return f"{units} units: expected at most {MOST_UNITS}, whose scores fit its vector memory"
    if min(opt.k, units) > MOST_KEPT:
        return f"{min(opt.k, units)} units per list: expected at most {MOST_KEPT}"
    if opt.mask is not None:
        ends = {x: (jnp.zeros((2, 3), jnp.int32),) * 2 for x in opt.mask.fields()}
        if found := layout.refused(opt.mask.interval, ends, ends):
            return f"mask with {', '.join(found)}"
    return None


MOST_UNITS, MOST_KEPT = 1 << 20, 4096
PART = 8192  # queries that fill any chip


@dataclasses.dataclass(frozen=True)
class Forward:
    """A body as a function of operands and options alone, compared by value."""

    call: Callable
    interpret: object
    ascending: bool

    def __call__(self, o, opt):
        return folding(lambda b, o: self._parts(o, opt), o["q"].shape[0])(o)

    def _parts(self, o, opt):
        """``_run``, over ``PART`` queries at a time where a kernel leaves more than the lists."""
        n = o["q"].shape[1]
        if self.ascending or n <= PART:
            return self._run(o, opt)
        cut = lambda axis: lambda x: xla._tiles(x, axis % x.ndim, PART)  # noqa: E731
        axes = {"q": 1, "weight": 1, "q_valid": -1, "q_low": -1, "q_high": -1}
        rows = {x: jax.tree.map(cut(axis), o[x]) for x, axis in axes.items() if o.get(x) is not None}
        return tuple(xla._join(x, n) for x in lax.map(lambda part: self._run(o | part, opt), rows))

    def _run(self, o, opt):
        q, k, weight = reference.by_list(o, opt)
        q_side, k_side = reference.sides(o, opt)
        arrays = {"q": q, "k": k, "q_facts": facts(q_side), "k_facts": facts(k_side)}
        if weight is not None:
            arrays["weight"] = weight.astype(jnp.float32)
        names = tuple(sorted(q_side["low"]))
        run = functools.partial(self.call, opt, names, interpret=self.interpret)
        reach = functools.partial(xla.reach, opt, q_side, k_side)
        index, values = run(arrays, reach)
        if self.ascending:  # another pass over the lists would hold them twice
            return index, (values > -jnp.inf).sum(-1).astype(jnp.int32), values
        return reference.ascending(index, values, k.shape[2])


def select(call: Callable, o: dict, opt, interpret, ascending: bool = False):
    """``ascending``: the kernel's entries come in the order of their index; unused ones last, as 0 and -inf."""
    return xla.differentiable(*xla.divide(o), opt, Forward(call, interpret, ascending))


def pad(x, axis: int, size: int, value=0):
    """``axis`` of x lengthened to ``size``."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)], constant_values=value)

