"""Deformable reading against a loop over heads, maps and points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.deformable import deformable_read

RNG = np.random.default_rng(0)
SHAPES = ((3, 5), (2, 2))


def test_is_the_loop_and_has_gradients():
    values = RNG.normal(size=(2, 19, 2, 3)).astype(np.float32)
    points = RNG.uniform(-0.2, 1.2, size=(2, 4, 2, 2, 3, 2)).astype(np.float32)
    points[0, 0, 0, 0, 0] = (0.5 / 5, 0.5 / 3)  # the centre of the first cell
    weights = RNG.random((2, 4, 2, 2, 3)).astype(np.float32)
    expected = np.zeros((2, 4, 2, 3))
    for b, q, h, level, p in np.ndindex(*weights.shape):
        rows, columns = SHAPES[level]
        grid = values[b, :15, h] if level == 0 else values[b, 15:, h]
        grid = grid.reshape(rows, columns, 3)
        x, y = points[b, q, h, level, p] * (columns, rows) - 0.5
        for j in (int(np.floor(y)), int(np.floor(y)) + 1):
            for i in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= i < columns and 0 <= j < rows:
                    share = max(0, 1 - abs(x - i)) * max(0, 1 - abs(y - j))
                    expected[b, q, h] += weights[b, q, h, level, p] * share * grid[j, i]
    read = jax.jit(lambda *a: deformable_read(a[0], SHAPES, a[1], a[2]))
    np.testing.assert_allclose(read(values, points, weights), expected, atol=1e-5)

    def f(p):
        return (read(values, p, weights) ** 2).sum()

    size = np.array([(columns, rows) for rows, columns in SHAPES])[:, None]
    cell = RNG.integers(-1, size, size=points.shape)
    points = ((cell + RNG.uniform(0.6, 1.4, size=points.shape)) / size).astype(np.float32)  # between centres: no kink near
    way = RNG.normal(size=points.shape).astype(np.float32)
    slope = (f(points + 1e-3 * way) - f(points - 1e-3 * way)) / 2e-3
    np.testing.assert_allclose(jnp.vdot(jax.grad(f)(points), way), slope, rtol=2e-2)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"values: expected \[batch, 19"):
        deformable_read(jnp.ones((1, 18, 2, 3)), SHAPES, jnp.ones((1, 1, 2, 2, 1, 2)), jnp.ones((1, 1, 2, 2, 1)))
    with pytest.raises(ValueError, match="weights: expected"):
        deformable_read(jnp.ones((1, 19, 2, 3)), SHAPES, jnp.ones((1, 1, 2, 2, 1, 2)), jnp.ones((1, 1, 2, 2, 2)))
