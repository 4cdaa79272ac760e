"""Block-list attention: a causal call in bfloat16, lists of any units."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cases import Sizes, Tunable
from jaxattn.core import mask as masks
from jaxattn.core.attend import attend
from pallas_kernels import _tuned
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


def _choices(**sizes) -> tuple[dict[str, int], ...]:
    return tuple(dict(zip(sizes, x, strict=True)) for x in itertools.product(*sizes.values()))


def tuning(sizes: Sizes, dtype: str, implementation: str) -> list[Tunable]:
    """The dense causal call's tiles in XLA; rows and keys that a kernel holds, of a call with lists of random units."""
    n, h, g, d = sizes.tokens, sizes.heads, sizes.kv_heads, sizes.head_dim
    q, k, v = (jax.random.normal(jax.random.key(i), (1, n, x, d), dtype) for i, x in enumerate((h, g, g)))
    width = _tuned.width(d)
    if implementation == "xla":

        def dense(q, k, v):
            return attend(q, k, v, mask=masks.causal(), implementation="xla").out

        return [Tunable(width, dtype, _choices(tile=(64, 128, 256), unit=(128, 256, 512, 1024)), dense, (q, k, v))]
    _, shapes, static = operands(sizes, None)
    index, rng = shapes["index"].shape, np.random.default_rng(0)
    units = -(-n // sizes.block)
    picked = [np.sort(rng.permutation(units)[: index[3]]) for _ in range(index[1] * index[2])]
    fields = {"pos": jnp.arange(n, dtype=jnp.int32)[None]}
    ints = {"index": jnp.asarray(np.reshape(picked, index), jnp.int32), "count": jnp.full(index[:3], index[3], jnp.int32),
            "k_valid": jnp.ones((1, n), bool), "q_fields": fields, "k_fields": fields}  # fmt: skip

    def forward(q, k, v):
        return op.flash({"q": q, "k": k, "v": v} | ints, static, implementation)[0]

    def gradient(*of):
        return lambda *args: jax.grad(lambda *args: forward(*args).astype(jnp.float32).sum(), of)(*args)

    if implementation == "tpu":
        held = _choices(rows=(256, 512, 1024), keys=(256, 512, 1024))
        return [Tunable(width, dtype, held, gradient(0, 1, 2), (q, k, v))]
    held = _choices(rows=(32, 64, 128), keys=(32, 64, 128), warps=(4, 8), stages=(1, 2, 3))
    programs = {"forward": forward, "queries": gradient(0), "keys": gradient(1, 2)}
    return [Tunable(f"{kernel} {width}", dtype, held, f, (q, k, v)) for kernel, f in programs.items()]
