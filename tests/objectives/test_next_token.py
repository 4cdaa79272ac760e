"""Next-token cross-entropy: values, gradients and memory by chunks, weights, packed records."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.token_stats import LazyLogits, stats_of, token_stats
from jaxattn.core.types import State
from jaxattn.objectives.next_token import next_token

B, T, C, V = 2, 13, 8, 37


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, C)).astype(np.float32)
    head = rng.normal(size=(C, V)).astype(np.float32)
    mask = (rng.random((B, T)) < 0.7).astype(np.float32)
    return hidden, head, {"targets": rng.integers(0, V, (B, T)).astype(np.int32), "loss_mask": mask}


def run(method, hidden, head, batch, lazy=True):
    out = LazyLogits(hidden, lambda h: h @ head) if lazy else SimpleNamespace(logits=hidden @ head)
    return method.loss({}, State(), lambda batch: out, batch, None)


def test_value_and_metrics(data):
    hidden, head, batch = data
    logits = (hidden @ head).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    w = batch["loss_mask"]
    loss, metrics = run(next_token(z_loss=0.5), hidden, head, batch, lazy=False)
    np.testing.assert_allclose(metrics["nll"], (nll * w).sum() / w.sum(), rtol=1e-6)
    z = (np.log(np.exp(logits).sum(-1)) ** 2 * w).sum() / w.sum()
    np.testing.assert_allclose(loss, metrics["nll"] + 0.5 * z, rtol=1e-6)
    right = ((logits.argmax(-1) == batch["targets"]) * w).sum() / w.sum()
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)
    assert metrics["weight"] == w.sum()
    plain = {"targets": batch["targets"]}
    np.testing.assert_allclose(run(next_token(), hidden, head, plain, lazy=False)[0], nll.mean(), rtol=1e-6)
    empty = dict(batch, loss_mask=np.zeros((B, T), np.float32))
    assert run(next_token(), hidden, head, empty, lazy=False)[0] == 0
    # A target that does not count may even be impossible.
    impossible = np.where(w[..., None] > 0, logits, -np.inf).astype(np.float32)
    same = next_token().loss({}, State(), lambda b: SimpleNamespace(logits=impossible), batch, None)[0]
    np.testing.assert_allclose(same, metrics["nll"], rtol=1e-6)


def test_chunks_change_neither_values_nor_gradients(data):
    hidden, head, batch = data
    both = jax.jit(
        lambda method, hidden, head, lazy: jax.value_and_grad(
            lambda h, w: run(method, h, w, batch, lazy)[0], argnums=(0, 1)
        )(hidden, head),
        static_argnums=(0, 3),
    )
    loss, grads = both(next_token(z_loss=0.1), hidden, head, False)
    for chunk, lazy in ((4, True), (4, False)):
        found, found_grads = both(next_token(chunk=chunk, z_loss=0.1), hidden, head, lazy)
        np.testing.assert_allclose(found, loss, rtol=1e-6)
        for a, b in zip(found_grads, grads, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_whole_table_of_logits_never_exists():
    b, t, c, v, chunk = 2, 64, 8, 512, 8
    x, w = jnp.ones((b, t, c), jnp.bfloat16), jnp.ones((c, v), jnp.bfloat16)
    batch = {"targets": jnp.zeros((b, t), jnp.int32)}

    def is_jaxpr(x):
        return hasattr(x, "jaxpr") or hasattr(x, "eqns")

    def largest(method):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, w: run(method, x, w, batch)[0], argnums=(0, 1)))(x, w)
        sizes = []

        def walk(j):
            for eqn in j.eqns:
                sizes.extend(np.prod(o.aval.shape) for o in eqn.outvars if hasattr(o.aval, "shape"))
                for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
                    if is_jaxpr(sub):
                        walk(getattr(sub, "jaxpr", sub))

        walk(jaxpr.jaxpr)
        return max(sizes)

    assert largest(next_token()) == b * t * v
    assert largest(next_token(chunk=chunk)) == b * chunk * v


def test_statistics(data):
    hidden, head, batch = data
    want = ("entropy", "lse", "logp", "correct")
    found = jax.jit(lambda x, y: token_stats(x, y, chunk=5, want=want))(hidden @ head, batch["targets"])
    p = jax.nn.softmax(hidden @ head)
    np.testing.assert_allclose(found["entropy"], -(p * jnp.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(found["lse"], jax.nn.logsumexp(hidden @ head, -1), rtol=1e-6)
    peaked = jnp.array([[[0.0, -jnp.inf, -jnp.inf]]])
    assert token_stats(peaked, jnp.zeros((1, 1), jnp.int32), want=("entropy",))["entropy"] == 0
    half = token_stats((hidden @ head).astype(jnp.bfloat16), batch["targets"])["logp"]
    assert half.dtype == jnp.float32
    for wrong, name in ((dict(want=("logits",)), "want"), (dict(chunk=0), "chunk")):
        with pytest.raises(ValueError, match=name):
            token_stats(hidden @ head, batch["targets"], **wrong)
    with pytest.raises(ValueError, match="targets"):
        token_stats(hidden @ head, batch["targets"][:, 1:])
    with pytest.raises(ValueError, match="forward"):
        stats_of(object(), batch["targets"])


def test_record():
    assert next_token(chunk=4) == next_token(chunk=4) and hash(next_token(z_loss=1)) == hash(next_token(z_loss=1.0))
    with pytest.raises(ValueError, match="chunk"):
        next_token(chunk=0)
