"""MULTI-LANE: lanes beside a frozen tower, against one layer written out; a task that comes changes no task before it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.vision import multi_lane as ml
from models.vision import vit
from pallas_kernels import _dispatch
from tests.models.small import SHIPPED

TOWER = vit.config(12, 3, 2, 8, 2, channels=1, hidden=12)
CONFIG = ml.MultiLaneConfig(TOWER, ((0, 3), (1, 2)), selectors=3, prompts=2, prompt_layers=1)
IMAGE = np.random.default_rng(0).normal(size=(2, 12, 12, 1)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def plain_attention():
    """The formula's own body: it compiles in a third of the time."""
    with _dispatch.unnamed("reference"):
        yield


@functools.cache
def vision():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.5, s.dtype), jax.eval_shape(lambda: vit.init(TOWER)))


def lane(seed, c=CONFIG):
    return ml.init(c, jax.random.key(seed))


forward = jax.jit(ml.forward, static_argnums=0, static_argnames="tasks", compiler_options=SHIPPED)


@pytest.fixture(scope="module")
def one():
    return forward(CONFIG, vision(), (lane(0),), IMAGE, tasks=(0,))


@pytest.fixture(scope="module")
def two():
    return forward(CONFIG, vision(), (lane(0), lane(1)), IMAGE)


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_a_lane_is_the_formula(one):
    """Both layers written out for one picture: C ** -0.5 over normed rows with CLS, D&R in each, prompts in the first."""
    from scipy.special import erf

    params, own = jax.tree.map(np.asarray, vision()), jax.tree.map(np.asarray, lane(0))
    x = np.asarray(vit.embed(vision(), TOWER, IMAGE).x)[0]
    dense = lambda p, y: y @ p["kernel"] + p["bias"]  # noqa: E731
    gelu = lambda y: y * 0.5 * (1 + erf(y / 2**0.5))  # noqa: E731
    mlp = lambda p, y: y + dense(p["mlp"]["down"], gelu(dense(p["mlp"]["up"], norm(p["norm2"], y))))  # noqa: E731
    z = np.concatenate([x[:1], own["selectors"]])
    for number in range(2):
        p = jax.tree.map(lambda a, i=number: a[i], params["layers"])

        def attention(u, extra_k=(), extra_v=(), p=p):
            q, k, v = (dense(p["attn"][name], u) for name in "qkv")
            heads = []
            for h in range(2):
                cut = slice(4 * h, 4 * h + 4)
                keys = np.concatenate([*[e[:, h] for e in extra_k], k[:, cut]])
                values = np.concatenate([*[e[:, h] for e in extra_v], v[:, cut]])
                heads.append(softmax(q[:, cut] @ keys.T * 4**-0.5) @ values)
            return dense(p["attn"]["o"], np.concatenate(heads, 1))

        xn, zn = norm(p["norm1"], x), norm(p["norm1"], z)
        read = softmax(zn[1:] @ xn.T * 8**-0.5) @ xn
        extra = ((own["prompts"][0, 0],), (own["prompts"][0, 1],)) if number == 0 else ((), ())
        a = attention(np.concatenate([zn[:1], read]), *extra)
        z = mlp(p, z + np.concatenate([a[:1], zn[1:]]))
        x = mlp(p, x + attention(xn))
    cls = norm(params["norm"], z[0])
    logits = cls / np.linalg.norm(cls) @ own["kernel"] + own["bias"]
    np.testing.assert_allclose(one.lanes[0, 0], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.x[0], x, rtol=1e-4, atol=1e-5)


def test_a_task_that_comes_changes_nothing(one, two):
    np.testing.assert_array_equal(one.lanes[0], two.lanes[0])
    np.testing.assert_array_equal(one.logits[:, [0, 3]], two.logits[:, [0, 3]])
    assert np.isneginf(one.logits[:, [1, 2]]).all() and np.isfinite(two.logits).all()
    np.testing.assert_array_equal(two.logits[:, [1, 2]], two.lanes[1][:, [1, 2]])
    alone = forward(CONFIG, vision(), (lane(1),), IMAGE, tasks=(1,))
    np.testing.assert_array_equal(alone.lanes[0], two.lanes[1])
    assert np.abs(two.lanes[0] - two.lanes[1]).max() > 1e-2


def test_the_frozen_stream_is_the_plain_tower(two):
    plain = vit.forward(vit.bind(TOWER, vision()), IMAGE, layers_to_run=2)
    out = vit.finish(vision(), dataclasses.replace(TOWER, post_norm=False), plain.stack)
    np.testing.assert_allclose(two.x, out.streams.x, atol=1e-5)


def test_selectors_are_a_set(one):
    turned = {**lane(0), "selectors": lane(0)["selectors"][jnp.array([2, 0, 1])]}
    np.testing.assert_allclose(forward(CONFIG, vision(), (turned,), IMAGE, tasks=(0,)).cls, one.cls, atol=1e-5)


def test_gradients_stay_in_the_lane_and_its_classes():
    labels = jnp.array([[1.0, 0, 1, 0], [0, 1, 0, 1]])

    def f(params, lane):
        return ml.loss(CONFIG, ml.forward(CONFIG, params, (lane,), IMAGE, tasks=(1,)).lanes[0], labels, 1)

    frozen, own = jax.jit(jax.grad(f, argnums=(0, 1)))(vision(), lane(1))
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(frozen))
    assert all(np.abs(own[name]).max() > 0 for name in ("selectors", "prompts"))
    assert not np.asarray(own["kernel"])[:, [0, 3]].any() and np.abs(own["kernel"][:, [1, 2]]).min() > 0
    single = ml.loss(CONFIG, jnp.array([[9.0, 1, 2, 9]]), jnp.array([2]), 1)
    np.testing.assert_allclose(single, np.log(1 + np.exp(-1)), rtol=1e-6)


def test_variants():
    tome = dataclasses.replace(CONFIG, tome=4)
    found = forward(tome, vision(), (lane(0, tome),), IMAGE)
    assert "selectors" not in lane(0, tome) and np.isfinite(found.lanes).all()
    x = jax.random.normal(jax.random.key(0), (1, 17, 3))
    from jaxattn.core.slots import bipartite, merge_tokens

    by_hand = merge_tokens(x, bipartite(x, 8)[0], 9, mode="mean")
    np.testing.assert_allclose(ml.merge_down(x, 5), merge_tokens(by_hand, bipartite(by_hand, 4)[0], 5, mode="mean"), atol=1e-6)
    once = dataclasses.replace(CONFIG, replace=False)
    assert np.abs(forward(once, vision(), (lane(0),), IMAGE).cls - found.cls).max() > 1e-3
    with pytest.raises(ValueError, match="tasks: expected every class"):
        dataclasses.replace(CONFIG, tasks=((0, 1), (1, 2)))
    with pytest.raises(ValueError, match="lanes: expected one for each"):
        ml.forward(CONFIG, vision(), (lane(0),), IMAGE, tasks=(5,))
