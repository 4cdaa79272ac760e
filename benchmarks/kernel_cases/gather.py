"""Attention over lists in bfloat16: decoding from a cache of ``tokens`` keys (every key, lists of blocks, lists of
tokens), and token-level top-k, where each of ``tokens`` queries has its own list of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases import Sizes
from pallas_kernels import gather as op

DIFFERENTIABLE = True
BLOCKS, TOKENS = 16, 2048  # entries of a list


def case(sizes: Sizes, sharding, implementation: str) -> tuple[dict, dict, dict]:
    m, h, g, d = sizes.tokens, sizes.heads, sizes.kv_heads, sizes.head_dim

    def shape(dtype, *size):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    floats = {
        "q": shape(jnp.bfloat16, 1, m, h, d),
        "k": shape(jnp.bfloat16, 1, g, m, d),  # as a cache is stored
        "v": shape(jnp.bfloat16, 1, g, m, d),
    }
    ints = {
        "rows": {"index": shape(jnp.int32, 1, 1, m, TOKENS), "count": shape(jnp.int32, 1, 1, m)},
        "blocks": {"index": shape(jnp.int32, 1, g, 1, BLOCKS), "count": shape(jnp.int32, 1, g, 1)},
        "tokens": {"index": shape(jnp.int32, 1, g, 1, TOKENS), "count": shape(jnp.int32, 1, g, 1)},
        "k_valid": shape(jnp.bool_, 1, m),
    }

    def program(name: str | None, unit: int, queries: int | None):
        options = op.Options(scale=d**-0.5, unit=unit, distinct=True)

        def run(floats, ints):
            heads_last = {x: jnp.swapaxes(floats[x], 1, 2) for x in ("k", "v")}
            o = {"q": floats["q"][:, :queries]} | heads_last | (ints[name] if name else {})
            if queries is not None:
                o["k_valid"] = ints["k_valid"]
            return op.gather(o, options, implementation)[:2]

        return run

    programs = {
        "forward": program("rows", 1, None),
        "decode": program(None, sizes.block, 1),
        "decode blocks": program("blocks", sizes.block, 1),
        "decode tokens": program("tokens", 1, 1),
    }
    return floats, ints, programs
