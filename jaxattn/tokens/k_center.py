"""k-center over features and places: the baseline that a method of diversity has to beat.

Tokens are compared by

    s_ij = (cos(x_i, x_j) + spread * mean over rows and columns of cos(pi (p_i - p_j) / extent)) / (1 + spread)

and picked one by one, each the token least like the nearest pick (Gonzalez' greedy, within twice of the best covering
radius). With spread = 0 two equal things are one: of two pictured 3s one is dropped. Places tell them apart.
The default lies where the digit models are flat, on training and on held-out scenes: 0.5 to 3 are alike, 0 is 2 points lower.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.reduce import check_budget, count_of, dispose, label, picked, rows_left, valid_rows
from jaxattn.core.select import diverse, unit_rows
from jaxattn.core.types import Array, Tokens, contract, expect, operand
from jaxattn.registry import register


def placed(tokens: Tokens, spread) -> Array:
    """[B, N, D + 4], rows whose inner products are (1 + spread) s_ij; without labels "row" and "col", unit rows."""
    x, valid = unit_rows(jax.lax.stop_gradient(tokens.x)), valid_rows(tokens)
    parts = [x]
    for axis in ("row", "col"):
        if axis in tokens.meta.labels:
            place = label(tokens, axis)
            last = jnp.max(jnp.where(valid, place, 0), axis=-1, keepdims=True)
            angle = jnp.pi * place / jnp.maximum(last, 1)
            parts += [jnp.sqrt(spread / 2) * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1).astype(x.dtype)]
    return jnp.concatenate(parts, -1)


@contract
class _KCenter:
    keep: int = operand("budget")
    spread: float = operand("scalar", 2.0)
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)
        expect("spread", self.spread, "0 or more", self.spread >= 0)

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        n, valid = tokens.x.shape[1], valid_rows(tokens)
        count, k = count_of(params, n), min(rows_left(self.keep, n, "keep"), n)
        rows = placed(tokens, params["spread"])
        live = valid[..., None]
        middle = jnp.where(live, rows, 0).sum(1, keepdims=True) / jnp.maximum(live.sum(1, keepdims=True), 1)
        first = jnp.argmin(jnp.where(valid, jnp.sum(rows * middle, -1), jnp.inf), axis=-1)
        picks = jax.vmap(lambda z, p, ok: diverse(z, k, first=p, forbidden=~ok))(rows, first, valid)
        return dispose(tokens, picked(picks, count, valid), self.rows(n), self.mode, self.positions), state, {}


@register("tokens")
def k_center(keep: int, spread: float = 2.0, mode: str = "keep", positions: str = "original"):
    """``keep`` tokens, each unlike those before it in what it shows and where it stands. Reads no attention.

    Args:
      keep: tokens per image.  spread: weight of the places (labels "row" and "col") beside the features' cosine; 0: features
        alone. The first pick is the token least like the image's mean.
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    """
    return _KCenter(keep, spread, mode, positions)
