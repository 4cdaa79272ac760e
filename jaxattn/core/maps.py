"""The small trained maps that methods bring along: dense, layer norm and RMS norm, on the usual parameter names."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.types import Array


def init_dense(key, width: int, out: int, *, bias: bool = True, std: float | None = None) -> dict:
    """{kernel [width, out], bias [out]}, normal with deviation ``std`` (None: width ** -0.5)."""
    kernel = jax.random.normal(key, (width, out)) * (width**-0.5 if std is None else std)
    return {"kernel": kernel, "bias": jnp.zeros(out)} if bias else {"kernel": kernel}


def init_norm(width: int, *, bias: bool = True) -> dict:
    """{scale [width], bias [width]}; without a bias it is an RMS norm's."""
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)} if bias else {"scale": jnp.ones(width)}


def dense(p: dict, x: Array) -> Array:
    """x [..., width] -> [..., out] in x's dtype."""
    y = x @ p["kernel"].astype(x.dtype)
    return y + p["bias"].astype(y.dtype) if "bias" in p else y


def normed(p: dict, x: Array, eps: float = 1e-5) -> Array:
    """Layer norm of x [..., width], or RMS norm where there is no bias; statistics at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if "bias" in p:
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps) * p["scale"]
    return (wide + p["bias"] if "bias" in p else wide).astype(x.dtype)


__all__ = ["dense", "init_dense", "init_norm", "normed"]
