"""DyVTE: what routers read, whole blocks that leave, labels by counterfactuals, and gradients for routers alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import objectives, tokens
from jaxattn.core.types import Meta, State, contract, operand
from models.bind import Bound
from models.language import llm
from models.multimodal import vlm
from models.vision import vit
from tests.models.small import quick
from train.methods import Outcome

CONFIG = vlm.VLMConfig(vit.config(12, 4, 2, 8, 2, hidden=8), llm.tiny(vocab=24, layers=4, dim=16, hidden=16), 16)
B, N, T, L = 2, 9, 6, 4
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(size=(B, 12, 12, 3)).astype(np.float32)
TEXT = RNG.integers(1, 24, (B, T)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 2 * x, vlm.init(CONFIG))


def forward(program, arrays, params, phase="prefill", key=None):
    out, _ = vlm.forward(Bound(program, arrays, params), IMAGE, TEXT, phase=phase, key=key, image_at=1)
    return out.logits, out.stack.streams.tokens("vision").meta.valid, out.stack.aux, out.stack.streams.x


run = quick(forward, static_argnums=0, static_argnames="phase")


@contract
class hide_images:
    """Image rows are no keys behind layer ``layer``: another way to the same place."""

    layer: int = operand("int", 0)

    def call(self, params, state, call, ctx):
        visible = call.k_meta.valid & ((ctx.layer <= params["layer"]) | (call.k_meta.labels["kind"] == 0))
        return call.replace(k_meta=call.k_meta.replace(valid=visible))


def test_rows_a_router_reads():
    meta = Meta.of(8, pos=np.array([[5, 0, 1, 2, 3, 4, 6, 7]]), kind=np.array([[0, 0, 1, 1, 0, 0, 0, 0]]),
                   valid=np.array([[True] * 7 + [False]]))  # fmt: skip
    found = [np.asarray(tokens.prompt_rows(last)(meta, {}))[0] for last in (False, True)]
    np.testing.assert_allclose(found[0], np.array([1, 0, 0, 0, 1, 1, 0, 0]) / 3, atol=1e-6)  # behind the image, but the last
    np.testing.assert_array_equal(found[1], [0, 0, 0, 0, 0, 0, 1, 0])
    answered = meta.replace(labels={**meta.labels, "answer": np.array([[1, 0, 0, 0, 0, 0, 1, 0]])})
    np.testing.assert_array_equal(tokens.prompt_rows(True)(answered, {})[0], [0, 0, 0, 0, 0, 1, 0, 0])


def test_forced_exits(params):
    dense = run(*vlm.bind(CONFIG, params))
    last = run(*vlm.bind(CONFIG, params, reduce={"llm": tokens.visual_exit(L - 1)}))
    np.testing.assert_allclose(last[0], dense[0], atol=1e-6)
    found = {}
    for mode, rows in (("keep", 1), ("mask", N)):
        out = run(*vlm.bind(CONFIG, params, reduce={"llm": tokens.visual_exit(1, mode)}))
        assert out[1].shape == (B, rows) and not np.asarray(out[1]).any()
        found[mode] = np.asarray(out[0])
    hidden = run(*vlm.bind(CONFIG, params, steering=hide_images(1)))[0]
    np.testing.assert_allclose(found["mask"], hidden, atol=1e-5)
    np.testing.assert_allclose(found["keep"], hidden, atol=1e-5)  # original positions: the gap stays
    assert np.abs(hidden - dense[0]).max() > 1e-3
    with pytest.raises(ValueError, match="layer: expected one of the 4 layers, got 4"):
        vlm.bind(CONFIG, params, reduce={"llm": tokens.visual_exit(4)})


def by_hand(p, x, meta):
    """Router logits of one example from its hidden rows [M, C] behind a layer."""
    text = np.flatnonzero((meta["kind"] == 0) & (meta["pos"] > N))
    f = np.concatenate([x[text[:-1]].mean(0), x[text[-1]]])
    h = np.asarray(jax.nn.gelu(jnp.asarray(f @ np.asarray(p["w1"])), approximate=False))
    return h @ np.asarray(p["w2"])


def test_routers_decide_for_each_image(params):
    """The first router whose second logit wins, by hand; a margin no router reaches gives the dense model."""
    record = tokens.dyvte(hidden=8)
    bound = vlm.bind(CONFIG, params, reduce={"llm": record}, key=jax.random.key(3))
    gates = bound.arrays["trained"]["llm"]
    assert sorted(gates) == ["cut.0", "cut.1", "cut.2"]
    assert np.abs(gates["cut.0"]["w1"] - gates["cut.1"]["w1"]).max() > 0, "every layer has a router of its own"
    never = vlm.bind(CONFIG, params, reduce={"llm": tokens.dyvte(hidden=8, margin=np.inf)}, key=jax.random.key(3))
    dense, _, aux, _ = run(*never)
    np.testing.assert_allclose(dense, run(*vlm.bind(CONFIG, params))[0], atol=1e-6)
    assert not any(np.asarray(told["left"]).any() for told in aux.values())
    # Behind layer 0 all images are there: its router's logits, from the rows that a model of one layer leaves.
    short = {**params, "llm": {**params["llm"], "layers": jax.tree.map(lambda a: a[:1], params["llm"]["layers"])}}
    shallow = vlm.VLMConfig(CONFIG.vision, llm.tiny(vocab=24, layers=1, dim=16, hidden=16), 16)
    rows = np.asarray(run(*vlm.bind(shallow, short))[3])
    order = {"kind": np.repeat([1, 0], [N, T]), "pos": np.r_[1 + np.arange(N), 0, 1 + N + np.arange(T - 1)]}
    want = np.stack([by_hand(gates["cut.0"], x, order) for x in rows])
    np.testing.assert_allclose(aux["cut.0"]["logits"], want, atol=1e-4)
    # At a margin between the two images, one leaves behind layer 1 and the other behind layer 2.
    z = np.asarray(aux["cut.1"]["logits"])
    z = z[:, 1] - z[:, 0]
    first, middle = (int(z.argmax()), int(z.argmin())), float(z.mean())
    margins = {"cut.0": np.inf, "cut.1": middle, "cut.2": -np.inf}
    operands = bound.arrays["operands"]
    mine = {**operands["llm"], **{name: {"margin": jnp.float32(m)} for name, m in margins.items()}}
    arrays = {**bound.arrays, "operands": {**operands, "llm": mine}}
    logits, valid, aux, _ = run(bound.program, arrays, params)
    assert not np.asarray(valid).any()
    np.testing.assert_array_equal(np.flatnonzero(aux["cut.1"]["left"]), [first[0]])
    np.testing.assert_array_equal(np.flatnonzero(aux["cut.2"]["left"]), [first[1]])
    for image, layer in ((first[0], 1), (first[1], 2)):
        want = run(*vlm.bind(CONFIG, params, steering=hide_images(layer)))[0]
        np.testing.assert_allclose(logits[image], want[image], atol=1e-5)


def test_labels_by_hand():
    whole = np.full((4, 3, 2), 0.0, np.float32)
    whole[..., 1] = 2.0
    targets, weight = np.ones((4, 3), np.int32), np.array([[0, 1, 1]] * 4, np.float32)
    without = whole.copy()
    without[1, 2, 1] = -0.1  # another prediction
    without[2, 1:, 1] = 1.8  # the same ones, less sure
    without[3, 0] = [9.0, 0.0]  # a row that does not count
    label = objectives.exit_label(whole, without, targets, weight)
    np.testing.assert_array_equal(label, [True, False, False, True])
    assert np.log1p(np.exp(-1.8)) > 1.03 * np.log1p(np.exp(-2.0))
    np.testing.assert_array_equal(objectives.exit_label(whole, without, targets, weight, slack=1.3), [True, False, True, True])
    z = np.array([[0.3, -0.4], [1.0, 2.0]], np.float32)
    got = objectives.router_loss(z, jnp.array([True, False]), np.array([1.0, 0.0]))
    np.testing.assert_allclose(got, np.log1p(np.exp(0.7)), rtol=1e-6)


def test_a_step_draws_one_layer_and_trains_its_router_alone(params):
    bound = vlm.bind(CONFIG, params, reduce={"llm": tokens.dyvte(hidden=8)})
    objective = objectives.dyvte()
    assert objective.rates == {"model": 0.0} and objective.teacher
    batch = {"targets": jnp.roll(TEXT, -1, 1), "loss_mask": jnp.ones((B, T)).at[:, :2].set(0)}
    whole = run(*vlm.bind(CONFIG, params))[0]

    @quick
    def step(trained, weights, key):
        def loss(trained, weights):
            def outcome(batch):
                out = forward(bound.program, {**bound.arrays, "trained": trained}, weights, phase="train", key=key)
                return Outcome(jnp.float32(0), {}, out[0], batch["loss_mask"], {}, {"llm": out[2]}, {})

            teacher = Outcome(jnp.float32(0), {}, whole, batch["loss_mask"], {}, {}, {})
            return objective.loss({"method": trained}, State(shared=teacher), outcome, batch, key)

        (value, metrics), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(trained, weights)
        return value, metrics, grads

    seen = set()
    mild = jax.tree.map(lambda x: 0.1 * x, bound.arrays["trained"])  # routers that are sure of nothing
    for seed in range(6):
        value, metrics, (gates, model) = step(mild, params, jax.random.key(seed))
        drawn = int(metrics["layers"]) - 1
        assert metrics["exits"] == 1 and np.isfinite(value)
        for i in range(3):
            assert (np.abs(gates["llm"][f"cut.{i}"]["w2"]).max() > 0) == (i == drawn)
        assert all(np.abs(x).max() == 0 for x in jax.tree.leaves(model)), "routers only"
        seen.add(drawn)
    assert len(seen) > 1
