"""Learned positions of a tower at another image size, by cubic interpolation as PyTorch does it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from models.vision.vit import ViTConfig


def cubic_weights(inputs: int, outputs: int, antialias: bool = False) -> np.ndarray:
    """float64 [outputs, inputs]: row i makes the i-th of ``outputs`` cells that cover the same line as ``inputs``.

    Without ``antialias`` four neighbours with a = -0.75, the border's repeated; with it, a = -0.5 over a window that grows
    with the shrinking, cut at the border.
    """
    scale = inputs / outputs
    a, wide = (-0.5, max(scale, 1.0)) if antialias else (-0.75, 1.0)
    centre = (np.arange(outputs)[:, None] + 0.5) * scale - 0.5
    margin = 0 if antialias else inputs + 2
    at = np.arange(-margin, inputs + margin)
    x = np.abs(at - centre) / wide
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    w = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        return w / w.sum(1, keepdims=True)
    found = np.zeros((outputs, inputs))
    np.add.at(found.T, np.clip(at, 0, inputs - 1), w.T)
    return found


def at_size(c: ViTConfig, params: dict, image: tuple[int, int], *, antialias: bool = False) -> tuple[ViTConfig, dict]:
    """(configuration, parameters) of the tower for images of another (height, width); the rest of ``params`` is shared."""
    crop = any(side % c.patch for side in image)
    new = dataclasses.replace(c, image=tuple(image), crop=crop)
    if new.grid == c.grid:
        return new, params
    pos = np.asarray(params["pos"], np.float64).reshape(*c.grid, -1)
    for axis in (0, 1):
        weights = cubic_weights(c.grid[axis], new.grid[axis], antialias)
        pos = np.moveaxis(np.tensordot(weights, pos, (1, axis)), 0, axis)
    moved = jnp.asarray(pos.reshape(new.patches, -1), params["pos"].dtype)
    return new, {**params, "pos": jax.device_put(moved, params["pos"].sharding)}  # whole on every device of a mesh
