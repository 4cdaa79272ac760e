"""What the accelerator bodies share: operands into flash's layout, two kernels, the derivative of the XLA path."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash import layout
from pallas_kernels.flash.body import folding, split
from pallas_kernels.flash.layout import Plan
from pallas_kernels.flash.pairs import FAR
from pallas_kernels.profile import xla


class Body(NamedTuple):
    """Kernels over flash's arranged operands.

    ``row_plan``, ``column_plan``: (operands, options) -> Plan.  ``rows(p, opt, rows, keys, interpret)`` -> {"sums"
    [B, blocks, tiles, 2, rows]}: the log mass of each row and the mean of its logits.  ``columns`` likewise, with "sums"
    (lse and weights) among the rows, -> {"columns" [B, blocks, units, at least pack, at least unit]}."""

    name: str
    row_plan: Callable
    column_plan: Callable
    rows: Callable
    columns: Callable


def _arranged(p: Plan, o: dict) -> tuple[dict, dict]:
    arranged = layout.arrange_floats(p, o) | layout.arrange_ints(p, o)
    return split({x: a for x, a in arranged.items() if x != "v"})


def _row_sums(body: Body, o: dict, opt, interpret):
    """(lse, mean logit) [B, N, H] of each row."""
    p = body.row_plan(o, opt)
    found = folding(body.rows, p, opt, interpret)(*_arranged(p, o))["sums"]
    found = layout.from_rows(p, jnp.swapaxes(found, 3, 4))
    return found[..., 0], found[..., 1]


def _columns(body: Body, o: dict, opt, interpret, lse, weights):
    p = body.column_plan(o, opt)
    rows, keys = _arranged(p, o)
    padded = [layout.rows_of(p, x[..., None], value=v) for x, v in ((lse, FAR), (weights, 0.0))]
    rows["sums"] = jnp.swapaxes(jnp.concatenate(padded, -1), 3, 4)
    found = folding(body.columns, p, opt, interpret)(rows, keys)["columns"]
    found = jnp.swapaxes(found[:, :, :, : p.pack, : p.unit], 2, 3)
    return found.reshape(p.b, p.h, p.units * p.unit)[..., : p.m]


def _reduce(body: Body, interpret, o: dict, opt, lse, weights):
    own, mean = _row_sums(body, o, opt, interpret)
    logits = jnp.where(own > -jnp.inf, jnp.exp(own - lse) * mean, 0.0)
    return _columns(body, o, opt, interpret, lse, weights), logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _log_mass(floats: dict, ints: dict, opt, body: Body, interpret):
    return _row_sums(body, floats | ints, opt, interpret)[0]


def _fwd(floats, ints, opt, body, interpret):
    return _log_mass(floats, ints, opt, body, interpret), (floats, ints)


def _bwd(opt, body, interpret, saved, d_lse):
    floats, ints = saved
    return jax.vjp(lambda f: xla.log_mass(f | ints, opt), floats)[1](d_lse)[0], None


_log_mass.defvjp(_fwd, _bwd)


def reduce(body: Body, o: dict, opt, lse, weights, interpret):
    o = xla.without_values(o)
    forward = _Forward(body, interpret)
    return xla.differentiable(*xla.tiles.divide(o), opt, forward, lse.astype(jnp.float32), weights.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Forward:
    body: Body
    interpret: object

    def __call__(self, o, opt, lse, weights):
        return _reduce(self.body, self.interpret, o, opt, lse, weights)


def profile(body: Body, o: dict, opt, weights, interpret):
    floats, ints = xla.tiles.divide(xla.without_values(o))
    lse = _log_mass(floats, ints, opt, body, interpret)
    some = jnp.isfinite(lse)
    return reduce(body, o, opt, jnp.where(some, lse, FAR), jnp.where(some, weights, 0.0), interpret)[0], lse


# -------------------------------------------------------------------------------------------------------- diagonals


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def slanted(q, k, lse, scale: float, kernels):
    """``kernels(q, k, lse, scale)`` with the derivative of the XLA path."""
    return kernels(q, k, lse, scale)


def _slanted_fwd(q, k, lse, scale, kernels):
    return kernels(q, k, lse, scale), (q, k, lse)


def _slanted_bwd(scale, kernels, saved, cotangents):
    return jax.vjp(lambda q, k, lse: xla.diagonals(q, k, lse, scale), *saved)[1](cotangents)


slanted.defvjp(_slanted_fwd, _slanted_bwd)
