"""What the accelerator bodies share: operands into flash's layout and back, and the derivative."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash import layout, lists
from pallas_kernels.flash.body import LEAST, folding, split, summed, with_spare
from pallas_kernels.flash.layout import Plan
from pallas_kernels.flash.pairs import FAR, logits_of
from pallas_kernels.profile import xla
from pallas_kernels.profile.reference import apart, known


class Body(NamedTuple):
    """Kernels over flash's arranged operands, each ``(p, opt, rows, keys, interpret)`` -> dict.

    ``plan(o, opt)``, and ``apart(o, opt)`` with one query head per row block, -> Plan.  ``rows`` -> {"sums" [B, blocks,
    tiles, 2, rows]}: the log mass of each row and the mean of its logits.  ``columns``, with "sums" (lse, weights) among
    the rows, -> {"columns" [B, blocks, units, at least pack, at least unit]}, by ``column_plan``.  The gradients, by
    ``apart`` and with one more key float (``COLUMNS``) and four sums (lse, weights, plain, by_logit): ``query_gradient``
    -> {dq, d_weights, d_row}, ``key_gradient`` -> {dk, d_key}. ``received``, with one sum (lse) -> {d_weights} alone."""

    name: str
    plan: Callable
    apart: Callable
    column_plan: Callable
    rows: Callable
    columns: Callable
    query_gradient: Callable
    key_gradient: Callable
    received: Callable


COLUMNS = "+columns"  # the key float that holds the gradient of the columns


def _arranged(p: Plan, o: dict, opt) -> tuple[dict, dict]:
    arranged = layout.arrange_floats(p, o, opt) | layout.arrange_ints(p, o, opt)
    return split({x: a for x, a in arranged.items() if x != "v"})


def _coarse(o: dict, opt):
    """The call with units that kernels can hold."""
    o, unit = lists.coarser(o, opt, LEAST)
    return o, dataclasses.replace(opt, unit=unit)


def _row_sums(body: Body, o: dict, opt, interpret):
    """(lse, mean logit) [B, N, H] of each row."""
    o, opt = _coarse(o, opt)
    p = body.plan(o, opt)
    found = folding(body.rows, p, opt, interpret)(*_arranged(p, o, opt))["sums"]
    found = layout.from_rows(p, jnp.swapaxes(found, 3, 4))
    return found[..., 0], found[..., 1]


def _columns(body: Body, o: dict, opt, interpret, lse, weights):
    o, opt = _coarse(o, opt)
    p = body.column_plan(o, opt)
    rows, keys = _arranged(p, o, opt)
    rows["sums"] = _sums(p, lse, weights)
    found = folding(body.columns, p, opt, interpret)(rows, keys)["columns"]
    found = jnp.swapaxes(found[:, :, :, : p.pack, : p.unit], 2, 3)
    return found.reshape(p.b, p.h, p.units * p.unit)[..., : p.m]


def _sums(p: Plan, lse, *others):
    """Rows [B, N, H] as [b, blocks, tiles, sums, rows]; padding has no mass."""
    padded = [layout.rows_of(p, x[..., None], value=FAR if x is lse else 0.0) for x in (lse, *others)]
    return jnp.swapaxes(jnp.concatenate(padded, -1), 3, 4)


def _reduce(body: Body, interpret, o: dict, opt, lse, weights):
    own, mean = _row_sums(body, o, opt, interpret)
    logits = jnp.where(own > -jnp.inf, jnp.exp(own - lse) * mean, 0.0)
    return _columns(body, o, opt, interpret, lse, weights), logits


def _widened(body: Body, o: dict, opt, d_columns):
    """(operands, options, plan, plan with one more key float, rows, keys)."""
    (o, opt), extra = _coarse(o, opt), jnp.moveaxis(d_columns, 1, 2)
    p = body.apart(o, opt)
    wide = dataclasses.replace(p, key=(*p.key, COLUMNS))
    return o, opt, p, wide, *_arranged(wide, o | {"key": o["key"] | {COLUMNS: extra}}, opt)


def _per_row(p: Plan, found):
    return layout.from_rows(p, jnp.swapaxes(found, 3, 4))[..., 0]


def _received(body: Body, interpret, o: dict, opt, lse, d_columns):
    """sum_j p_ij d_columns_j of each row, [B, N, H]."""
    o, opt, p, wide, rows, keys = _widened(body, o, opt, d_columns)
    rows["sums"] = _sums(p, lse)
    return _per_row(p, folding(body.received, wide, opt, interpret)(rows, keys)["d_weights"])


def _gradient(body: Body, interpret, floats: dict, ints: dict, opt, sums: dict, d_columns):
    o, opt, p, wide, rows, keys = _widened(body, floats | ints, opt, d_columns)
    rows["sums"] = _sums(p, *(sums[x] for x in ("lse", "weights", "plain", "by_logit")))
    found = folding(body.query_gradient, wide, opt, interpret)(rows, keys)
    found |= folding(body.key_gradient, wide, opt, interpret)(rows, keys)
    rest = {x: a for x, a in o.items() if x not in floats}
    arranged, pull = jax.vjp(lambda f: layout.arrange_floats(p, f | rest, opt), floats)
    grads = {"q": found["dq"], "k": found["dk"] if p.raw else with_spare(found["dk"]), "v": jnp.zeros_like(arranged["v"])}
    if p.row:
        grads["row"] = summed(found["d_row"], arranged["row"].shape)
    if p.key_floats:
        grads["key"] = with_spare(summed(found["d_key"], (*arranged["key"].shape[:2], *found["d_key"].shape[2:])))
    return pull(grads)[0], _per_row(p, found["d_weights"])


def pair_received(p: Plan, opt, s, ok, lse, d_columns, sides, row, key):
    """p d_columns of one tile pair."""
    return jnp.where(ok, jnp.exp(logits_of(p, opt, *sides)(s, row, key) - lse), 0.0) * d_columns


def pair_gradient(p: Plan, opt, s, ok, sums, d_columns, sides, row, key):
    """(p d_columns, gradients of the products and of row and key floats) of one tile pair."""
    s, pull = jax.vjp(logits_of(p, opt, *sides), s, row, key)
    lse, weights, plain, by_logit = sums
    prob = jnp.where(ok, jnp.exp(s - lse), 0.0)
    received = prob * d_columns
    return received, *pull(jnp.where(ok, weights * received + prob * (plain + by_logit * s), 0.0))


def _passes(body: Body, interpret) -> xla.Passes:
    return xla.Passes(*(functools.partial(f, body, interpret) for f in (_reduce, _gradient)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _profile(floats: dict, weights, ints: dict, opt, body: Body, interpret):
    lse = _row_sums(body, floats | ints, opt, interpret)[0]
    return _columns(body, floats | ints, opt, interpret, *known(lse, weights.astype(jnp.float32)).values()), lse


def _fwd(floats, weights, ints, opt, body, interpret):
    columns, lse = _profile(floats, weights, ints, opt, body, interpret)
    return (columns, lse), (floats, weights, ints, lse)


def _bwd(opt, body, interpret, saved, cotangents):
    """One pass for what the weights (and through p the log mass) receive, then one for all else."""
    floats, weights, ints, lse = saved
    d_columns, d_lse = cotangents
    seen, at = lse > -jnp.inf, known(lse, weights.astype(jnp.float32))
    received = _received(body, interpret, floats | ints, opt, at["lse"], d_columns)
    plain = jnp.where(seen, d_lse - at["weights"] * received, 0.0)
    sums = at | {"plain": plain, "by_logit": jnp.zeros_like(lse)}
    grads = _gradient(body, interpret, floats, ints, opt, sums, d_columns)[0]
    return grads, jnp.where(seen, received, 0.0).astype(weights.dtype), None


_profile.defvjp(_fwd, _bwd)


def reduce(body: Body, o: dict, opt, interpret):
    o, lse, weights = apart(o, "lse", "weights")
    floats, ints = xla.tiles.divide(xla.without_values(o))
    lse, weights = lse.astype(jnp.float32), weights.astype(jnp.float32)
    return xla.differentiable(floats, ints, opt, _passes(body, interpret), lse, weights)


def profile(body: Body, o: dict, opt, interpret):
    o, weights = apart(o, "weights")
    floats, ints = xla.tiles.divide(xla.without_values(o))
    return _profile(floats, weights, ints, opt, body, interpret)


# -------------------------------------------------------------------------------------------------------- diagonals


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def slanted(o: dict, scale: float, kernels):
    """``diagonals`` by ``kernels(q, k, lse or None, scale)``, with the derivative of the XLA path."""
    return kernels(o["q"], o["k"], o.get("lse"), scale)


def _slanted_fwd(o, scale, kernels):
    return slanted(o, scale, kernels), o


def _slanted_bwd(scale, kernels, o, cotangents):
    return jax.vjp(lambda o: xla.diagonals(o, scale), o)[1](cotangents)


slanted.defvjp(_slanted_fwd, _slanted_bwd)
