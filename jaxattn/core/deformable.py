"""Deformable attention: each query reads a few points of maps of several sizes, wherever it says."""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.types import Array, expect


def deformable_read(values: Array, shapes: tuple[tuple[int, int], ...], points: Array, weights: Array) -> Array:
    """Weighted bilinear readings of maps, per head (multi-scale deformable attention, "Deformable DETR").

    Args:
      values: [B, S, H, D], the cells of all maps in raster order, one map after the other.  shapes: (rows, columns) of each.
      points: [B, Q, H, L, P, 2], (x, y) in [0, 1] over the whole of each of the L maps; cell centres are at (i + 0.5) / n.
      weights: [B, Q, H, L, P].
    Returns: [B, Q, H, D] in the dtype of values, summed in at least float32. Outside a map there are zeros.
    """
    sizes = [h * w for h, w in shapes]
    expect("values", f"shape {values.shape}", f"[batch, {sum(sizes)}, heads, D], the cells of {shapes}",
           values.ndim == 4 and values.shape[1] == sum(sizes))  # fmt: skip
    b, _, heads, d = values.shape
    ok = points.ndim == 6 and points.shape[::2] == (b, heads, points.shape[4]) and points.shape[3] == len(shapes)
    expect("points", f"shape {points.shape}", f"[{b}, queries, {heads}, {len(shapes)}, points, 2]", ok and points.shape[5] == 2)
    expect("weights", f"shape {weights.shape}", f"{points.shape[:-1]}", weights.shape == points.shape[:-1])
    wide = jnp.promote_types(values.dtype, jnp.float32)
    q, n = points.shape[1], points.shape[4]
    by_head = jnp.moveaxis(values, 2, 1).astype(wide)  # [B, H, S, D]
    total, start = jnp.zeros((b, heads, q, d), wide), 0
    for level, ((h, w), size) in enumerate(zip(shapes, sizes, strict=True)):
        at = points[:, :, :, level].astype(wide) * jnp.array([w, h], wide) - 0.5
        low = jnp.floor(at)
        part = at - low
        cells = by_head[:, :, start : start + size]
        for dx in (0, 1):
            for dy in (0, 1):
                x, y = low[..., 0] + dx, low[..., 1] + dy
                share = (part[..., 0] if dx else 1 - part[..., 0]) * (part[..., 1] if dy else 1 - part[..., 1])
                inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
                share = jnp.where(inside, share * weights[:, :, :, level], 0)
                index = jnp.where(inside, y * w + x, 0).astype(jnp.int32)  # [B, Q, H, P]
                flat = jnp.moveaxis(index, 2, 1).reshape(b, heads, q * n, 1)
                found = jnp.take_along_axis(cells, flat, axis=2).reshape(b, heads, q, n, d)
                total = total + jnp.einsum("bhqpd,bqhp->bhqd", found, share)
        start += size
    return jnp.moveaxis(total, 1, 2).astype(values.dtype)


__all__ = ["deformable_read"]
