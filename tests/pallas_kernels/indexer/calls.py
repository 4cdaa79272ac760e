"""Calls of the indexer for the tests of its bodies. Small whole numbers: scores are exact in every order of summation and
many of them are equal, so that bodies must agree to the last index."""

import jax.numpy as jnp
import numpy as np

from jaxattn.core import mask as masks
from jaxattn.core.mask import tile_intervals
from jaxattn.core.types import Meta
from pallas_kernels.indexer import Options


def call(rng, *, n, units, k, b=1, h=1, g=1, d=8, unit=1, heads="each", gate=None, weight=False, mask=None, padded=0,
         dtype=jnp.float32, labels=False):  # fmt: skip
    """(operands, options): ``unit`` keys per unit, queries at the end of them, the last ``padded`` keys invalid."""

    def array(*shape):
        return jnp.asarray(rng.integers(-2, 3, size=shape), dtype)

    m = units * unit
    q_meta = Meta.of(n, pos=np.arange(n, dtype=np.int32)[None] + m - n, valid=np.arange(n)[None] != n // 2)
    valid = np.arange(m)[None] < m - padded * np.arange(b)[:, None]
    extra = {"seg": rng.integers(0, 2, size=(b, m)).astype(np.int32)} if labels else {}
    k_meta = Meta.of(m, valid=valid, **extra)
    if labels:
        q_meta = q_meta.replace(labels={"seg": rng.integers(0, 2, size=(b, n)).astype(np.int32)})
    o = {"q": array(b, n, h, d), "k": array(b, units, g, d)}
    if weight:
        o["weight"] = array(b, n, h).astype(jnp.float32)
    names = mask.fields() if mask is not None else ()
    o["q_valid"] = jnp.asarray(q_meta.valid)
    o["k_valid"] = jnp.asarray(k_meta.valid).reshape(b, units, unit).any(-1)
    for side, meta, size in (("q", q_meta, 1), ("k", k_meta, unit)):
        ends = tile_intervals(meta, names, size, side)
        for i, end in enumerate(("low", "high")):
            o[f"{side}_{end}"] = {x: jnp.asarray(a[i]).reshape(a[i].shape[0], -1) for x, a in ends.items()}
    return o, Options(k, mask, heads, gate, 0.5)


CALLS = {
    "one query, all units": dict(n=1, units=17, k=40),
    "17 units, causal, a list per head": dict(n=17, units=17, k=5, b=2, h=4, g=2, mask=masks.causal(), padded=3),
    "127 blocks of 8 keys, the sum of a group, labels": dict(
        n=9, units=127, k=20, unit=8, h=4, g=2, heads="sum", mask=masks.causal() & masks.same("seg"), labels=True
    ),
    "129: ReLU, weights, bfloat16": dict(
        n=10, units=129, k=16, b=2, h=6, heads="sum", gate="relu", weight=True, mask=masks.causal(), dtype=jnp.bfloat16
    ),
    "1000: the largest of a group": dict(n=3, units=1000, k=130, h=4, g=2, heads="max", weight=True, padded=40),
}
