import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.gates import Gates, head_gain, scale_rows, sigmoid_gate, tanh_gate

B, N, H, D = 2, 3, 4, 5
rng = np.random.default_rng(0)
X = rng.normal(size=(B, N, H, D)).astype(np.float32)


def test_gates_multiply_their_side_only():
    per_head = rng.normal(size=(B, N, H)).astype(np.float32)
    gates = Gates(q=per_head, v=rng.normal(size=(1, N, 1, D)).astype(np.float32), out=np.full((1, 1, H), 0.5))
    q, k, v = jax.jit(Gates.before)(gates, X, X, X)
    np.testing.assert_allclose(q, X * per_head[..., None], rtol=1e-6)
    np.testing.assert_array_equal(k, X)
    np.testing.assert_allclose(v, X * gates.v, rtol=1e-6)
    np.testing.assert_allclose(gates.after(X), 0.5 * X, rtol=1e-6)
    assert Gates().after(X) is X


def test_head_gain_by_head_example_and_token():
    gain = np.arange(H, dtype=np.float32)
    want = X * gain[:, None]
    for g in (gain, np.tile(gain, (B, 1)), np.tile(gain, (B, N, 1))):
        np.testing.assert_allclose(head_gain(X, g), want)
    np.testing.assert_array_equal(head_gain(X, np.ones(H)), X)


def test_tanh_gate_starts_closed_and_learns():
    np.testing.assert_array_equal(tanh_gate(X, 0.0), np.zeros_like(X))
    slope = jax.grad(lambda a: tanh_gate(jnp.asarray(X), a).sum())(0.0)
    np.testing.assert_allclose(slope, X.sum(), rtol=1e-4)


def test_sigmoid_gate():
    np.testing.assert_allclose(sigmoid_gate(X, np.zeros((B, N, H), np.float32)), X / 2)
    logits = rng.normal(size=X.shape).astype(np.float32)
    np.testing.assert_allclose(sigmoid_gate(X, logits), X / (1 + np.exp(-logits)), rtol=1e-5)


def test_products_keep_the_dtype_and_round_once():
    x = jnp.asarray(X, jnp.bfloat16)
    out = scale_rows(x, np.full((1, 1, 1), 1.001, np.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, (x.astype(jnp.float32) * 1.001).astype(jnp.bfloat16))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="^factor:"):
        scale_rows(X, np.ones((B, N, H + 1)))
    with pytest.raises(ValueError, match="^gain:"):
        head_gain(X, np.float32(1))
