"""What the accelerator bodies share: operands into flash's layout, two kernels, the derivative of the XLA path."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash import layout, lists
from pallas_kernels.flash.body import LEAST, folding, split
from pallas_kernels.flash.layout import Plan
from pallas_kernels.flash.pairs import FAR
from pallas_kernels.profile import xla
from pallas_kernels.profile.reference import apart, known


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
    p = body.row_plan(o, opt)
    found = folding(body.rows, p, opt, interpret)(*_arranged(p, o, opt))["sums"]
    found = layout.from_rows(p, jnp.swapaxes(found, 3, 4))
    return found[..., 0], found[..., 1]


def _columns(body: Body, o: dict, opt, interpret, lse, weights):
    o, opt = _coarse(o, opt)
    p = body.column_plan(o, opt)
    rows, keys = _arranged(p, o, opt)
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


def reduce(body: Body, o: dict, opt, interpret):
    o, lse, weights = apart(o, "lse", "weights")
    o = xla.without_values(o)
    forward = _Forward(body, interpret)
    return xla.differentiable(*xla.tiles.divide(o), opt, forward, lse.astype(jnp.float32), weights.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Forward:
    body: Body
    interpret: object

    def __call__(self, o, opt, lse, weights):
        return _reduce(self.body, self.interpret, o, opt, lse, weights)


def profile(body: Body, o: dict, opt, interpret):
    o, weights = apart(o, "weights")
    lse = _log_mass(*xla.tiles.divide(xla.without_values(o)), opt, body, interpret)
    return reduce(body, o | known(lse, weights), opt, interpret)[0], lse


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
