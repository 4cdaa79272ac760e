"""VHR: the divergence and its outlier rule, the median split per sample, sequential and frozen gains."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import attend, attend_call, make_call
from jaxattn.core.mask import causal
from jaxattn.core.types import Ctx, Meta, Spec, State, split
from jaxattn.steering.vhr import divergence, t_vhd, vhr, vision_aware

B, N, H, L = 2, 14, 6, 3
SPEC = Spec(layers=L, heads=H, batch=2 * B)
IMAGE = slice(2, 8)
LAST = np.array([13, 11])  # the second sample is two tokens shorter


def paired_meta(image=True):
    valid = np.arange(N) <= LAST[:, None]
    seen = valid.copy()
    seen[:, IMAGE] = False
    return Meta.of(N, pos=np.arange(N, dtype=np.int32)[None].repeat(2 * B, 0), valid=np.concatenate([valid, seen]))


@partial(jax.jit, static_argnames=("program", "phase"))
def layer_of(program, params, state, out, meta, layer, phase="prefill"):
    return program.heads(params, state, out, meta, Ctx(layer=layer, phase=phase))


@pytest.fixture(scope="module")
def streams():
    """Head outputs [2B, N, H, D] of attention with and without the image."""
    rng = np.random.default_rng(7)
    q = np.tile(rng.normal(size=(B, N, H, 8)).astype(np.float32), (2, 1, 1, 1))
    k, v = (np.tile(x, (2, 1, 1, 1)) for x in rng.normal(size=(2, B, N, 2, 8)).astype(np.float32))
    return attend(q, k, v, mask=causal(), q_meta=paired_meta(), k_meta=paired_meta()).out


def slice_of(state):
    return State(state.layer[0])


def test_divergence_and_outliers():
    out, without = np.zeros((8, 4)), np.zeros((8, 4))
    out[:, 0] = [1, 2, 3, 4, 5, 6, 7, 40]
    np.testing.assert_allclose(divergence(out, without), [1, 2, 3, 4, 5, 6, 7, 40])  # no text activation: kept
    out[7, 1], without[7, 1] = 30, 30
    np.testing.assert_allclose(divergence(out, without), [1, 2, 3, 4, 5, 6, 7, 0])
    np.testing.assert_allclose(divergence(out, without, outliers=False)[7], 40)
    without[7, 1] = out[7, 1] = 0
    without[2, 1] = out[2, 1] = 30  # extreme text, ordinary divergence: kept
    np.testing.assert_allclose(divergence(out, without)[2], 3)
    assert vision_aware(jnp.array([[3.0, 1, 4, 2], [0, 0, 0, 0]])).tolist() == [[True, False, True, False], [False] * 4]
    vhd = jnp.array([[[1.0, 5, 3], [2, 0, 2]]])
    np.testing.assert_allclose(t_vhd(vhd, 2), [12])
    np.testing.assert_allclose(t_vhd(vhd, 1), [7])


def test_median_split_per_sample_at_the_last_valid_row(streams):
    program, params = split(vhr(2.0, layers=None), SPEC)
    out, state = layer_of(program, params, slice_of(program.init_state(SPEC)), streams, paired_meta(), 1)
    gains = np.asarray(state.layer)
    assert gains.shape == (2 * B, H) and gains.dtype == np.float32
    at = np.asarray(streams)[np.arange(2 * B), np.tile(LAST, 2)]
    vhd = np.asarray(divergence(at[:B], at[B:]))
    for b in range(B):
        expected = np.where(vhd[b] > np.median(vhd[b]), 2.0, 1.0)
        np.testing.assert_array_equal(gains[b], expected)
        np.testing.assert_array_equal(gains[B + b], expected)
        assert (expected == 2).sum() == H // 2 or (vhd[b] == 0).any()
    assert (gains[0] != gains[1]).any()
    np.testing.assert_allclose(out, np.asarray(streams) * gains[:, None, :, None], atol=1e-6)


def test_identity_and_image_that_nobody_sees(streams):
    fresh = slice_of(vhr().init_state(SPEC))
    for method, layer in ((vhr(1.0, layers=None), 1), (vhr(2.0, layers=(0, -1)), 1)):
        out, state = layer_of(*split(method, SPEC), fresh, streams, paired_meta(), layer)
        np.testing.assert_array_equal(out, streams)
        np.testing.assert_array_equal(state.layer, 1)
    blind = jnp.concatenate([streams[:B], streams[:B]])
    out, state = layer_of(*split(vhr(2.0, layers=None), SPEC), fresh, blind, paired_meta(), 1)
    np.testing.assert_array_equal(state.layer, 1)


def test_later_steps_only_scale(streams):
    program, params = split(vhr(3.0, layers=None), SPEC)
    _, state = layer_of(program, params, slice_of(program.init_state(SPEC)), streams, paired_meta(), 2)
    step = streams[:B, :1] * 0.7
    meta = Meta.of(1, pos=np.array([[N]]))
    for phase in ("decode", "extend"):
        for rows in (step, jnp.concatenate([step, step])):  # with or without the second stream
            out, after = layer_of(program, params, state, rows, meta, 2, phase=phase)
            np.testing.assert_allclose(out, rows * state.layer[: rows.shape[0], None, :, None], rtol=1e-6)
            np.testing.assert_array_equal(after.layer, state.layer)


def test_boosted_heads_align_the_residual_with_their_contribution(streams):
    """Proposition 1: the cosine between what the feed-forward reads and a boosted head's contribution rises."""
    program, params = split(vhr(2.0, layers=None), SPEC)
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(H, 8, 32)), rng.normal(size=(2 * B, N, 32))
    out, state = layer_of(program, params, slice_of(program.init_state(SPEC)), streams, paired_meta(), 1)
    cos = lambda a, b: (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)  # noqa: E731
    parts = np.einsum("bnhd,hdc->bnhc", np.asarray(streams), w)
    before = x + parts.sum(2)
    boosted = np.flatnonzero(np.asarray(state.layer)[0] == 2)
    contribution = parts[0, LAST[0], boosted].sum(0)
    after = x + np.einsum("bnhd,hdc->bnc", np.asarray(out), w)
    assert len(boosted) and cos(after[0, LAST[0]], contribution) > cos(before[0, LAST[0]], contribution)


def test_selection_is_sequential():
    """What layer 1 measures already carries the gains of layer 0: two layers as the loop runs them."""
    rng = np.random.default_rng(11)
    x = np.tile(rng.normal(size=(B, N, 16)).astype(np.float32), (2, 1, 1))
    w = rng.normal(size=(2, 4, 16, 16)).astype(np.float32) / 4
    spec, meta = Spec(layers=2, heads=4, batch=2 * B), paired_meta()

    @jax.jit
    def both(params, x):
        found = []
        for layer in range(2):
            q, k, v = ((x @ w[layer, i]).reshape(2 * B, N, 4, 4) for i in range(3))
            out = attend_call(make_call(q, k, v, q_meta=meta, k_meta=meta, mask=causal()))[0].out
            ctx = Ctx(layer=layer, phase="prefill")
            scaled, state = program.heads(params, State(jnp.ones((2 * B, 4))), out, meta, ctx)
            x = x + scaled.reshape(x.shape) @ w[layer, 3]
            found.append((out, state.layer))
        return found

    results = {}
    for name, layers in (("both", None), ("second", (1,))):
        program, params = split(vhr(4.0, layers=layers), spec)
        results[name] = both(params, x)
    assert both._cache_size() == 1  # alpha and the layer set are operands
    (_, first), (reinforced, second) = results["both"]
    at = np.asarray(reinforced)[np.arange(2 * B), np.tile(LAST, 2)]
    np.testing.assert_array_equal(second[:B] == 4, vision_aware(divergence(at[:B], at[B:])))
    (_, off), (plain, gains) = results["second"]
    assert (np.asarray(off) == 1).all() and (np.asarray(first) != 1).any() and (np.asarray(gains) != 1).any()
    assert np.abs(reinforced - plain).max() > 1e-2


def test_record_and_errors(streams):
    assert vhr() == vhr() and hash(vhr(2)) == hash(vhr(2.0)) and vhr().paired
    assert split(vhr(), Spec(layers=32))[1]["layers"].sum() == 15
    with pytest.raises(ValueError, match="layers"):
        split(vhr(), Spec(layers=8))
    program, params = split(vhr(layers=None), SPEC)
    with pytest.raises(ValueError, match="batch"):
        layer_of(program, params, State(jnp.ones((3, H))), streams[:3], Meta.of(N), 1)
    half, state = layer_of(program, params, State(jnp.ones((2 * B, H))), streams.astype(jnp.bfloat16), paired_meta(), 1)
    assert half.dtype == jnp.bfloat16 and state.layer.dtype == jnp.float32
