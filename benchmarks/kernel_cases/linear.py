"""Linear attention in bfloat16 with a decay of any kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases import Sizes
from pallas_kernels import linear as op

DIFFERENTIABLE = True


def case(sizes: Sizes, sharding, implementation: str) -> tuple[dict, dict, dict]:
    n, h, d = sizes.tokens, sizes.heads, sizes.head_dim

    def shape(dtype, *size):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    floats = {"q": shape(jnp.bfloat16, 1, n, h, d), "state": shape(jnp.float32, 1, h, d, d)}
    floats |= {x: shape(jnp.bfloat16, 1, n, sizes.kv_heads, d) for x in ("k", "v")}
    decay = {"none": None, "head": (h,), "token": (1, n, h), "channel": (1, n, h, d)}[sizes.decay]
    if decay:
        floats["log_decay"] = shape(jnp.float32, *decay)

    def forward(floats, ints):
        return op.linear(floats, op.Options(scale=d**-0.5), implementation)

    return floats, {}, {"forward": forward}
