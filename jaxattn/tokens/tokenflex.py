"""TokenFLEX: one projector for every number of visual tokens ("TokenFLEX: Unified VLM Training for Flexible Visual Tokens
Inference").

The tower's g x g rows are averaged to n x n (bins as in adaptive average pooling: floor(i g / n) to ceil((i + 1) g / n)), and
Y = W3 (SiLU(W1 x) * (W2 x)) with x the normed averages takes the place of the model's projector, the same weights for every
n. In training (phase "train") each step draws its number of tokens from ``sizes``: all are one program, whose rows are those
of the largest and whose surplus is not valid. Behind, any square number goes, also one that was never trained.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.maps import dense, init_dense, init_norm, normed
from jaxattn.core.pooling import adaptive_avg_pool_2d
from jaxattn.core.reduce import reduce_merge, valid_rows
from jaxattn.core.types import Array, Need, Spec, contract, expect
from jaxattn.registry import register


def side_of(tokens: int) -> int:
    """n of n^2 tokens."""
    side = math.isqrt(tokens)
    expect("tokens", tokens, "a square number, at least 1", tokens >= 1 and side * side == tokens)
    return side


def pool_grid(x: Array, tokens: int) -> Array:
    """Rows of a square grid x [B, g * g, C], averaged to [B, tokens, C]."""
    b, n, c = x.shape
    grid = side_of(n)
    return adaptive_avg_pool_2d(x.reshape(b, grid, grid, c), (side_of(tokens),) * 2).reshape(b, tokens, c)


def init_projector(key, width: int, dim: int, hidden: int) -> dict:
    """Parameters of the projector from ``width`` to ``dim`` channels: norm, gate, up [width, hidden], down [hidden, dim]."""
    a, b, c = jax.random.split(key, 3)
    return {"norm": init_norm(width), "gate": init_dense(a, width, hidden), "up": init_dense(b, width, hidden),
            "down": init_dense(c, hidden, dim)}  # fmt: skip


def gated_project(params: dict, x: Array) -> Array:
    """Averages x [B, N, width] -> [B, N, dim]."""
    x = normed(params["norm"], x)
    return dense(params["down"], jax.nn.silu(dense(params["gate"], x)) * dense(params["up"], x))


def cell_of(n: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(slot int32 [n], the average nearest to each of the n rows; index int32 [tokens], the row in each bin's middle)."""
    g, s = side_of(n), side_of(tokens)
    of = np.arange(g) * s // g
    start, end = np.arange(s) * g // s, -(-(np.arange(s) + 1) * g // s)
    middle = (start + end - 1) // 2
    return (of[:, None] * s + of).reshape(-1).astype(np.int32), (middle[:, None] * g + middle).reshape(-1).astype(np.int32)


@contract
class _TokenFlex:
    keep: int | None = None
    sizes: tuple = (64, 144, 256)
    weights: tuple | None = None
    hidden: int = 0

    place = "project"

    def check(self):
        expect("sizes", self.sizes, "square numbers, at least one", len(self.sizes) > 0)
        for n in (*self.sizes, *(() if self.keep is None else (self.keep,))):
            side_of(n)
        ok = self.weights is None or (len(self.weights) == len(self.sizes) and min(self.weights) >= 0 < sum(self.weights))
        expect("weights", self.weights, "one share per size, at least 0", ok)

    def needs(self):
        return (Need("features", what="features"),)

    def rows(self, n):
        return max(self.sizes) if self.keep is None else self.keep

    def init(self, key, spec: Spec) -> dict:
        """From the tower's width ``spec.features`` to the language model's, ``spec.dim``."""
        expect("spec.features", spec.features, "the tower's width: the site 'project'", spec.features > 0)
        return init_projector(key, spec.features, spec.dim, self.hidden or 2 * spec.dim)

    def apply(self, params, state, tokens, evidence, ctx):
        b, n, _ = tokens.x.shape
        features, places, left = evidence["features"], evidence.get("places"), self.rows(n)
        expect("tokens", f"{n} rows", f"the tower's {features.shape[1]}, in order: nothing reduced before",
               n == features.shape[1] and n == side_of(n) ** 2)  # fmt: skip
        places = None if places is None else places[None].astype(features.dtype)

        def pooled(size):
            """(averages, their learned positions, slots, rows they stand on), all as long as the largest."""
            slot, index = cell_of(n, size)
            fill = lambda x: jnp.pad(x, [(0, 0), (0, left - size), (0, 0)])  # noqa: E731
            at = jnp.zeros((1, left, 0)) if places is None else fill(pool_grid(places, size))
            return fill(pool_grid(features, size)), at, jnp.asarray(slot), jnp.asarray(np.pad(index, (0, left - size)))

        drawn = self.keep is None and len(self.sizes) > 1 and ctx.phase == "train" and ctx.key is not None
        if drawn:
            share = jnp.ones(len(self.sizes)) if self.weights is None else jnp.asarray(self.weights)
            which = jax.random.choice(ctx.key, len(self.sizes), p=share / share.sum())
            x, at, slot, index = jax.lax.switch(which, [lambda s=s: pooled(s) for s in self.sizes])
            count = jnp.asarray(self.sizes)[which]
        else:
            count = left
            x, at, slot, index = pooled(left)
        y = gated_project(params, x)
        y = y if places is None else y + at.astype(y.dtype)
        live = jnp.arange(left) < count
        seen = valid_rows(tokens).any(-1, keepdims=True)
        wide = lambda a: jnp.broadcast_to(a, (b, *a.shape))  # noqa: E731
        out = reduce_merge(tokens, jnp.where(live[:, None], y, 0).astype(tokens.x.dtype), wide(slot), wide(index), wide(live))
        return out.replace(meta=out.meta.replace(valid=wide(live) & seen)), state, {"count": count}


@register("tokens")
def tokenflex(keep: int | None = None, sizes: tuple[int, ...] = (64, 144, 256), weights: tuple[float, ...] | None = None,
              hidden: int = 0):
    """Project a square grid of visual rows as fewer, by one projector for all numbers of tokens. For the site "project",
    where it takes the place of the model's projector (learned positions behind that are averaged alike and added).

    Args:
      keep: tokens, a square number; None: what training draws from ``sizes``, the largest outside training.
      sizes: square numbers drawn in training.  weights: how often, None: alike.
      hidden: width of the gated layer, 0: twice the language model's.
    Its parameters are trained arrays of the bound model: the same for every ``keep``.
    """  # fmt: skip
    return _TokenFlex(keep, sizes, weights, hidden)


__all__ = ["cell_of", "gated_project", "init_projector", "pool_grid", "side_of", "tokenflex"]
