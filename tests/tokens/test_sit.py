"""SiT: soft mixtures of tokens, their reverse, and what the distillation compares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import objectives, tokens
from jaxattn.core.types import Spec
from jaxattn.objectives.sit import init_reverse, layer_tokens, reverse
from jaxattn.tokens.sit import init_slimming, slim
from models.vision import vit
from train import methods, tasks

CONFIG = vit.config(16, 4, 3, 16, 2, channels=1, hidden=32, classes=3)
RNG = np.random.default_rng(0)
BATCH = {"image": RNG.uniform(size=(2, 16, 16, 1)).astype(np.float32), "label": np.array([0, 2], np.int32)}


@pytest.fixture(scope="module")
def slimming():
    return jax.tree.map(lambda x: x + 0.3, init_slimming(jax.random.key(0), 8, 5))


def test_mixtures_by_hand(slimming):
    x = RNG.normal(size=(2, 11, 8)).astype(np.float32)
    valid = np.ones((2, 11), bool)
    valid[1, -4:] = False
    run = jax.jit(slim)
    out, a = run(slimming, x, valid)
    p = jax.tree.map(np.asarray, slimming)
    for b in range(2):
        rows = x[b][valid[b]]
        y = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
        y = (y * p["norm"]["scale"] + p["norm"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]
        w = np.asarray(jax.nn.gelu(y, approximate=False)) @ p["up"]["kernel"] + p["up"]["bias"]
        e = np.exp(p["scale"] * w)
        weights = e / e.sum(0)
        np.testing.assert_allclose(np.asarray(a)[b][valid[b]], weights, atol=1e-5)
        np.testing.assert_allclose(out[b], weights.T @ rows, atol=1e-4)
    np.testing.assert_allclose(np.asarray(a).sum(1), 1, atol=1e-5)
    assert (np.asarray(a) >= 0).all() and not np.asarray(a)[1, -4:].any()
    order = RNG.permutation(11)
    np.testing.assert_allclose(run(slimming, x[:, order], valid[:, order])[0], out, atol=1e-5)


def test_the_reverse_gives_every_token_again():
    p = init_reverse(jax.random.key(1), 8, 5, 11)
    assert jax.eval_shape(reverse, p, jnp.zeros((2, 5, 8))).shape == (2, 11, 8)
    assert p["rows_up"]["kernel"].shape == (5, 44) and p["up"]["kernel"].shape == (8, 32)


def test_stages():
    assert [s for s, _ in tokens.sit().schedule(16)] == [9, 12, 14]
    n, left = 196, []
    for _, cut in tokens.sit().schedule(16):
        n = cut.rows(n)
        left.append(n)
    assert left == [98, 49, 24]
    assert cut.init(jax.random.key(0), Spec(dim=4, length=49))["up"]["bias"].shape == (24,)
    with pytest.raises(ValueError, match="spec.length"):
        tokens.sit().schedule(16)[0][1].init(jax.random.key(0), Spec(dim=4))


def test_the_distillation_reads_every_layer():
    bound = vit.bind(CONFIG, None, reduce={"vision": tokens.sit((1, 2), (0.5, 0.25))})
    objective, params = objectives.sit(), vit.init(CONFIG)
    full = {**params, "sockets": bound.arrays["trained"]}
    student, teacher = (methods.seeing(b, objective) for b in (bound, vit.bind(CONFIG, None)))

    def run(bound):
        return lambda params, batch, key, phase: tasks.class_outcome(bound, params, batch, key, phase=phase)

    plan = methods.prepare(run(student), run(teacher), full, objective, BATCH, key=jax.random.key(0), groups={"special": 0.5},
                           trained=True)  # fmt: skip
    assert set(plan.params["objective"]) == {"0", "1", "2"} and set(plan.frozen) == {"teacher"}
    assert plan.groups["objective"] == 5 and plan.groups["sockets"] == 1 and plan.groups["special"] == 0.5
    shapes = jax.eval_shape(lambda p: layer_tokens(run(student)(p, BATCH, None, "train")), full)
    assert [x.shape[1] for x in shapes] == [8, 4, 4]  # behind layers 0 and 1 as the next layer gets them

    @jax.jit
    def gradients(params):
        (loss, metrics), grads = jax.value_and_grad(
            lambda p: plan.loss_fn({**plan.frozen, **p}, BATCH, jax.random.key(0)), has_aux=True)(params)
        pairs = zip(*(layer_tokens(run(b)(params, BATCH, None, "train")) for b in (student, teacher)), strict=True)
        errors = [jnp.mean((reverse(params["objective"][str(i)], a) - b) ** 2) for i, (a, b) in enumerate(pairs)]
        return loss, metrics, grads, sum(errors) / 3, run(student)(params, BATCH, None, "train").loss

    loss, metrics, grads, mse, task = gradients(plan.params)
    np.testing.assert_allclose(metrics["token"], mse, rtol=1e-5)
    np.testing.assert_allclose(loss, task + 2 * metrics["token"] + 2 * metrics["distilled"], rtol=1e-5)
    for name in ("sockets", "objective", "layers"):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads[name]))
        assert max(np.abs(x).max() for x in jax.tree.leaves(grads[name])) > 0, name
