import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core import cache
from jaxattn.core.types import Ctx, Meta, Spec, State, Tokens, split

RNG = np.random.default_rng(0)
SIDE, C, B = 6, 8, 2
N = SIDE * SIDE
WINDOW = (np.arange(N) // SIDE // 3) * 2 + np.arange(N) % SIDE // 3
merge = jax.jit(lambda program, params, x: program.apply(params, State(), Tokens(x, Meta.of(N)), {}, Ctx())[0],
                static_argnums=0)  # fmt: skip


def patches(noise):
    """Four windows, each noisy around a direction of its own."""
    centre = RNG.normal(size=(B, 4, C))
    return (centre[:, WINDOW] + np.asarray(noise)[WINDOW][:, None] * RNG.normal(size=(B, N, C))).astype(np.float32)


def test_windows_merge():
    x = patches([0.05, 3.0, 0.2, 3.0])
    out = merge(*split(tokens.mustdrop_merge(0.8)), x)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for b in range(B):
        alike = []
        for w in range(4):
            near = unit[b, w == WINDOW] @ unit[b, w == WINDOW].T
            alike.append((near.sum() - 9) / 72)
        np.testing.assert_allclose(tokens.window_similarity(x, WINDOW[None].astype(np.int32), 4)[b], alike, atol=1e-5)
        order = [w for w in np.argsort(-np.array(alike)) if alike[w] >= 0.8]
        assert sorted(order) == [0, 2]
        rest = [i for i in range(N) if WINDOW[i] not in order]
        want = np.concatenate([[x[b, w == WINDOW].mean(0) for w in order], x[b, rest]])
        live = np.asarray(out.meta.valid)[b]
        assert live.sum() == N - 16 and live[: N - 16].all()
        np.testing.assert_allclose(out.x[b, : N - 16], want, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(out.slot)[b][WINDOW == order[0]], 0)


def test_extremes_and_capacity():
    same = np.ones((B, N, C), np.float32)
    out = merge(*split(tokens.mustdrop_merge()), same)
    assert (np.asarray(out.meta.valid).sum(-1) == 4).all()
    np.testing.assert_allclose(out.x[:, :4], 1)
    x = patches([0.05, 3.0, 0.2, 3.0])
    never = merge(*split(tokens.mustdrop_merge(1.1)), x)
    np.testing.assert_array_equal(never.x, x)
    sure = tokens.mustdrop_merge(1.1, least=2)
    assert sure.rows(N) == N - 16
    a, b = merge(*split(sure), x), merge(*split(tokens.mustdrop_merge(0.8)), x)
    np.testing.assert_allclose(a.x, b.x[:, : N - 16], atol=1e-6)
    with pytest.raises(ValueError, match="size: expected a divisor"):
        tokens.mustdrop_merge_plan(x, (6, 6), size=4)


def test_two_thresholds_and_the_key_set():
    t, n = 5, 40
    attention = RNG.exponential(size=(B, t, n)).astype(np.float32) ** 2 / 100
    total, most = attention.sum(1), attention.max(1)
    share, individual = 0.02, 0.03
    drop = (total < share * total.sum(-1, keepdims=True)) & (most < individual)
    assert 0 < drop.sum() < drop.size
    np.testing.assert_array_equal(tokens.mustdrop_keep(attention, share, individual), ~drop)
    cls = RNG.exponential(size=(B, n)).astype(np.float32)
    keys = np.asarray(tokens.mustdrop_key_set(cls))
    np.testing.assert_array_equal(keys, np.argsort(np.argsort(-cls, -1), -1) < np.ceil(0.08 * (n - 1)))
    assert np.asarray(tokens.mustdrop_key_set(cls[:, :26]).sum(-1)).tolist() == [2, 2]  # 0.08 x 25, no more
    # nothing but the key set survives impossible thresholds
    np.testing.assert_array_equal(tokens.mustdrop_keep(attention, 1.0, np.inf, protected=keys), keys)
    record = tokens.mustdrop_keys()
    tok = Tokens(np.zeros((B, n, 1), np.float32), Meta.of(n))
    tok = record.apply({"ratio": jnp.float32(0.08)}, State(), tok, {"cls": cls}, Ctx())[0]
    np.testing.assert_array_equal(tok.meta.labels["protected"], keys)
    for capacity, mode in ((None, "keep"), (10, "keep"), (None, "mask")):
        stages = tokens.mustdrop(1.0, 1e9, layers=(1,), capacity=capacity and (capacity,), mode=mode)
        ((site, cut),) = stages.schedule(4)
        program, params = split(cut)
        out = program.apply(params, State(), tok, {"rows": attention}, Ctx())[0]
        assert site == 2 and out.x.shape[1] == (capacity or n)
        np.testing.assert_array_equal(np.asarray(out.slot) >= 0, keys)
    full = split(tokens.mustdrop(0.0, 0.0, layers=(1,), capacity=(10,)).schedule(4)[0][1])
    out = full[0].apply(full[1], State(), tok, {"rows": attention}, Ctx())[0]
    for b in range(B):  # more stay than there is room for: the key set and the largest sums
        rest = np.argsort(-np.where(keys[b], np.inf, total[b]))[:10]
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(out.slot)[b] >= 0), np.sort(rest))
    assert [s for s, _ in tokens.mustdrop().schedule(32)] == [3, 7, 11, 15]


def test_cached_rows_leave_too():
    """Three layers that cached 8 image rows and 4 of text; the last layer saw image rows 1, 3 and 6."""
    n, image = 12, 8
    spec = Spec(layers=3, kv_heads=2, head_dim=4, batch=1, length=14)
    k = RNG.normal(size=(3, 1, n, 2, 4)).astype(np.float32)
    rows = jax.vmap(lambda k: cache.rows_of(k, k, Meta.of(n), {}))(k)
    slots = cache.commit(cache.empty(spec, 14), cache.Append(rows))
    final = Meta.of(4, pos=np.array([[1, 3, 6, 7]], np.int32), valid=np.array([[True, True, True, False]]))
    places = np.arange(image, dtype=np.int32)[None]
    out = tokens.mustdrop_trim(slots, final, places, which=jnp.array([False, True, True]), width=13)
    stay = [1, 3, 6, 8, 9, 10, 11]
    for layer, want in ((0, list(range(n))), (1, stay), (2, stay)):
        live = np.asarray(out.meta.valid)[layer, 0, 0]
        assert live[: len(want)].all() and live.sum() == len(want) == int(out.used[layer])
        np.testing.assert_array_equal(np.asarray(out.meta.pos)[layer, 0, 0, : len(want)], want)
        np.testing.assert_array_equal(out.k[layer, 0, :, : len(want)], k[layer, 0, want].swapaxes(0, 1))
    more = jax.vmap(lambda k: cache.rows_of(k, k, Meta.of(1, pos=np.array([[n]], np.int32)), {}))(k[:, :, :1])
    after = cache.commit(out, cache.Append(more))  # what comes next lies right behind
    assert np.asarray(after.meta.pos)[1, 0, 0, len(stay)] == n and bool(after.meta.valid[1, 0, 0, len(stay)])
