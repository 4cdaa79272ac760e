"""One pair of tiles inside a kernel, in the operations that every accelerator's compiler takes.

Facts of rows and keys are columns and rows, or the other way round where a kernel keeps keys on the first axis. Among a
key's floats "+bias" is added to its logits, as are "+weight" of a list entry and "+table" of a pair of tiles.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash.layout import TAINTED, Plan

ADDED = ("+bias", "+weight", "+table")
FAR = 1e30  # stands for the lse of rows that see nothing: exp(s - FAR) is 0
NN, NT = ((1,), (0,)), ((1,), (1,))


def dot(a, b, dims):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=jnp.float32, precision=precision)


def weight_of(bits):
    """A scalar kept among integers."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def at(p: Plan, x, b, h):
    """Where an array [1|B, 1|G|blocks, ...] holds what goes with batch row ``b`` and row block ``h``."""
    heads = x.shape[1]
    return b if x.shape[0] > 1 else 0, h if heads == p.blocks else 0 if heads == 1 else lax.div(h, p.blocks // heads)


def visible(opt, shape, valid, row_int: dict, key_int: dict):
    """bool of ``shape``, or None where ``valid`` is: a pair that is seen whole. Facts broadcast first, because booleans do
    not."""
    if valid is None:
        return None
    ok = jnp.broadcast_to(valid, shape) != 0
    if opt.mask is not None:
        q, k = ({x: jnp.broadcast_to(a, shape) for x, a in side.items()} for side in (row_int, key_int))
        ok = ok & opt.mask.test(q, k)
    return ok


def kept(s, ok, valid, value):
    """``s`` where visible, ``value`` elsewhere."""
    if ok is None:
        return s
    return jnp.where(ok, jnp.where(jnp.broadcast_to(valid, s.shape) == TAINTED, jnp.nan, s), value)


def logits_of(p: Plan, opt, row_int: dict, key_int: dict):
    """f(products, row floats, key floats) -> logits, for ``jax.vjp``."""

    def logits(s, row, key):
        s = s * opt.scale
        spread = lambda side: {x: jnp.broadcast_to(a, s.shape) for x, a in side.items()}  # noqa: E731
        if opt.score_mod is not None:
            sides = {x: a for x, a in key.items() if x not in ADDED}
            s = opt.score_mod(s, spread(row_int), spread(key_int), spread(row), spread(sides)).astype(jnp.float32)
        for x in ADDED:
            s = s + key[x] if x in key else s
        return s

    return logits


def inside(lo, hi, shape, axis: int):
    """int32, 1 in the live range of a unit whose keys run along ``axis``."""
    i = lax.broadcasted_iota(jnp.int32, shape, axis)
    return jnp.where((i >= lo) & (i < hi), 1, 0)


def pair_gradient(p: Plan, opt, s, dp, ok, lse, delta, sides, row, key):
    """(probabilities, gradient of the products, gradients of row and key floats) of one tile pair."""
    s, pull = jax.vjp(logits_of(p, opt, *sides), s, row, key)
    # Selected after the arithmetic: what a masked pair holds, NaN too, goes nowhere.
    only = (lambda x: x) if ok is None else (lambda x: jnp.where(ok, x, 0.0))
    if opt.normalizer == "none":
        prob, ds = only(s), only(dp)
    else:
        prob = only(jnp.exp(s - lse))
        ds = only(prob * (dp - delta))
    return prob, *pull(ds)
