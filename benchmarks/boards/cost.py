"""What a program costs, counted from its trace.

XLA's own cost analysis takes the body of a loop once, however often it runs, and every stack of layers here is a loop;
so operations are counted in the jaxpr, times the length of the scans around them. Small whole numbers whose values are
known (layer numbers, counts) are followed through loops, so that what runs in one layer of many counts once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

KNOWN = 64  # entries of an integer array whose values are followed
LOOKS = frozenset(
    "add sub mul div rem max min neg abs sign exp exp2 log log1p expm1 tanh logistic erf rsqrt sqrt pow integer_pow square "
    "select_n eq ne lt le gt ge and or not".split()
)
SUMS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin cumsum cumprod cummax".split()
)


@dataclasses.dataclass(frozen=True)
class Work:
    """matmul: multiplications and additions of matrix products; other: elementwise operations, entries that are reduced,
    comparisons of sorts."""

    matmul: int = 0
    other: int = 0

    def __add__(self, more: Work) -> Work:
        return Work(self.matmul + more.matmul, self.other + more.other)

    @property
    def total(self) -> int:
        return self.matmul + self.other


def work(f: Callable, *args, scopes: tuple[str, ...] = ()) -> dict[str, Work]:
    """What ``f(*args)`` does (arrays or their shapes), by the first of ``scopes`` whose ``jax.named_scope`` holds it; "" is
    what none holds. Of a conditional without a known answer the dearest branch counts; of a loop without a known length,
    one round. What nothing reads does not count.
    """
    return traced(f, *args, scopes=scopes)[0]


def traced(f: Callable, *args, scopes: tuple[str, ...] = ()) -> tuple[dict[str, Work], Any]:
    """(``work``, the shapes of what ``f`` returns), from one trace."""
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    flat = [x for x, u in zip(jax.tree.leaves(args), used, strict=True) if u]
    found, _ = _Walk(scopes).walk(jaxpr, [_value(x) for x in closed.consts], [_value(x) for x in flat], ())
    return {name: found.get(name, Work()) for name in ("", *scopes)}, shapes


def matmul_flops(f: Callable, *args) -> int:
    """Multiplications and additions of the matrix products of ``f(*args)``; elementwise work is left out."""
    return sum(part.matmul for part in work(f, *args).values())


def array_bytes(tree) -> int:
    """Bytes of the arrays (or of their shapes) in a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# ----------------------------------------------------------------------------------------------------- walking a trace
def _slice(p, x, *starts):
    at = tuple(int(np.clip(s, 0, n - size)) for s, n, size in zip(starts, x.shape, p["slice_sizes"], strict=True))
    return x[tuple(slice(s, s + size) for s, size in zip(at, p["slice_sizes"], strict=True))]


def _spread(p, x):
    shape = [1] * len(p["shape"])
    for axis, n in zip(p["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = n
    return np.broadcast_to(x.reshape(shape), p["shape"])


def _count(p):
    shape = [1] * len(p["shape"])
    shape[p["dimension"]] = -1
    return np.broadcast_to(np.arange(p["shape"][p["dimension"]]).reshape(shape), p["shape"])


# What is done with whole numbers on the way from a layer's number to a condition.
FOLLOWED: dict[str, Callable] = {
    **{name: lambda p, *x, f=f: f(*x) for name, f in {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "eq": np.equal, "ne": np.not_equal, "lt": np.less,
        "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "max": np.maximum, "min": np.minimum,
        "rem": np.fmod, "neg": np.negative, "and": np.bitwise_and, "or": np.bitwise_or, "not": np.invert}.items()},
    "iota": _count, "broadcast_in_dim": _spread, "dynamic_slice": _slice, "convert_element_type": lambda p, x: x,
    "squeeze": lambda p, x: np.squeeze(x, p["dimensions"]), "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "select_n": lambda p, which, *x: np.where(which, x[1], x[0]) if len(x) == 2 else np.choose(which, x),
    "clamp": lambda p, low, x, high: np.clip(x, low, high),
}  # fmt: skip


def _whole(x) -> bool:
    return not jnp.issubdtype(x.dtype, jax.dtypes.extended) and x.dtype.kind in "iub" and math.prod(x.shape) <= KNOWN


def _value(x):
    """A small array of whole numbers as numpy; None for what is not followed."""
    known = isinstance(x, (np.ndarray, np.generic, jax.Array)) and not isinstance(x, jax.core.Tracer)
    return np.asarray(x) if known and _whole(x) else None


class _Walk:
    """{scope: Work} of jaxprs, with what is known about their whole numbers."""

    def __init__(self, scopes: tuple[str, ...]):
        self.scopes = scopes

    def walk(self, jaxpr, consts, inputs, outer: tuple[str, ...]):
        """(work by scope, known outputs). ``outer``: names of the scopes around the call."""
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
        read = lambda v: np.asarray(v.val) if isinstance(v, core.Literal) else env.get(v)  # noqa: E731
        total: dict[str, Work] = {}
        for eqn in jaxpr.eqns:
            names = (*outer, *str(eqn.source_info.name_stack).split("/"))
            found, out = self.equation(eqn, [read(v) for v in eqn.invars], names)
            total = _plus(total, found)
            env.update(zip(eqn.outvars, out, strict=True))
        return total, [read(v) for v in jaxpr.outvars]

    def equation(self, eqn, values, names):
        kind, unknown = eqn.primitive.name, [None] * len(eqn.outvars)
        if kind == "scan":
            return self.scan(eqn, values, names)
        if kind == "cond":
            branches = eqn.params["branches"]
            if values[0] is not None:
                branch = branches[int(np.clip(values[0], 0, len(branches) - 1))]
                return self.closed(branch, values[1:], names)
            every = [self.closed(branch, values[1:], names)[0] for branch in branches]
            return max(every, key=lambda found: sum(part.total for part in found.values())), unknown
        inner = [j for value in eqn.params.values() for j in _jaxprs(value)]
        if len(inner) == 1 and len(inner[0].jaxpr.invars) == len(values):
            return self.closed(inner[0], values, names)
        if inner:
            every = [self.closed(j, [None] * len(j.jaxpr.invars), names)[0] for j in inner]
            return _plus({}, *every), unknown
        if kind in FOLLOWED and all(v is not None for v in values) and all(_whole(v.aval) for v in eqn.outvars):
            return {}, [np.asarray(FOLLOWED[kind](eqn.params, *values), eqn.outvars[0].aval.dtype)]
        scope = next((s for s in self.scopes if s in names), "")
        return {scope: _work(eqn)}, unknown

    def closed(self, j, values, names):
        return self.walk(j.jaxpr, [_value(x) for x in j.consts], values, names)

    def scan(self, eqn, values, names):
        p, body = eqn.params, eqn.params["jaxpr"]
        first, carried = p["num_consts"], p["num_consts"] + p["num_carry"]
        consts, carry, xs = values[:first], values[first:carried], values[carried:]
        total, seen = {}, {}
        for i in range(p["length"]):
            at = p["length"] - 1 - i if p["reverse"] else i
            here = [*carry, *(None if x is None else x[at] for x in xs)]
            key = tuple(None if x is None else (x.shape, x.tobytes()) for x in here)
            if key not in seen:
                seen[key] = self.closed(body, [*consts, *here], names)
            found, out = seen[key]
            total = _plus(total, found)
            after = out[: len(carry)]
            if not any(x is not None for x in xs) and _same(after, carry):  # every round that is left is like this one
                left = p["length"] - 1 - i
                return _plus(total, {s: Work(w.matmul * left, w.other * left) for s, w in found.items()}), \
                    [*carry, *[None] * (len(eqn.outvars) - len(carry))]  # fmt: skip
            carry = after
        return total, [*carry, *[None] * (len(eqn.outvars) - len(carry))]


def _same(a, b) -> bool:
    return all((x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in zip(a, b, strict=True))


def _plus(*parts: dict[str, Work]) -> dict[str, Work]:
    total: dict[str, Work] = {}
    for part in parts:
        for scope, w in part.items():
            total[scope] = total.get(scope, Work()) + w
    return total


def _work(eqn) -> Work:
    kind, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
    size = lambda v: math.prod(getattr(v.aval, "shape", ()))  # noqa: E731
    if kind == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return Work(matmul=2 * out.size * math.prod(left[i] for i in contract))
    if kind in LOOKS:
        return Work(other=out.size)
    if kind in SUMS:
        return Work(other=size(eqn.invars[0]))
    if kind in ("sort", "top_k"):
        n = eqn.invars[0].aval.shape[eqn.params["dimension"] if kind == "sort" else -1]
        return Work(other=size(eqn.invars[0]) * max(1, math.ceil(math.log2(max(n, 2)))))
    return Work()


def _jaxprs(value):
    """The closed jaxprs in a parameter of an equation."""
    is_jaxpr = lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))  # noqa: E731
    for leaf in jax.tree.leaves(value, is_leaf=is_jaxpr):
        if isinstance(leaf, core.ClosedJaxpr):
            yield leaf
        elif isinstance(leaf, core.Jaxpr) and not leaf.constvars:
            yield core.ClosedJaxpr(leaf, ())


__all__ = ["Work", "array_bytes", "matmul_flops", "traced", "work"]
