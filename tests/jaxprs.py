"""What a traced function would put in memory: every intermediate of a jaxpr and of the jaxprs inside it."""

from __future__ import annotations

import jax
from jax.extend import core


def intermediates(jaxpr):
    """Yield (primitive name, aval) of every value computed in a (closed) jaxpr, at any depth."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield eqn.primitive.name, var.aval
        for param in eqn.params.values():
            for inner in jax.tree.leaves(param, is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    yield from intermediates(inner)


def _is_jaxpr(x) -> bool:
    return isinstance(x, (core.Jaxpr, core.ClosedJaxpr))


def largest(f, *args):
    """(elements, primitive, shape) of the largest intermediate of ``f(*args)``."""
    found = intermediates(jax.make_jaxpr(f)(*args))
    return max(((aval.size, name, aval.shape) for name, aval in found if hasattr(aval, "size")), key=lambda x: x[0])
