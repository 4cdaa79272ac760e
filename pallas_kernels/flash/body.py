"""What the accelerator bodies share: operands into their layout, the derivative, what they refuse."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _vmap
from pallas_kernels.flash import layout, lists
from pallas_kernels.flash.layout import Plan
from pallas_kernels.flash.pairs import FAR
from pallas_kernels.flash.xla import divide

LEAST = 8  # keys of a unit; smaller ones become live ranges of larger ones


class Body(NamedTuple):
    """A set of kernels over arranged operands: ``rows``, read by row block, and ``keys``, read by unit.

    ``plan(o, opt)``; ``forward(p, opt, rows, keys, interpret)`` -> {out, lse}; ``query_gradient`` likewise -> {dq, d_row,
    d_weight}, ``key_gradient`` -> {dk, dv, d_key} and ``table_gradient`` -> {d_table}, with "do" and "sums" (lse and delta)
    among the rows. Without the last one a body takes no tables and no weights; ``half``: it takes float16; ``least``: keys
    of a unit, smaller ones become live ranges of larger ones; ``missing``: operations of masks and score_mods it does not
    lower; ``refuses(o, opt)``: what else it does not take, in words, or None."""

    name: str
    plan: Callable
    forward: Callable
    query_gradient: Callable
    key_gradient: Callable
    table_gradient: Callable | None = None
    half: bool = False
    least: int = LEAST
    missing: frozenset = frozenset()
    refuses: Callable = lambda o, opt: None

    def refusal(self, o: dict, opt) -> str | None:
        """What this body cannot do with a call, in words, or None."""
        extras = self.table_gradient is not None
        found = layout.unsupported(o, opt, extras=extras, half=self.half, missing=self.missing)
        return found if found is not None else self.refuses(o, opt)


def split(arranged: dict) -> tuple[dict, dict]:
    """Arranged operands as (by row block, by key unit)."""
    rows = {x: arranged[x] for x in ("lists", "q", "row_int", "row") if x in arranged}
    return rows, {x: arranged[x] for x in ("k", "v", "key_int", "key", "table") if x in arranged}


def arrange(p: Plan, o: dict, opt) -> tuple[dict, dict]:
    """Operands by row block and by key unit."""
    return split(layout.arrange_floats(p, o, opt) | layout.arrange_ints(p, o, opt))


def folding(call, p: Plan, opt, interpret):
    """f(rows, keys) = ``call(p, opt, rows, keys, interpret)``, under which vmap lengthens the batch."""
    return _vmap.folding(lambda b, rows, keys: call(dataclasses.replace(p, b=b), opt, rows, keys, interpret), p.b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _flash(floats: dict, ints: dict, opt, body: Body, interpret):
    o = floats | ints
    p = body.plan(o, opt)
    found = folding(body.forward, p, opt, interpret)(*arrange(p, o, opt))
    lse = layout.from_rows(p, jnp.swapaxes(found["lse"], 3, 4))[..., 0]
    return layout.from_queries(p, found["out"])[..., : p.dv], lse


def _fwd(floats, ints, opt, body, interpret):
    out, lse = _flash(floats, ints, opt, body, interpret)
    return (out, lse), (floats, ints, out, lse)


def _bwd(opt, body, interpret, saved, cotangents):
    floats, ints, out, lse = saved
    d_out, d_lse = cotangents
    p = body.plan(floats | ints, opt)
    arranged, pull = jax.vjp(lambda f: layout.arrange_floats(p, f | ints, opt), floats)
    rows, keys = split(arranged | layout.arrange_ints(p, floats | ints, opt))
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_lse
    sums = jnp.stack([jnp.where(jnp.isfinite(lse), lse, FAR), delta], -1)
    rows["do"] = layout.queries_of(p, d_out, p.dv_pad)
    rows["sums"] = jnp.swapaxes(layout.rows_of(p, sums, value=FAR), 3, 4)
    found = folding(body.query_gradient, p, opt, interpret)(rows, keys)
    found |= folding(body.key_gradient, p, opt, interpret)(rows, keys)
    grads = {"q": found["dq"]} | {x: found["d" + x] if p.raw else with_spare(found["d" + x]) for x in ("k", "v")}
    if p.row:
        grads["row"] = summed(found["d_row"], arranged["row"].shape)
    if p.key_floats:
        grads["key"] = with_spare(summed(found["d_key"], (*arranged["key"].shape[:2], *found["d_key"].shape[2:])))
    if p.weighted:
        grads["weight"] = summed(found["d_weight"], arranged["weight"].shape)
    if p.tabled:  # by a kernel of its own, which a program that asks for no such gradient does not contain
        table = folding(body.table_gradient, p, opt, interpret)(rows, keys)["d_table"]
        grads["table"] = summed(table, arranged["table"].shape).astype(arranged["table"].dtype)
    return pull(grads)[0], None


def with_spare(x):
    """The unit past the end has no gradient."""
    return jnp.pad(x, [(0, 0)] * 2 + [(0, 1)] + [(0, 0)] * (x.ndim - 3))


def summed(x, shape):
    """Sum over the batch and heads that an array of ``shape`` shares."""
    x = x.sum(0, keepdims=True) if shape[0] == 1 else x
    return x.reshape(x.shape[0], shape[1], x.shape[1] // shape[1], *x.shape[2:]).sum(2)


_flash.defvjp(_fwd, _bwd)


def run(body: Body, o: dict, opt, interpret):
    if (why := body.refusal(o, opt)) is not None:
        raise ValueError(f"implementation: {body.name!r} does not support {why}")
    o, unit = lists.coarser(o, opt, body.least)
    opt = dataclasses.replace(opt, unit=unit)
    return _flash(*divide(o), opt, body, interpret)
