"""Averages over tokens and grids, and resizing of grids: fixed linear maps along an axis."""

import jax.numpy as jnp
import numpy as np


def mean_pool(x, unit, *, axis=1, valid=None):
    """Means of consecutive runs of `unit` entries of an axis.

    Args:
        x: [..., N, ...].
        unit: entries per mean. The last mean covers what is left.
        axis: the axis of N.
        valid: bool [B|1, N] for x [B, N, ...] (axis 1 only); other entries do not count, a run without any
            gives 0.

    Returns:
        [..., ceil(N / unit), ...] in the dtype of x; summed in at least float32.
    """
    if unit < 1:
        raise ValueError(f"unit: expected a positive number of entries, got {unit}")
    axis = axis % x.ndim
    if valid is not None and (axis != 1 or valid.ndim != 2 or valid.shape[1] != x.shape[1]):
        raise ValueError(f"valid: expected [B, N] for x {x.shape} pooled along axis 1, got {valid.shape}")
    n = x.shape[axis]
    shape = [1] * x.ndim
    shape[axis] = n
    weight = jnp.ones(shape, _wide(x))
    if valid is not None:
        weight = valid.astype(weight.dtype).reshape(*valid.shape, *[1] * (x.ndim - 2))
    total, count = (_runs(t, unit, axis) for t in (jnp.where(weight > 0, x.astype(weight.dtype), 0), weight))
    return (total / jnp.maximum(count, 1)).astype(x.dtype)


def adaptive_avg_pool_2d(x, out_hw):
    """Average pooling of a grid to a given size: bin i covers floor(i h / H') to ceil((i + 1) h / H')
    exclusively.

    Args:
        x: [..., h, w, C]. out_hw: (H', W'), any sizes (larger than the grid repeats cells).

    Returns:
        [..., H', W', C] in the dtype of x.
    """
    return _separable(x, out_hw, _average_bins)


def bilinear_resize(x, out_hw):
    """Bilinear resizing with half-pixel centres, edges clamped and no antialiasing (align_corners=False).

    Args:
        x: [..., h, w, C]. out_hw: (H', W').

    Returns:
        [..., H', W', C] in the dtype of x. Unlike `jax.image.resize`, shrinking reads the two nearest cells
        only.
    """
    return _separable(x, out_hw, _two_nearest)


def _average_bins(n, m):
    i = np.arange(m)
    start, end = i * n // m, -(-(i + 1) * n // m)
    j = np.arange(n)
    inside = (j >= start[:, None]) & (j < end[:, None])
    return inside / inside.sum(1, keepdims=True)


def _two_nearest(n, m):
    source = np.maximum((np.arange(m) + 0.5) * n / m - 0.5, 0)
    low = np.minimum(source.astype(int), n - 1)
    high = np.minimum(low + 1, n - 1)
    matrix = np.zeros((m, n))
    np.add.at(matrix, (np.arange(m), low), 1 - (source - low))
    np.add.at(matrix, (np.arange(m), high), source - low)
    return matrix


def _separable(x, out_hw, matrix):
    if x.ndim < 3:
        raise ValueError(f"x: expected [..., h, w, C], got {x.shape}")
    if len(out_hw) != 2 or min(out_hw) < 1:
        raise ValueError(f"out_hw: expected two positive sizes, got {out_hw}")
    h, w = x.shape[-3:-1]
    rows, cols = (jnp.asarray(matrix(n, m), _wide(x)) for n, m in ((h, out_hw[0]), (w, out_hw[1])))
    out = jnp.einsum("ph,...hwc->...pwc", rows, x.astype(_wide(x)))
    return jnp.einsum("qw,...pwc->...pqc", cols, out).astype(x.dtype)


def _runs(x, unit, axis):
    n = x.shape[axis]
    pieces = -(-n // unit)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, pieces * unit - n)
    x = jnp.pad(x, pad)
    return jnp.sum(x.reshape(*x.shape[:axis], pieces, unit, *x.shape[axis + 1 :]), axis=axis + 1)


def _wide(x):
    return jnp.result_type(jnp.float32, x.dtype)
