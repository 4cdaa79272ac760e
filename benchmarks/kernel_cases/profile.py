"""Column sums of a causal call over lists of any units, and the diagonals of its last rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases import Sizes, flash
from pallas_kernels import profile as op

DIFFERENTIABLE = True
LAST = 128  # rows whose diagonals are summed


def case(sizes: Sizes, sharding, implementation: str) -> tuple[dict, dict, dict]:
    floats, ints, static = flash.operands(sizes, sharding)
    floats = {x: floats[x] for x in ("q", "k")}
    floats["weights"] = jax.ShapeDtypeStruct((1, sizes.tokens, sizes.heads), jnp.float32, sharding=sharding)

    def columns(floats, ints):
        return op.profile({x: floats[x] for x in ("q", "k")} | ints, static, floats["weights"], implementation)

    def diagonals(floats, ints):
        return op.diagonals(floats["q"][:, -LAST:], floats["k"], implementation=implementation)

    return floats, ints, {"forward": columns, "diagonals": diagonals}
