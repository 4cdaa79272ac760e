import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.routing import balance_loss, flip_rate, router

B, N, E, K = 2, 7, 5, 2
LOGITS = np.random.default_rng(0).normal(size=(B, N, E)).astype(np.float32)


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_top_k_weights():
    p = softmax(LOGITS)
    order = np.argsort(-p, axis=-1, kind="stable")[..., :K]
    w, index, aux = router(LOGITS, K)
    np.testing.assert_array_equal(index, order)
    want = np.zeros_like(p)
    np.put_along_axis(want, order, np.take_along_axis(p, order, -1), -1)
    np.testing.assert_allclose(w, want / want.sum(-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(router(LOGITS, K, renorm=False)[0], want, atol=1e-6)
    np.testing.assert_allclose(router(LOGITS, K, scale=K)[0].sum(-1), K, atol=1e-5)
    np.testing.assert_allclose(aux["P"], p.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(aux["f"], (want > 0).mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(aux["z"], (np.log(np.exp(LOGITS).sum(-1)) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["entropy"], -(p * np.log(p)).sum(-1).mean(), rtol=1e-5)


def test_soft_and_all_choices_agree():
    soft, index, _ = router(LOGITS)
    np.testing.assert_allclose(soft, softmax(LOGITS), atol=1e-6)
    assert index.shape == (B, N, E)
    np.testing.assert_allclose(router(LOGITS, E)[0], soft, atol=1e-6)
    gate = 1 / (1 + np.exp(-LOGITS))
    np.testing.assert_allclose(router(LOGITS, norm="sigmoid", renorm=False)[0], gate, atol=1e-6)


def test_ties_go_to_the_lowest():
    np.testing.assert_array_equal(router(jnp.zeros((3, E)), K)[1], [[0, 1]] * 3)


def test_graph_mixes_probabilities():
    eye = np.broadcast_to(np.eye(N, dtype=np.float32), (B, N, N))
    for a, b in zip(router(LOGITS, K, mix=eye)[:2], router(LOGITS, K)[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    graph = softmax(np.random.default_rng(1).normal(size=(B, N, N)))
    w, _, aux = router(LOGITS, mix=graph)
    np.testing.assert_allclose(w, np.einsum("bij,bje->bie", graph, softmax(LOGITS)), atol=1e-6)
    np.testing.assert_allclose(aux["P"].sum(), 1, atol=1e-6)
    c = np.arange(E, dtype=np.float32)
    grad = jax.grad(lambda g: jnp.sum(router(LOGITS, K, mix=g)[0] * c))(jnp.asarray(graph))
    assert np.abs(grad).max() > 0


def test_hard_is_straight_through():
    w, index, _ = router(LOGITS, K, hard=True, scale=3.0)
    want = np.zeros_like(LOGITS)
    np.put_along_axis(want, np.asarray(index), 3.0, -1)
    np.testing.assert_allclose(w, want, atol=1e-6)
    c = np.arange(E, dtype=np.float32)
    got = jax.grad(lambda x: jnp.sum(router(x, K, hard=True)[0] * c))(LOGITS)
    np.testing.assert_allclose(got, jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * c))(LOGITS), atol=1e-6)
    np.testing.assert_allclose(router(LOGITS, hard=True, norm="sigmoid")[0], LOGITS > 0, atol=1e-6)
    assert (router(LOGITS, hard=True)[1][..., 0] == LOGITS.argmax(-1)).all()


def test_gumbel_noise_samples_the_softmax():
    logits = jnp.broadcast_to(jnp.asarray([1.0, 0.0, -1.0]), (20000, 3))
    w, _, _ = router(logits, 1, hard=True, key=jax.random.key(0))
    np.testing.assert_allclose(w.mean(0), softmax(np.array([1.0, 0, -1])), atol=0.015)
    on = router(logits, norm="sigmoid", hard=True, key=jax.random.key(1))[0]
    np.testing.assert_allclose(on.mean(0), 1 / (1 + np.exp([-1.0, 0, 1])), atol=0.015)


def test_balance_loss_of_uniform_routing():
    uniform = jnp.tile(10.0 * jnp.eye(E), (4, 1))  # every expert is the choice of as many rows
    _, _, aux = router(uniform, 1)
    np.testing.assert_allclose(balance_loss(aux), 1, atol=1e-5)
    flat = {"P": jnp.full(E, 1 / E), "f": jnp.full(E, K / E)}
    np.testing.assert_allclose(balance_loss(flat), 1, atol=1e-6)
    np.testing.assert_allclose(balance_loss(flat, "moh"), K, atol=1e-6)
    _, _, aux = router(LOGITS, K)
    p, f = np.asarray(aux["P"]), np.asarray(aux["f"])
    np.testing.assert_allclose(balance_loss(aux, "moh"), np.mean(p * f) * E**2, rtol=1e-5)
    crowded = router(jnp.zeros((8, E)).at[:, 0].set(9.0), 1)[2]
    assert balance_loss(crowded) > 4


def test_padding_does_not_count():
    valid = np.arange(N) < 4
    w, _, aux = router(LOGITS, K, valid=valid)
    assert (np.asarray(w)[:, 4:] == 0).all()
    np.testing.assert_allclose(aux["P"], router(LOGITS[:, :4], K)[2]["P"], atol=1e-6)
    bad = np.where(valid[:, None], LOGITS, np.nan)
    assert np.isfinite(router(bad, K, valid=valid)[2]["z"])
    assert np.isfinite(router(LOGITS, K, valid=np.zeros(N, bool))[2]["P"]).all()


def test_flip_rate_compares_sets():
    a = np.array([[0, 1], [2, 3], [1, 4], [0, 2]])
    assert flip_rate(a, a[:, ::-1]) == 0
    assert flip_rate(a, np.array([[1, 0], [2, 4], [1, 4], [3, 2]])) == 0.5


def test_errors_name_the_argument():
    for name, call in {
        "norm": lambda: router(LOGITS, norm="l1"),
        "k": lambda: router(LOGITS, E + 1),
        "mix": lambda: router(LOGITS, mix=np.eye(3)),
        "kind": lambda: balance_loss({"P": jnp.ones(2), "f": jnp.ones(2)}, "z"),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()
