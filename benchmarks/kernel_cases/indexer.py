"""Selection of units: a lightning indexer (one index key, ReLU, weights) over every token of a causal prompt, blocks for
a list per query head, and one decoded token over a million keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases import Sizes
from jaxattn.core import mask as masks
from pallas_kernels import indexer as op

KEPT, CACHE = 2048, 1 << 20


def case(sizes: Sizes, sharding, implementation: str) -> tuple[dict, dict, dict]:
    n, heads, width = sizes.tokens, sizes.heads, sizes.head_dim
    blocks = -(-n // sizes.block)

    def shape(dtype, *size):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    def operands(n, units, kv_heads):
        floats = {"q": shape(jnp.bfloat16, 1, n, heads, width), "k": shape(jnp.bfloat16, 1, units, kv_heads, width)}
        ints = {"q_valid": shape(jnp.bool_, 1, n), "k_valid": shape(jnp.bool_, 1, units)}
        for end in ("low", "high"):
            ints |= {f"q_{end}": {"pos": shape(jnp.int32, 1, n)}, f"k_{end}": {"pos": shape(jnp.int32, 1, units)}}
        return floats, ints

    lightning = op.Options(min(KEPT, n), masks.causal(), "sum", "relu", width**-0.5)
    calls = {
        "tokens": ((n, n, 1), lightning),
        "blocks": ((blocks, blocks, sizes.kv_heads), op.Options(min(sizes.entries, blocks), masks.causal())),
        "cache": ((1, CACHE, 1), lightning),
    }
    floats, ints, programs = {}, {}, {}
    for name, (size, options) in calls.items():
        floats[name], ints[name] = operands(*size)
        if options.gate:
            floats[name]["weight"] = shape(jnp.float32, 1, size[0], heads)
        programs[name] = lambda floats, ints, x=name, o=options: op.select(floats[x] | ints[x], o, implementation)

    def learned(floats, ints):
        values = lambda f: programs["tokens"]({"tokens": f}, ints)[2]  # noqa: E731
        return jax.grad(lambda f: jnp.sum(jnp.maximum(values(f), 0.0)))(floats["tokens"])

    return floats, ints, programs | {"gradient": learned}
