"""Depthwise convolutions as shifted multiplies.

Every tap is one slice and one product: kernels may differ per example at no extra cost, and no backend's
grouped convolution (slow on most) is involved.
"""

import jax.numpy as jnp


def depthwise_conv2d(x, kernel, bias=None, *, dilation=1):
    """Depthwise cross-correlation of a grid, zero padding, same size.

    Args:
        x: [B, h, w, C].
        kernel: [kh, kw, C], or [B, kh, kw, C] with one kernel per example; odd sizes.
        bias: [C] or None.
        dilation: distance of the taps in cells.

    Returns:
        [B, h, w, C] in the dtype of x; summed in at least float32.
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected [B, h, w, C], got {x.shape}")
    fits = kernel.ndim in (3, 4) and kernel.shape[-1] == x.shape[-1]
    fits = fits and all(n % 2 for n in kernel.shape[-3:-1])
    if not fits or (kernel.ndim == 4 and kernel.shape[0] not in (1, x.shape[0])):
        want = f"odd [kh, kw, C] or [B, kh, kw, C] for x {x.shape}"
        raise ValueError(f"kernel: expected {want}, got {kernel.shape}")
    wide = jnp.result_type(jnp.float32, x.dtype)
    h, w = x.shape[1:3]
    kh, kw = kernel.shape[-3:-1]
    up, left = kh // 2 * dilation, kw // 2 * dilation
    padded = jnp.pad(x, ((0, 0), (up, up), (left, left), (0, 0))).astype(wide)
    taps = (kernel if kernel.ndim == 4 else kernel[None]).astype(wide)
    out = jnp.zeros(x.shape, wide) if bias is None else jnp.broadcast_to(bias.astype(wide), x.shape)
    for i in range(kh):
        for j in range(kw):
            top, side = i * dilation, j * dilation
            out = out + padded[:, top : top + h, side : side + w] * taps[:, i, j, None, None]
    return out.astype(x.dtype)


def short_conv(x, kernel, bias=None, *, state=None):
    """Causal depthwise convolution over tokens, in pieces of any length.

    Args:
        x: [B, N, C].
        kernel: [K, C]; kernel[K - 1] meets the current token (the order of a left-padded torch Conv1d).
        bias: [C] or None.
        state: [B, K - 1, C], the rows before x; None is zeros.

    Returns:
        y [B, N, C] in the dtype of x, and the state for the next piece.
    """
    if x.ndim != 3:
        raise ValueError(f"x: expected [B, N, C], got {x.shape}")
    if kernel.ndim != 2 or kernel.shape[1] != x.shape[2]:
        raise ValueError(f"kernel: expected [K, {x.shape[2]}], got {kernel.shape}")
    b, n, c = x.shape
    k = kernel.shape[0]
    if state is None:
        state = jnp.zeros((b, k - 1, c), x.dtype)
    elif state.shape != (b, k - 1, c):
        raise ValueError(f"state: expected {(b, k - 1, c)}, got {state.shape}")
    wide = jnp.result_type(jnp.float32, x.dtype)
    rows = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    out = sum(rows[:, i : i + n].astype(wide) * kernel[i].astype(wide) for i in range(k))
    if bias is not None:
        out = out + bias.astype(wide)
    return out.astype(x.dtype), rows[:, n:]
