"""Turning channel pairs of gathered keys: x cos + partner(x) sin, with one frequency per channel."""

from __future__ import annotations

import jax.numpy as jnp


def channels(freqs, width: int, layout: str):
    """float [width]: the frequency of each channel, 0 for those that do not turn."""
    both = jnp.concatenate([freqs, freqs]) if layout == "half" else jnp.repeat(freqs, 2)
    return jnp.pad(both, (0, width - both.shape[0]))


def partner(x, r: int, layout: str):
    """The other channel of each pair, negative where it is the second: [..., D] -> [..., D], 0 outside the first 2 r."""
    if layout == "half":
        turned = jnp.concatenate([-x[..., r : 2 * r], x[..., :r]], -1)
    else:
        turned = jnp.stack([-x[..., 1 : 2 * r : 2], x[..., : 2 * r : 2]], -1).reshape(*x.shape[:-1], 2 * r)
    return jnp.concatenate([turned, jnp.zeros_like(x[..., 2 * r :])], -1)


def turn(x, angle_per, freqs, layout: str, scale: float):
    """x [..., L, D] turned by ``angle_per`` [..., L] times ``freqs`` [R]; in x's dtype, computed in at least float32."""
    acc = jnp.promote_types(x.dtype, jnp.float32)
    r, wide = freqs.shape[0], x.astype(acc)
    angle = angle_per[..., None].astype(acc) * channels(freqs.astype(acc), x.shape[-1], layout)
    factor = jnp.where(jnp.arange(x.shape[-1]) < 2 * r, scale, 1.0).astype(acc)
    return ((wide * jnp.cos(angle) + partner(wide, r, layout) * jnp.sin(angle)) * factor).astype(x.dtype)


def pairing(width: int, r: int, layout: str, rows, columns):
    """Entry (rows, columns) of the matrix P with x @ P = partner(x), for kernels that have no lane shuffles."""
    if layout == "half":
        first = (columns < r) & (rows == columns + r)
        second = (columns >= r) & (columns < 2 * r) & (rows == columns - r)
    else:
        even = (columns & 1) == 0
        first = even & (rows == columns + 1) & (columns < 2 * r)
        second = ((columns & 1) == 1) & (rows == columns - 1) & (columns < 2 * r)
    return jnp.where(second, 1.0, jnp.where(first, -1.0, 0.0))
