import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.pooling import adaptive_avg_pool_2d, bilinear_resize, mean_pool

rng = np.random.default_rng(0)


def test_mean_pool_with_a_short_last_run():
    x = rng.normal(size=(2, 7, 3)).astype(np.float32)
    want = np.stack([x[:, 0:3].mean(1), x[:, 3:6].mean(1), x[:, 6:].mean(1)], 1)
    np.testing.assert_allclose(mean_pool(x, 3), want, atol=1e-6)
    turned = mean_pool(x.transpose(0, 2, 1), 3, axis=-1)
    np.testing.assert_allclose(turned, want.transpose(0, 2, 1), atol=1e-6)
    np.testing.assert_array_equal(mean_pool(x, 1), x)
    np.testing.assert_allclose(mean_pool(x, 100)[:, 0], x.mean(1), atol=1e-6)


def test_mean_pool_skips_invalid_rows():
    x = rng.normal(size=(1, 6, 2)).astype(np.float32)
    valid = np.array([[True, False, True, False, False, False]])
    bad = np.where(valid[..., None], x, np.nan)
    out = mean_pool(bad, 3, valid=valid)
    np.testing.assert_allclose(out[0, 0], (x[0, 0] + x[0, 2]) / 2, atol=1e-6)
    np.testing.assert_array_equal(out[0, 1], [0, 0])
    assert np.isfinite(jax.grad(lambda x: mean_pool(x, 3, valid=valid).sum())(jnp.asarray(bad))).all()


@pytest.mark.parametrize("size", ((2, 3), (5, 4), (7, 9)))
def test_adaptive_pool_bins(size):
    x = rng.normal(size=(2, 5, 7, 3)).astype(np.float32)
    want = np.zeros((2, *size, 3))
    for i in range(size[0]):
        for j in range(size[1]):
            a, b = int(np.floor(i * 5 / size[0])), int(np.ceil((i + 1) * 5 / size[0]))
            c, d = int(np.floor(j * 7 / size[1])), int(np.ceil((j + 1) * 7 / size[1]))
            want[:, i, j] = x[:, a:b, c:d].mean((1, 2))
    np.testing.assert_allclose(adaptive_avg_pool_2d(x, size), want, atol=1e-5)


@pytest.mark.parametrize("size", ((3, 4), (5, 7), (11, 13), (1, 1)))
def test_bilinear_reads_the_two_nearest(size):
    x = rng.normal(size=(5, 7, 2)).astype(np.float32)

    def at(i, n, m):
        s = max((i + 0.5) * n / m - 0.5, 0.0)
        return int(s), min(int(s) + 1, n - 1), s - int(s)

    want = np.zeros((*size, 2))
    for i in range(size[0]):
        for j in range(size[1]):
            (a, b, s), (c, d, t) = at(i, 5, size[0]), at(j, 7, size[1])
            top, bottom = (1 - t) * x[a, c] + t * x[a, d], (1 - t) * x[b, c] + t * x[b, d]
            want[i, j] = (1 - s) * top + s * bottom
    np.testing.assert_allclose(bilinear_resize(x, size), want, atol=1e-5)


def test_bilinear_is_jax_image_resize_when_growing():
    x = rng.normal(size=(4, 6, 2)).astype(np.float32)
    want = jax.image.resize(x, (9, 8, 2), "bilinear")
    np.testing.assert_allclose(bilinear_resize(x, (9, 8)), want, atol=1e-5)
    flat = bilinear_resize(jnp.full((2, 4, 6, 1), 3.0, jnp.bfloat16), (2, 2))
    assert flat.dtype == jnp.bfloat16 and (flat == 3).all()


def test_errors_name_the_argument():
    x = np.ones((2, 4, 4, 1), np.float32)
    for name, call in {
        "unit": lambda: mean_pool(x, 0),
        "valid": lambda: mean_pool(x, 2, valid=np.ones((2, 3), bool)),
        "out_hw": lambda: bilinear_resize(x, (0, 2)),
        "x": lambda: adaptive_avg_pool_2d(x[0, 0], (2, 2)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()
