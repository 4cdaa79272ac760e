"""What the accelerator bodies share: operands into their layout, the derivative, what they refuse."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash import layout
from pallas_kernels.flash.layout import Plan
from pallas_kernels.flash.pairs import FAR
from pallas_kernels.flash.xla import divide


class Body(NamedTuple):
    """A set of kernels over arranged operands: ``rows``, read by row block, and ``keys``, read by unit.

    ``plan(o, opt)``; ``forward(p, opt, rows, keys, interpret)`` -> {out, lse}; ``query_gradient`` likewise -> {dq, d_row},
    and ``key_gradient`` -> {dk, dv, d_key}, with "do" and "sums" (lse and delta) among the rows."""

    name: str
    plan: Callable
    forward: Callable
    query_gradient: Callable
    key_gradient: Callable


def _split(arranged: dict) -> tuple[dict, dict]:
    """Arranged operands as (by row block, by key unit)."""
    rows = {x: arranged[x] for x in ("lists", "q", "row_int", "row") if x in arranged}
    return rows, {x: arranged[x] for x in ("k", "v", "key_int", "key") if x in arranged}


def _folding(call, p: Plan, opt, interpret):
    """f(rows, keys) = ``call(p, opt, rows, keys, interpret)``, under which vmap lengthens the batch: kernels that copy from
    unblocked arrays cannot be mapped otherwise."""

    @jax.custom_batching.custom_vmap
    def f(rows, keys):
        return call(p, opt, rows, keys, interpret)

    @f.def_vmap
    def rule(size, mapped, rows, keys):
        def fold(x, mapped):
            if not mapped and x.shape[0] == 1:
                return x
            x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            return jnp.broadcast_to(x, (size, p.b, *x.shape[2:])).reshape(size * p.b, *x.shape[2:])

        folded = (jax.tree.map(fold, side, where) for side, where in zip((rows, keys), mapped, strict=True))
        found = _folding(call, dataclasses.replace(p, b=size * p.b), opt, interpret)(*folded)
        return jax.tree.map(lambda x: x.reshape(size, p.b, *x.shape[1:]), found), jax.tree.map(lambda x: True, found)

    return f


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _flash(floats: dict, ints: dict, opt, body: Body, interpret):
    o = floats | ints
    p = body.plan(o, opt)
    found = _folding(body.forward, p, opt, interpret)(*_split(layout.arrange_floats(p, o) | layout.arrange_ints(p, o)))
    lse = layout.from_rows(p, jnp.swapaxes(found["lse"], 3, 4))[..., 0]
    return layout.from_rows(p, found["out"])[..., : p.dv], lse


def _fwd(floats, ints, opt, body, interpret):
    out, lse = _flash(floats, ints, opt, body, interpret)
    return (out, lse), (floats, ints, out, lse)


def _bwd(opt, body, interpret, saved, cotangents):
    floats, ints, out, lse = saved
    d_out, d_lse = cotangents
    p = body.plan(floats | ints, opt)
    arranged, pull = jax.vjp(lambda f: layout.arrange_floats(p, f | ints), floats)
    rows, keys = _split(arranged | layout.arrange_ints(p, floats | ints))
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_lse
    sums = jnp.stack([jnp.where(jnp.isfinite(lse), lse, FAR), delta], -1)
    rows["do"] = layout.rows_of(p, d_out, p.dv_pad)
    rows["sums"] = jnp.swapaxes(layout.rows_of(p, sums, value=FAR), 3, 4)
    found = _folding(body.query_gradient, p, opt, interpret)(rows, keys)
    found |= _folding(body.key_gradient, p, opt, interpret)(rows, keys)
    grads = {"q": found["dq"]} | {x: _with_spare(found["d" + x]) for x in ("k", "v")}
    if p.row:
        grads["row"] = _summed(found["d_row"], arranged["row"].shape)
    if p.key_floats:
        grads["key"] = _with_spare(_summed(found["d_key"], (*arranged["key"].shape[:2], *found["d_key"].shape[2:])))
    return pull(grads)[0], None


def _with_spare(x):
    """The unit past the end has no gradient."""
    return jnp.pad(x, [(0, 0)] * 2 + [(0, 1)] + [(0, 0)] * (x.ndim - 3))


def _summed(x, shape):
    """Sum over the batch and heads that an array of ``shape`` shares."""
    x = x.sum(0, keepdims=True) if shape[0] == 1 else x
    return x.reshape(x.shape[0], shape[1], x.shape[1] // shape[1], *x.shape[2:]).sum(2)


_flash.defvjp(_fwd, _bwd)


def run(body: Body, o: dict, opt, interpret):
    if (why := layout.unsupported(o, opt)) is not None:
        raise ValueError(f"implementation: {body.name!r} does not support {why}")
    return _flash(*divide(o), opt, body, interpret)
