"""Which rule moves which parameter, by how much, and when."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train import standin
from train.optim import decay_mask, make_optimizer, muon_mask, rate_factors, schedule
from train.sharding import path_name

LLM = standin.init()
VLM = {
    "vision": {
        "patch": {"kernel": jnp.ones((12, 8)), "bias": jnp.ones(8)},
        "cls": jnp.ones((1, 8)),
        "pos": jnp.ones((5, 8)),
        "layers": {
            "norm1": {"scale": jnp.ones((2, 8)), "bias": jnp.ones((2, 8))},
            "mlp": {"up": {"kernel": jnp.ones((2, 8, 12)), "bias": jnp.ones((2, 12))}},
        },
    },
    "projector": {"up": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}},
    "llm": LLM,
}


def true_names(mask):
    return {path_name(path) for path, value in jax.tree_util.tree_leaves_with_path(mask) if value}


def test_muon_takes_the_matrices_of_the_layers_and_nothing_else():
    assert true_names(muon_mask(VLM)) == {
        "vision/layers/mlp/up/kernel",
        *(f"llm/layers/attn/{x}/kernel" for x in "qkvo"),
        *(f"llm/layers/mlp/{x}/kernel" for x in ("gate", "up", "down")),
    }


def test_decay_takes_all_matrices_and_no_norm_bias_or_embedding():
    extra = {"vision/patch/kernel", "projector/up/kernel", "llm/head/kernel"}
    assert true_names(decay_mask(VLM)) == true_names(muon_mask(VLM)) | extra


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_moves_only_what_the_mask_says(kind):
    optimizer = make_optimizer(kind, 0.1, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, VLM)
    updates, _ = optimizer.update(zero, optimizer.init(VLM), VLM)

    def check(update, decays, param):
        np.testing.assert_allclose(update, -0.1 * 0.5 * param if decays else 0 * param, atol=1e-7)

    jax.tree.map(check, updates, decay_mask(VLM), VLM)


def gradients(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), LLM)


def test_muon_orthogonalises_each_layer_and_adam_has_the_rest():
    grads = gradients()
    muon, adam = make_optimizer("muon", 0.1, clip=None), make_optimizer("adamw", 0.1, clip=None)
    one, _ = muon.update(grads, muon.init(LLM), LLM)
    other, _ = adam.update(grads, adam.init(LLM), LLM)
    for (path, update), by_adam, is_muon in zip(
        jax.tree_util.tree_leaves_with_path(one),
        jax.tree.leaves(other),
        jax.tree.leaves(muon_mask(LLM)),
        strict=True,
    ):
        if not is_muon:
            np.testing.assert_allclose(update, by_adam, rtol=1e-6, err_msg=path_name(path))
            continue
        gradient = grads
        for part in path_name(path).split("/"):
            gradient = gradient[part]
        for layer in range(standin.L):
            # The nearest orthogonal matrix, by its own route; Newton-Schulz brings singular values near 1.
            u, s, vt = np.linalg.svd(gradient[layer], full_matrices=False)
            scale = -0.1 * 0.2 * np.sqrt(max(gradient.shape[1:]))
            inside = u.T @ np.asarray(update[layer] / scale) @ vt.T
            np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-3)
            clear = np.diag(inside)[s > 0.1 * s[0]]
            assert (clear > 0.6).all() and (clear < 1.3).all(), path_name(path)


def test_adamw_is_optax_adamw():
    ours = make_optimizer("adamw", 0.01, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0)
    plain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1, mask=decay_mask),
    )
    a, b = ours.init(LLM), plain.init(LLM)
    for seed in range(3):
        (one, a), (other, b) = ours.update(gradients(seed), a, LLM), plain.update(gradients(seed), b, LLM)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9), one, other)


def test_rate_factors_by_longest_prefix():
    groups = {"vision": 0.3, "vision/patch": 0.0, "llm/head": 2.0}
    factors = rate_factors(VLM, groups)
    assert factors["vision"]["pos"] == 0.3 and factors["vision"]["patch"]["kernel"] == 0.0
    assert factors["llm"]["head"]["kernel"] == 2.0 and factors["llm"]["norm"]["scale"] == 1.0
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), VLM)
    plain, grouped = make_optimizer("muon", 0.1), make_optimizer("muon", 0.1, groups=groups)
    one, _ = plain.update(grads, plain.init(VLM), VLM)
    other, _ = grouped.update(grads, grouped.init(VLM), VLM)
    jax.tree.map(lambda x, y, f: np.testing.assert_allclose(y, x * f, rtol=1e-5), one, other, factors)
    with pytest.raises(ValueError, match=r"prefixes of parameter paths \(llm, projector, vision\), got 'visual'"):
        make_optimizer("adamw", groups={"visual": 1.0}).init(VLM)


def test_schedules():
    steps = np.arange(101)
    wsd = np.array([float(x) for x in jax.vmap(schedule("wsd", 2.0, steps=100, warmup=10, flat=0.3))(steps)])
    np.testing.assert_allclose(wsd[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(wsd[10:31], 2.0)
    np.testing.assert_allclose(wsd[30:], 2.0 * (100 - steps[30:]) / 70, atol=1e-6)
    cosine = np.asarray(jax.vmap(schedule("cosine", 2.0, steps=100, warmup=10, end=0.1))(steps))
    theirs = optax.cosine_decay_schedule(2.0, 90, alpha=0.1)
    np.testing.assert_allclose(cosine[10:], [float(theirs(n)) for n in range(91)], rtol=1e-5)
    assert schedule("constant", 2.0, steps=100)(99) == 2.0
    with pytest.raises(ValueError, match="warmup: expected 0 <= warmup <= steps=5, got 6"):
        schedule("wsd", 1.0, steps=5, warmup=6)
    with pytest.raises(ValueError, match="schedule: expected one of constant, cosine, wsd, got 'linear'"):
        schedule("linear", 1.0, steps=5)
    with pytest.raises(ValueError, match="optimizer: expected one of adamw, muon, got 'sgd'"):
        make_optimizer("sgd")
    with pytest.raises(ValueError, match="clip: expected a positive norm"):
        make_optimizer(clip=0.0)


def test_clipping_bounds_the_global_norm():
    grads = gradients()
    norm = float(optax.tree.norm(grads))
    state = make_optimizer("adamw", 1.0, clip=norm / 4, b1=0.0)
    _, after = state.update(grads, state.init(LLM), LLM)
    seen = next(s.mu for s in jax.tree.leaves(after, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
    np.testing.assert_allclose(float(optax.tree.norm(seen)), norm / 4, rtol=1e-5)
