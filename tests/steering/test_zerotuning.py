"""ZeroTuning: the bias is the renormalised scaling; per head, layer and cache; the search finds planted heads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import attend_call, make_call
from jaxattn.core.mask import causal
from jaxattn.core.types import Ctx, Meta, Spec, State, View, split
from jaxattn.steering.zerotuning import prediction_entropy, zerotuning, zerotuning_search

SPEC = Spec(layers=3, heads=4)
N = 19


@partial(jax.jit, static_argnames="program")
def layer_of(program, params, call, layer):
    return attend_call(program.call(params, State(), call, Ctx(layer=layer)))[0].out


def run(method, call, layer=1):
    return layer_of(*split(method, SPEC), call, layer)


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(3)
    return (rng.normal(size=(2, N, 4, 8)).astype(np.float32), *rng.normal(size=(2, 2, N, 2, 8)).astype(np.float32))


def scaled(q, k, v, gamma):
    """Post-softmax scaling of key 0 by gamma [H] and renormalisation, as published."""
    s = np.einsum("bnhd,bmhd->bhnm", q, np.repeat(k, 2, 2)) / 8**0.5
    a = np.array(jax.nn.softmax(np.where(np.tri(s.shape[2], dtype=bool), s, -np.inf)))
    a[..., 0] *= np.asarray(gamma)[:, None]
    return np.einsum("bhnm,bmhd->bnhd", a / a.sum(-1, keepdims=True), np.repeat(v, 2, 2))


def test_bias_is_the_renormalised_scaling_per_query_head(qkv):
    call = make_call(*qkv, mask=causal())
    for method, gamma in (
        (zerotuning(1.0), [1, 1, 1, 1]),
        (zerotuning(4.0), [4, 4, 4, 4]),
        (zerotuning(0.3, heads=(1, 2)), [1, 0.3, 0.3, 1]),
        (zerotuning(0.3, layers=(0, -1)), [1, 1, 1, 1]),
        (zerotuning([[1] * 4, [2, 1, 0.5, 3], [9] * 4]), [2, 1, 0.5, 3]),
        (zerotuning(2.0, heads=np.array([False, False, False, True])), [1, 1, 1, 2]),
    ):
        np.testing.assert_allclose(run(method, call), scaled(*qkv, gamma), atol=2e-6)


def test_gamma_zero_masks_the_key(qkv):
    q, k, v = qkv
    call = make_call(q, k, v, mask=causal())
    without = make_call(q[:, 1:], k[:, 1:], v[:, 1:], mask=causal())
    np.testing.assert_allclose(run(zerotuning(0.0), call)[:, 1:], run(zerotuning(1.0), without), atol=2e-6)
    # Another position, and keys that are not where their position says.
    order = np.random.default_rng(1).permutation(N)
    moved = make_call(q, k[:, order], v[:, order], mask=causal(), k_meta=Meta.of(N, pos=order[None].astype(np.int32)))
    np.testing.assert_allclose(run(zerotuning(3.0), moved), scaled(q, k, v, [3] * 4), atol=2e-6)
    shifted = make_call(q, k, v, mask=causal(), q_meta=Meta.of(N, pos=np.arange(N)[None] + 5),
                        k_meta=Meta.of(N, pos=np.arange(N)[None] + 5))  # fmt: skip
    np.testing.assert_allclose(run(zerotuning(3.0, key=5), shifted), scaled(q, k, v, [3] * 4), atol=2e-6)


def test_decoding_with_views_by_head_and_existing_biases(qkv):
    q, k, v = qkv
    gamma = [2.0, 1.0, 0.5, 3.0]
    last = Meta.of(1, pos=np.array([[N - 1]]))
    past = [View(k[:, : N - 1, [g]], v[:, : N - 1, [g]], Meta.of(N - 1), heads=np.array([g])) for g in (1, 0)]
    call = make_call(q[:, -1:], k[:, -1:], v[:, -1:], q_meta=last, k_meta=last, mask=causal(), past=tuple(past))
    np.testing.assert_allclose(run(zerotuning(gamma), call), scaled(q, k, v, gamma)[:, -1:], atol=2e-6)
    # Biases add, also one per kv head: log 2 on key 0 of kv head 1 doubles its two query heads.
    extra = np.zeros((1, N, 2), np.float32)
    extra[0, 0, 1] = np.log(2)
    call = make_call(q, k, v, mask=causal(), key={"bias": extra})
    np.testing.assert_allclose(run(zerotuning(gamma), call), scaled(q, k, v, [2.0, 1.0, 1.0, 6.0]), atol=2e-6)


def test_record_operands_and_bfloat16(qkv):
    assert zerotuning(2.0) == zerotuning(2.0) and hash(zerotuning([1.0, 2])) == hash(zerotuning(np.array([1, 2.0])))
    call = make_call(*(x.astype(jnp.bfloat16) for x in qkv), mask=causal())
    before, found = layer_of._cache_size(), []
    for method in (zerotuning(2.0), zerotuning([0.1] * 4, layers=(1,)), zerotuning(5.0, heads=(3,))):
        out = run(method, call)
        assert out.dtype == jnp.bfloat16
        found.append(np.asarray(out, np.float32))
    assert layer_of._cache_size() == before + 1 and np.isfinite(found).all()
    for method in (found[0], found[1]):
        assert np.abs(method - found[2]).max() > 1e-2
    with pytest.raises(ValueError, match="gamma"):
        zerotuning(-1.0)
    with pytest.raises(ValueError, match="heads"):
        split(zerotuning(2.0, heads=(4,)), SPEC)


def test_search_finds_the_planted_heads():
    gain = np.array([0.0, 0.3, -0.1, 0.2, 0.05, 0.4])  # up-effective: 1, 3, 4, 5
    calls = []

    def accuracy(table):
        assert table.shape == (3, 6) and table.dtype == np.float32
        calls.append(table)
        t = np.log(table.mean(0))
        return 0.5 + (gain * (t - t * t / 3)).sum()

    found = zerotuning_search(accuracy, 6, 3, (0.5, 1, 2, 3, 4, 9), top_frac=0.5)
    assert found["up"] and np.flatnonzero(found["heads"]).tolist() == [1, 5]
    assert found["gamma"] == 4.0 and found["metric"] > found["base"] and len(calls) == 1 + 6 + 5
    np.testing.assert_allclose(np.sign(found["effect"]), np.sign(gain))
    # Entropy goes down where accuracy goes up; heads of the rarer type are never mixed in.
    same = zerotuning_search(lambda t: -accuracy(t), 6, 3, (0.5, 2, 4), mode="unsupervised", top_frac=0.5)
    np.testing.assert_array_equal(same["heads"], found["heads"])
    assert same["metric"] == -found["metric"]
    down = zerotuning_search(lambda t: 1 - np.log(t).sum(), 6, 3, (0.25, 0.5, 2), top_frac=1.0)
    assert not down["up"] and down["heads"].all() and down["gamma"] == 0.25
    none = zerotuning_search(lambda t: 0.7, 6, 3, (0.5, 2))
    assert not none["heads"].any() and none["gamma"] == 1 and none["metric"] == none["base"]
    method = zerotuning(found["gamma"], heads=found["heads"])
    np.testing.assert_array_equal(split(method, Spec(layers=3, heads=6))[1]["on_heads"][1], [0, 1, 0, 0, 0, 1])
    with pytest.raises(ValueError, match="mode"):
        zerotuning_search(accuracy, 6, 3, (2,), mode="labels")


def test_entropy_of_predictions():
    logits = jnp.array([[0.0, 0, 0, 0], [50, 0, 0, 0], [0, 0, -jnp.inf, -jnp.inf]])
    np.testing.assert_allclose(prediction_entropy(logits), (np.log(4) + np.log(2)) / 3, atol=1e-6)
    np.testing.assert_allclose(prediction_entropy(logits, jnp.array([0, 0, 1.0])), np.log(2), atol=1e-6)
