"""Pointwise attention and key/value biases against their formulas, over caches and in gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention.pointwise import kv_bias, pointwise_attention
from jaxattn.core.attend import attend, make_call
from jaxattn.core.mask import causal
from jaxattn.core.types import Ctx, Meta, Spec, State, View

SPEC = Spec(heads=4, kv_heads=2, head_dim=8, value_dim=8)
OPERATIONS = [(m, "similarity") for m in ("sigmoid", "elu")] + [(m, "kernel") for m in ("identity", "elu", "mlp")]


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(7)
    q = rng.normal(size=(2, 13, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 13, 2, 8)).astype(np.float32)
    return q, k, v


def elu1(x):
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def reference(q, k, v, params, map, form, normalize):
    """The paper's table of weights."""
    if form == "kernel":
        psi = {"identity": lambda x: x, "elu": elu1,
               "mlp": lambda x: jnp.maximum(x @ params["mlp_in"], 0) @ params["mlp_out"]}[map]  # fmt: skip
        q, k = psi(q), psi(k)
    s = jnp.einsum("bnhd,bmhd->bhnm", q, jnp.repeat(k, 2, 2)) / jnp.sqrt(8.0)
    if form == "similarity":
        s = 1 / (1 + jnp.exp(-s)) if map == "sigmoid" else elu1(s)
    w = s * np.tri(q.shape[1])
    if normalize:
        total = w.sum(-1, keepdims=True)
        w = w / (jnp.maximum(jnp.abs(total), 1) if map in ("identity", "mlp") else total + 1e-8)
    return jnp.einsum("bhnm,bmhd->bnhd", w, jnp.repeat(v, 2, 2))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("map, form", OPERATIONS)
def test_operations_with_gradients(small, map, form, normalize):
    method = pointwise_attention(map, form=form, normalize=normalize)
    again = pointwise_attention(map, form=form, normalize=normalize)
    assert method == again and hash(method) == hash(again)
    params = method.init(jax.random.key(0), SPEC)

    def fast(params, q, k, v):
        return method.apply(params, State(), make_call(q, k, v, mask=causal()), Ctx())[0].out

    def slow(params, q, k, v):
        return reference(q, k, v, params, map, form, normalize)

    def with_gradients(f):
        return jax.jit(jax.value_and_grad(lambda *a: ((out := f(*a)) ** 2).sum() + (out * 0.3).sum(), (0, 1, 2, 3)))

    got, want = with_gradients(fast)(params, *small), with_gradients(slow)(params, *small)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def halves(q, k, v, **more):
    """The last five rows, the earlier ones cached."""
    view = View(k[:, :8], v[:, :8], Meta.of(8))
    new = Meta.of(5, pos=np.arange(8, 13)[None])
    return make_call(q[:, 8:], k[:, 8:], v[:, 8:], mask=causal(), past=(view,), q_meta=new, k_meta=new, **more)


def test_caches(small):
    q, k, v = small
    mlp = pointwise_attention("mlp", form="kernel", normalize=True)
    for method in (pointwise_attention(normalize=True), mlp, kv_bias(), kv_bias(value=True)):
        params = method.init(jax.random.key(1), SPEC)
        run = jax.jit(lambda p, c, m=method: m.apply(p, State(), c, Ctx())[0].out)
        full = run(params, make_call(q, k, v, mask=causal()))
        np.testing.assert_allclose(run(params, halves(q, k, v)), full[:, 8:], atol=1e-5)


@pytest.mark.parametrize("per_head", [True, False])
def test_biases_are_a_prepended_key(small, per_head):
    q, k, v = small
    for value in (False, True):
        method = kv_bias(value=value, per_head=per_head)
        params = jax.tree.map(lambda x: 40 * x, method.init(jax.random.key(2), SPEC))
        assert params["k"].shape == (2 if per_head else 1, 8) and ("v" in params) == value

        def prepend(x, star):
            return jnp.concatenate([jnp.broadcast_to(star, (2, 1, 2, 8)), x], 1)

        star = params["v"] if value else jnp.zeros((1, 8))
        behind = Meta.of(14, pos=np.arange(-1, 13)[None])
        want = attend(q, prepend(k, params["k"]), prepend(v, star), mask=causal(), q_meta=Meta.of(13), k_meta=behind)
        part = method.apply(params, State(), make_call(q, k, v, mask=causal()), Ctx())[0]
        np.testing.assert_allclose(part.out, want.out, atol=1e-5)
        np.testing.assert_allclose(part.lse, want.lse, atol=1e-5)
        if not value:  # mass without value: dense attention scaled by 1 - p*
            dense = attend(q, k, v, mask=causal())
            kept = np.exp(dense.lse - want.lse)[..., None]
            np.testing.assert_allclose(part.out, dense.out * kept, atol=1e-5)
            assert kept.min() < 0.9


def test_value_bias_alone_is_added(small):
    q, k, v = small
    method = kv_bias(key=False, value=True)
    params = method.init(jax.random.key(3), SPEC)
    out = method.apply(params, State(), make_call(q, k, v, mask=causal()), Ctx())[0].out
    np.testing.assert_allclose(out, attend(q, k, v, mask=causal()).out + jnp.repeat(params["v"], 2, 0), atol=1e-6)


def test_gates_bfloat16_and_errors(small):
    low = [jnp.asarray(x, jnp.bfloat16) for x in small]
    gate = jnp.full((2, 13, 4, 1), 0.5)
    for method in (pointwise_attention("elu", normalize=True), kv_bias(value=True), kv_bias()):
        params = method.init(jax.random.key(1), SPEC)
        plain = method.apply(params, State(), make_call(*low, mask=causal()), Ctx())[0].out
        assert plain.dtype == jnp.bfloat16 and np.isfinite(np.asarray(plain, np.float32)).all()
        gated = method.apply(params, State(), make_call(*low, mask=causal(), out_gate=gate), Ctx())[0].out
        np.testing.assert_allclose(np.asarray(gated, np.float32), np.asarray(plain, np.float32) / 2, rtol=1e-2)
    with pytest.raises(ValueError, match="map"):
        pointwise_attention("sigmoid", form="kernel")
    with pytest.raises(ValueError, match="key"):
        kv_bias(key=False)
