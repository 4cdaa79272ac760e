"""Block-list attention: a causal call in bfloat16, lists of any units."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases import Sizes
from jaxattn.core import mask as masks
from pallas_kernels import flash as op

DIFFERENTIABLE = True


def operands(sizes: Sizes, sharding) -> tuple[dict, dict, op.Options]:
    """(floats, ints, static options) of the call, as shapes."""
    n, g = sizes.tokens, sizes.kv_heads
    lists = {"shared": 1, "kv heads": g, "query heads": sizes.heads}[sizes.lists]
    tiles = -(-n // sizes.block)

    def shape(dtype, *size):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    floats = {
        "q": shape(jnp.bfloat16, 1, n, sizes.heads, sizes.head_dim),
        "k": shape(jnp.bfloat16, 1, n, g, sizes.head_dim),
        "v": shape(jnp.bfloat16, 1, n, g, sizes.head_dim),
    }
    ints = {
        "index": shape(jnp.int32, 1, lists, tiles, sizes.entries),
        "count": shape(jnp.int32, 1, lists, tiles),
        "k_valid": shape(jnp.bool_, 1, n),
        "q_fields": {"pos": shape(jnp.int32, 1, n)},
        "k_fields": {"pos": shape(jnp.int32, 1, n)},
    }
    static = op.Options(masks.causal(), scale=sizes.head_dim**-0.5, unit=sizes.block, tile=sizes.block)
    return floats, ints, static


def case(sizes: Sizes, sharding, implementation: str) -> tuple[dict, dict, dict]:
    floats, ints, static = operands(sizes, sharding)
    return floats, ints, {"forward": lambda floats, ints: op.flash(floats | ints, static, implementation)}
