"""Caches of runs of layers: segments of a stack with different numbers of rows keep a cache each, up to a number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.types import Array, State, data, static

MAX_CACHES = 4  # segments with different numbers of rows share at most this many cache stacks


@data
class CacheStack:
    """The cache of layers [start, stop): one State, leaves stacked over those layers. ``shift`` int32 [B]: what is taken
    off a new row's position before rotation where a cut renumbered the rows (None: nothing)."""

    state: State
    shift: Array | None = None
    start: int = static(0)
    stop: int = static(0)


def join_caches(stacks: list[CacheStack]) -> list[CacheStack]:
    """At most MAX_CACHES stacks, or one per numbering of the rows: neighbours with the fewest rows to lose are padded to a
    common capacity."""
    stacks = list(stacks)
    while len(stacks) > MAX_CACHES:
        widths = [_width(s) for s in stacks]
        costs = [abs(widths[i] - widths[i + 1]) for i in range(len(stacks) - 1)]
        for i, (x, y) in enumerate(zip(stacks, stacks[1:], strict=False)):
            if x.shift is not y.shift:  # one stack has one offset
                costs[i] = np.inf
        i = int(np.argmin(costs))
        if costs[i] == np.inf:
            break
        stacks[i : i + 2] = [_join(stacks[i], stacks[i + 1])]
    return stacks


def _width(stack: CacheStack) -> int:
    return max((a.shape[-2] for a in jax.tree.leaves(stack.state.layer) if a.ndim >= 5), default=0)


def _join(a: CacheStack, b: CacheStack) -> CacheStack:
    """Stack two neighbours' layers; the narrower is padded with invalid slots on its slot axis."""

    def fit(x, y):
        target = tuple(max(m, n) for m, n in zip(x.shape[1:], y.shape[1:], strict=True))
        pad = lambda z: jnp.pad(z, [(0, 0)] + [(0, t - n) for t, n in zip(target, z.shape[1:], strict=True)])  # noqa: E731
        return jnp.concatenate([pad(x), pad(y)])

    layer = jax.tree.map(fit, a.state.layer, b.state.layer)
    return CacheStack(State(layer, a.state.shared), b.shift, a.start, b.stop)
