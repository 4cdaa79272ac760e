import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.conv import depthwise_conv2d, short_conv

rng = np.random.default_rng(0)


@pytest.mark.parametrize("shape, dilation", (((3, 3), 1), ((5, 1), 1), ((3, 3), 2)))
def test_depthwise_is_the_grouped_convolution(shape, dilation):
    x = rng.normal(size=(2, 5, 6, 4)).astype(np.float32)
    kernel, bias = rng.normal(size=(*shape, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    pad = [(n // 2 * dilation,) * 2 for n in shape]
    want = jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        pad,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    np.testing.assert_allclose(depthwise_conv2d(x, kernel, bias, dilation=dilation), want + bias, atol=1e-5)
    per_example = np.stack([kernel, 2 * kernel])
    out = depthwise_conv2d(x, per_example, dilation=dilation)
    np.testing.assert_allclose(out, want * np.array([1, 2])[:, None, None, None], atol=2e-5)


def test_identity_kernel_keeps_the_dtype():
    x = jnp.asarray(rng.normal(size=(1, 4, 4, 2)), jnp.bfloat16)
    kernel = jnp.zeros((5, 5, 2)).at[2, 2].set(1)
    out = depthwise_conv2d(x, kernel)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("k", (1, 4))
def test_short_conv_is_causal_and_hands_over_its_state(k):
    x = rng.normal(size=(2, 9, 3)).astype(np.float32)
    kernel, bias = rng.normal(size=(k, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    want = np.zeros_like(x) + bias
    for t in range(9):
        for i in range(min(k, t + 1)):
            want[:, t] += x[:, t - i] * kernel[k - 1 - i]
    out, last = short_conv(x, kernel, bias)
    np.testing.assert_allclose(out, want, atol=1e-5)
    for split in (1, 2, 8):
        a, state = short_conv(x[:, :split], kernel, bias)
        b, state = short_conv(x[:, split:], kernel, bias, state=state)
        np.testing.assert_allclose(np.concatenate([a, b], 1), want, atol=1e-5)
        np.testing.assert_array_equal(state, last)
    state, rows = None, []
    for t in range(9):
        y, state = short_conv(x[:, t : t + 1], kernel, bias, state=state)
        rows.append(y)
    np.testing.assert_allclose(np.concatenate(rows, 1), want, atol=1e-5)


def test_errors_name_the_argument():
    x = np.ones((2, 4, 4, 3), np.float32)
    for name, call in {
        "x": lambda: depthwise_conv2d(x[0], np.ones((3, 3, 3))),
        "kernel": lambda: depthwise_conv2d(x, np.ones((2, 3, 3))),
        "state": lambda: short_conv(x[0], np.ones((3, 3)), state=np.ones((1, 2, 3))),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()
