"""What a program costs, counted from its trace.

XLA's own cost analysis takes the body of a loop once, however often it runs, and every stack of layers here is a loop;
so matrix products are counted in the jaxpr, times the length of the scans around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.extend import core


def matmul_flops(f: Callable, *args) -> int:
    """Multiplications and additions of the matrix products of ``f(*args)``; elementwise work is left out.

    Of a conditional the dearest branch counts; of a loop without a known length, one round.
    """
    return _flops(jax.make_jaxpr(f)(*args).jaxpr)


def _flops(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contract)
            continue
        inner = [_flops(j) for value in eqn.params.values() for j in _jaxprs(value)]
        if eqn.primitive.name == "cond":
            total += max(inner, default=0)
        else:
            total += sum(inner) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def _jaxprs(value):
    """The jaxprs in a parameter of an equation."""
    is_jaxpr = lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))  # noqa: E731
    for leaf in jax.tree.leaves(value, is_leaf=is_jaxpr):
        if is_jaxpr(leaf):
            yield leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf


def array_bytes(tree) -> int:
    """Bytes of the arrays (or of their shapes) in a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
