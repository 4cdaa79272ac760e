"""AS-ViT against the authors' arrays, and inside a small tower: what is hidden in training is gone in inference."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import objectives, tokens
from jaxattn.core.attend import attend
from jaxattn.core.types import Meta
from models.bind import Bound
from models.vision import vit

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "169-as-vit" / "io.npz")
CONFIG = vit.config(16, 4, 4, 16, 2, channels=1, hidden=32, classes=3)
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(size=(3, 16, 16, 1)).astype(np.float32)
HEADS = 3


def projected():
    """q, k, v [B, N, H, D] of the authors' layer, and the map behind the heads."""
    x, w = GOLDEN["x"], {k[2:]: GOLDEN[k] for k in GOLDEN if k.startswith("w.")}
    b, n, d = x.shape
    qkv = (x @ w["qkv.weight"].T + w["qkv.bias"]).reshape(b, n, 3, HEADS, d // HEADS)
    return (*np.moveaxis(qkv, 2, 0), lambda out: out.reshape(b, n, d) @ w["proj.weight"].T + w["proj.bias"])


@pytest.mark.parametrize(("name", "eps"), [("dense", 0.0), ("policy", 1e-6)])
def test_the_authors_layer(name, eps):
    q, k, v, behind = projected()
    policy = GOLDEN["policy"][..., 0] if name == "policy" else np.ones(q.shape[:2])
    out, p = jax.jit(tokens.policy_attention_reference, static_argnames="eps")(q, k, v, policy, eps=eps)
    np.testing.assert_allclose(behind(out), GOLDEN[f"out_{name}"], atol=1e-5)
    score = tokens.as_vit_scores(p[:, :, 0, 1:], out[:, 1:])
    np.testing.assert_allclose(score, GOLDEN[f"score_{name}"], atol=1e-5)


def test_weights_of_keys_are_the_policy():
    """``attend`` against the plain formula, values and gradients; kept rows see what they see without the others."""
    q, k, v, _ = (np.asarray(x, np.float32) if isinstance(x, np.ndarray) else x for x in projected())
    policy = np.asarray(GOLDEN["policy"][..., 0], np.float32)
    cotangent = RNG.normal(size=q.shape).astype(np.float32)

    def fast(q, k, v, policy):
        meta = Meta.of(q.shape[1]).replace(weight=policy)
        return attend(q, k, v, q_meta=meta, k_meta=meta).out

    plain = lambda *x: tokens.policy_attention_reference(*x, eps=0.0)[0]  # noqa: E731
    pull = lambda f: jax.jit(jax.value_and_grad(lambda *x: jnp.sum(f(*x) * cotangent), (0, 1, 2, 3)))  # noqa: E731
    (a, da), (b, db) = (pull(f)(q, k, v, policy) for f in (fast, plain))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(da, db, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(np.abs(y).max()))
    kept = attend(q, k, v, k_meta=Meta.of(q.shape[1], pos=np.zeros(policy.shape, np.int32), valid=policy > 0)).out
    np.testing.assert_allclose(np.asarray(fast(q, k, v, policy))[policy > 0], np.asarray(kept)[policy > 0], atol=1e-5)


def test_the_authors_decision_and_its_gradients():
    s, theta = jnp.asarray(GOLDEN["score_dense"]), jnp.asarray(GOLDEN["threshold"])
    np.testing.assert_array_equal(tokens.straight_through(s, theta), GOLDEN["keep_hard"])
    given = lambda theta, s: jnp.sum(tokens.straight_through(s, theta, 0.05) * GOLDEN["cotangent"])  # noqa: E731
    by_theta, by_score = jax.jit(jax.grad(given, (0, 1)))(theta, s)
    np.testing.assert_allclose(by_theta, GOLDEN["grad_threshold_tau005"], rtol=1e-4)
    np.testing.assert_allclose(by_score, GOLDEN["grad_score_tau005"], rtol=1e-4, atol=1e-6)


def test_multiplications_of_a_layer():
    n, d = 197, 384
    products = [(n, d, 3 * d), (n, d, n), (n, n, d), (n, d, d), (n, d, 4 * d), (n, 4 * d, d)]
    assert tokens.layer_flops(n, d) == sum(a * b * c for a, b, c in products)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 1.5 * x, vit.init(CONFIG))


def record(**changes):
    return tokens.as_vit(**{"layers": (1, 3), "thresholds": (0.05, 0.06), "tau": 0.01, **changes})


def run(bound, phase):
    @jax.jit
    def forward(arrays, params):
        out = vit.forward(Bound(bound.program, arrays, params), IMAGE, phase=phase)
        return out.logits, out.streams.tokens("vision"), out.stack.aux

    return forward(bound.arrays, bound.params)


def test_hidden_in_training_gone_in_inference(params):
    dense = run(vit.bind(CONFIG, params), "train")[0]
    open_ = run(vit.bind(CONFIG, params, reduce={"vision": record(thresholds=(-1.0, -1.0))}), "train")
    np.testing.assert_allclose(open_[0], dense, atol=1e-4)
    np.testing.assert_allclose(objectives.flops_share(open_[2]), 1)
    shown = {}
    for name, phase, more in (("train", "train", {}), ("mask", "prefill", {}), ("keep", "prefill", {"capacity": (16, 12)})):
        logits, rows, aux = run(vit.bind(CONFIG, params, reduce={"vision": record(**more)}), phase)
        live = rows.meta.valid if rows.meta.weight is None else rows.meta.weight > 0.5
        shown[name] = np.asarray(logits), np.asarray(live).sum(-1), np.asarray(objectives.flops_share(aux))
    for name in ("mask", "keep"):
        np.testing.assert_allclose(shown[name][0], shown["train"][0], atol=1e-4)
        np.testing.assert_array_equal(shown[name][1], shown["train"][1])
        np.testing.assert_allclose(shown[name][2], shown["train"][2], atol=1e-6)
    assert (shown["train"][1] < 16).all() and (shown["train"][1] > 0).all(), shown["train"][1]
    assert np.abs(shown["train"][0] - dense).max() > 1e-3
    # The share, from the counts: layer 0 sees all, layers 1 and 2 what the first cut left, layer 3 what the second did.
    first, second = (np.asarray(aux[f"cut.{i}"]["policy"]).sum(-1) + 1 for i in range(2))
    layers = sum(tokens.layer_flops(n, 16) for n in (17, first, first, second))
    np.testing.assert_allclose(shown["keep"][2], layers / (4 * tokens.layer_flops(17, 16)), rtol=1e-5)


def test_batches_keep_alike_and_scores_join(params):
    _, rows, aux = run(vit.bind(CONFIG, params, reduce={"vision": record(even=True)}), "prefill")
    assert len(set(np.asarray(rows.meta.valid).sum(-1).tolist())) == 1
    plain = run(vit.bind(CONFIG, params, reduce={"vision": record()}), "prefill")[2]
    assert np.asarray(aux["cut.0"]["policy"]).sum() <= np.asarray(plain["cut.0"]["policy"]).sum()
    open_ = {"thresholds": (-1.0, -1.0), "layers": (2, 3)}
    of = {kind: run(vit.bind(CONFIG, params, reduce={"vision": record(score=kind, **open_)}), "prefill")[2]
          for kind in ("last", "sum", "ema")}  # fmt: skip
    first, last = (np.asarray(of["last"][f"cut.{i}"]["scores"]) for i in range(2))
    np.testing.assert_allclose(of["sum"]["cut.1"]["scores"], of["sum"]["cut.0"]["scores"] + last, atol=1e-6)
    np.testing.assert_allclose(of["ema"]["cut.1"]["scores"], 0.99 * of["ema"]["cut.0"]["scores"] + 0.01 * last, atol=1e-6)
    np.testing.assert_allclose(of["sum"]["cut.0"]["scores"], first, atol=1e-6)


def test_thresholds_learn_through_the_decision_alone(params):
    bound = vit.bind(CONFIG, params, reduce={"vision": record()})
    fixed = Bound(bound.program, bound.arrays, params)

    def loss(trained, phase):
        arrays = {**fixed.arrays, "trained": trained}
        out = vit.forward(Bound(fixed.program, arrays, params), IMAGE, phase=phase)
        return jnp.sum(jax.nn.log_softmax(out.logits)[:, 0])

    grads = jax.jit(jax.grad(loss), static_argnums=1)
    learned, still = (jax.tree.leaves(grads(bound.arrays["trained"], phase)) for phase in ("train", "prefill"))
    assert all(np.isfinite(x) and abs(x) > 1e-6 for x in learned) and not any(still)


def test_bad_arguments():
    for given, message in (
        ({"score": "max"}, "score: expected one of"), ({"layers": (1, 2)}, "thresholds: expected as many as layers"),
        ({"capacity": (8,)}, "capacity: expected one per cut, 3"), ({"tau": 0.0}, "tau: expected above 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tokens.as_vit(**given)
