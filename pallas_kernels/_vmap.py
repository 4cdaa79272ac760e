"""Mapping a kernel is running it on a longer batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def folding(call: Callable, b: int) -> Callable:
    """f(*trees) = ``call(b, *trees)``, under which vmap lengthens the batch of ``b``: kernels that carry state over their
    grid, or copy from arrays they do not block, cannot be mapped otherwise. Arrays have ``b`` or 1 in front, results b."""

    @jax.custom_batching.custom_vmap
    def f(*trees):
        return call(b, *trees)

    @f.def_vmap
    def rule(size, mapped, *trees):
        def fold(x, mapped):
            if not mapped and x.shape[0] == 1:
                return x
            x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            return jnp.broadcast_to(x, (size, b, *x.shape[2:])).reshape(size * b, *x.shape[2:])

        folded = (jax.tree.map(fold, tree, where) for tree, where in zip(trees, mapped, strict=True))
        found = folding(call, size * b)(*folded)
        return jax.tree.map(lambda x: x.reshape(size, b, *x.shape[1:]), found), jax.tree.map(lambda x: True, found)

    return f
