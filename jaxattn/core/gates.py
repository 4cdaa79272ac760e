"""Factors on the rows of an attention: on q, k, v before it, on the heads' outputs after it.

    out_i = a_i * attention(r_i q_i, s_j k_j, c_j v_j)

Temperatures, conservation flows, head routers and output gates differ only in where their factors come from.
"""

import jax
import jax.numpy as jnp

from jaxattn.core.types import data


@data
class Gates:
    """Optional factors per token and head; None leaves a side untouched.

    Attributes:
        q: [B|1, N|1, H|1], or with channels [..., D].
        k, v: the same for the M keys and the kv heads.
        out: the same for the outputs, channels Dv.
    """

    q: jax.Array | None = None
    k: jax.Array | None = None
    v: jax.Array | None = None
    out: jax.Array | None = None

    def before(self, q, k, v):
        """Gated (q, k, v), each [B, tokens, heads, channels]."""
        return scale_rows(q, self.q), scale_rows(k, self.k), scale_rows(v, self.v)

    def after(self, out):
        """Gated output [B, N, H, Dv]."""
        return scale_rows(out, self.out)


def scale_rows(x, factor):
    """x [B, N, H, D] times [B|1, N|1, H|1] or [B|1, N|1, H|1, D|1]; None is 1. Keeps the dtype of x."""
    if factor is None:
        return x
    factor = jnp.asarray(factor)
    wide = factor[..., None] if factor.ndim == x.ndim - 1 else factor
    if wide.ndim != x.ndim or any(f not in (1, n) for f, n in zip(wide.shape, x.shape, strict=True)):
        want = f"one that broadcasts to {x.shape[:-1]} or {x.shape}"
        raise ValueError(f"factor: expected {want}, got {factor.shape}")
    return _times(x, wide)


def head_gain(out, gain):
    """Head outputs [B, N, H, Dv] times a gain per head [H], per example [B, H] or per token [B, N, H]."""
    gain = jnp.asarray(gain)
    if gain.ndim not in (1, 2, 3):
        raise ValueError(f"gain: expected [H], [B, H] or [B, N, H], got {gain.shape}")
    gain = {1: lambda g: g[None, None], 2: lambda g: g[:, None], 3: lambda g: g}[gain.ndim](gain)
    return scale_rows(out, gain)


def tanh_gate(y, alpha):
    """y * tanh(alpha): a branch that starts closed where alpha is initialised at 0 (Flamingo,
    arXiv:2204.14198).

    alpha: a scalar, or anything that broadcasts to y.
    """
    return _times(y, jnp.tanh(jnp.asarray(alpha)))


def sigmoid_gate(out, logits):
    """Head outputs [B, N, H, Dv] times sigmoid(logits): [B, N, H] headwise or [B, N, H, Dv] elementwise."""
    return scale_rows(out, jax.nn.sigmoid(logits.astype(jnp.result_type(jnp.float32, logits.dtype))))


def _times(x, factor):
    wide = jnp.result_type(jnp.float32, x.dtype)  # round the product once, not the factor too
    return (x.astype(wide) * factor).astype(x.dtype)
