"""ZOO-Prune: tokens to which the projector responds, unlike each other ("Training-Free Token Pruning via Zeroth-Order
Gradient Estimation in Vision-Language Models").

With M the projector, x_i its inputs, z_i = M(x_i) and u_1..u_m random unit directions shared by all tokens:

    S_i = mean_j | (M(x_i + h u_j) - M(x_i - h u_j)) / 2h |           an estimate of E_u |J(x_i) u|
    picks: argmax S first, then argmax S_hat_i (1 - max_{p picked} cos(z_i, z_p)),   S_hat = S scaled to [0, 1]
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxattn.core.reduce import check_budget, count_of, dispose, picked, rows_left, valid_rows
from jaxattn.core.select import diverse
from jaxattn.core.types import Array, Need, contract, expect, operand
from jaxattn.registry import register


def unit_directions(key: Array, m: int, width: int, dtype=jnp.float32) -> Array:
    """[m, width] directions of length 1, uniform on the sphere."""
    u = jax.random.normal(key, (m, width), dtype)
    return u / jnp.linalg.norm(u, axis=-1, keepdims=True)


def sensitivity(fn: Callable[[Array], Array], x: Array, directions: Array, h=0.01) -> Array:
    """[..., N], at least float32: mean over the directions of the length of the central difference of ``fn`` at x.

    Args:
      fn: maps rows [..., N, C] to rows [..., N, D], each by itself.  x: [..., N, C].
      directions: [m, C], one pair of passes each.  h: step.
    """
    expect("directions", f"shape {directions.shape}", f"[m, {x.shape[-1]}]",
           directions.ndim == 2 and directions.shape[1] == x.shape[-1])  # fmt: skip
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(wide)

    def one(total, u):
        step = h * u.astype(wide)
        delta = (fn(x + step).astype(wide) - fn(x - step).astype(wide)) / (2 * h)
        return total + jnp.linalg.norm(delta, axis=-1), None

    total, _ = jax.lax.scan(one, jnp.zeros(x.shape[:-1], wide), directions)
    return total / directions.shape[0]


def zoo_prune_picks(sensitivities: Array, vision: Array, k: int, *, valid: Array | None = None) -> Array:
    """int32 [k]: picks in their order. sensitivities [N], vision [N, D] projector output, valid bool [N]."""
    valid = jnp.ones(sensitivities.shape, bool) if valid is None else valid
    low = jnp.min(sensitivities, where=valid, initial=jnp.inf)
    high = jnp.max(sensitivities, where=valid, initial=-jnp.inf)
    scaled = (sensitivities - low) / jnp.where(high > low, high - low, 1.0)
    # Where all respond alike the scaled values are 0 and diversity alone decides.
    scaled = jnp.where(high > low, scaled, 1.0)
    first = jnp.argmax(jnp.where(valid, scaled, -jnp.inf))
    return diverse(vision, k, first=first, weight=scaled, forbidden=~valid)


def zoo_prune_select(fn: Callable[[Array], Array], x: Array, directions: Array, k: int, *, h=0.01) -> Array:
    """int32 [B, k] ascending: the tokens that ZOO-Prune keeps of x [B, N, C], the input of the projector ``fn``."""
    s, z = sensitivity(fn, x, directions, h), fn(x)
    return jnp.sort(jax.vmap(lambda s, z: zoo_prune_picks(s, z, k))(s, z), axis=-1)


@contract
class _ZOOPrune:
    keep: int = operand("budget")
    directions: int = 64
    h: float = operand("scalar", 0.01)
    seed: int = operand("int", 0)
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)
        expect("directions", self.directions, "at least 1", self.directions >= 1)
        expect("h", self.h, "a step above 0", self.h > 0)

    def needs(self):
        return (Need("features", what="features"),)

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        n, valid = tokens.x.shape[1], valid_rows(tokens)
        for name in ("features", "project"):
            expect("evidence", sorted(k for k in evidence if evidence[k] is not None) or "none", f"the entry {name!r}",
                   evidence.get(name) is not None)  # fmt: skip
        features = jax.lax.stop_gradient(evidence["features"])
        ok = features.ndim == 3 and features.shape[:2] == valid.shape
        expect("evidence['features']", f"shape {tuple(features.shape)}", f"[{valid.shape[0]}, {n}, C]", ok)
        count, k = count_of(params, n), min(rows_left(self.keep, n, "keep"), n)
        u = unit_directions(jax.random.key(params["seed"]), self.directions, features.shape[-1])
        project = lambda x: jax.lax.stop_gradient(evidence["project"](x))  # noqa: E731
        scores = sensitivity(project, features, u, params["h"])
        x = jax.lax.stop_gradient(tokens.x)
        picks = jax.vmap(lambda s, z, ok: zoo_prune_picks(s, z, k, valid=ok))(scores, x, valid)
        return dispose(tokens, picked(picks, count, valid), self.rows(n), self.mode, self.positions), state, {"scores": scores}


@register("tokens")
def zoo_prune(keep: int, directions: int = 64, h: float = 0.01, seed: int = 0, mode: str = "keep",
              positions: str = "original"):
    """Keep the ``keep`` image tokens that the projector responds to and that differ. For the site "project".

    Args:
      keep: image tokens per image.  directions: random directions, two passes of the projector each (16 to 160 give
        the same choices in the paper).  h: step of the difference.  seed: of the directions.
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    Evidence: "features" [B, N, C], the projector's input; "project", the projector as a function of such rows.
    """  # fmt: skip
    return _ZOOPrune(keep, directions, h, seed, mode, positions)
