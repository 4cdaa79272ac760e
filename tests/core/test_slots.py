"""Slot maps against the published procedures written out as loops; merging against plain means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import slots


def tome(metric, r, cls):
    """ToMe for one row, step by step: list of member lists in output order, each led by the row it is named after."""
    m = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    a, b = list(range(0, len(m), 2)), list(range(1, len(m), 2))
    sim = m[a] @ m[b].T
    if cls:
        sim[0] = -np.inf
    best, to = sim.max(1), sim.argmax(1)
    edge = np.argsort(-best, kind="stable")
    stay = sorted(edge[r:]) if cls else edge[r:]
    groups = {j: [b[j]] for j in range(len(b))}
    for i in edge[:r]:
        groups[to[i]].append(a[i])
    return [[a[i]] for i in stay] + [groups[j] for j in range(len(b))]


@pytest.mark.parametrize(("n", "r", "cls"), [(12, 4, 0), (13, 5, 1), (13, 6, 0), (9, 0, 1), (2, 1, 0)])
def test_bipartite_follows_tome(rng, n, r, cls):
    metric, x = rng.normal(size=(3, n, 5)), rng.normal(size=(3, n, 4)).astype(np.float32)
    size = rng.integers(1, 5, (3, n)).astype(np.float32)

    @jax.jit
    def run(metric, x, size):
        slot, order = slots.bipartite(metric, r, protect_first=cls)
        mean = slots.merge_tokens(x, slot, n - r, mode="mean")
        return slot, order, mean, slots.merge_tokens(x, slot, n - r, weight=size)

    slot, order, mean, wavg = map(np.asarray, run(jnp.asarray(metric, jnp.float32), jnp.asarray(x), jnp.asarray(size)))
    assert order.shape == (3, n - r)
    for i in range(3):
        groups = tome(metric[i], r, cls)
        assert [g[0] for g in groups] == order[i].tolist()
        for s, g in enumerate(groups):
            assert sorted(np.flatnonzero(np.asarray(slot[i]) == s)) == sorted(g)
            np.testing.assert_allclose(mean[i, s], x[i, g].mean(0), rtol=1e-5, atol=1e-6)
            weighted = np.average(x[i, g], axis=0, weights=size[i, g])
            np.testing.assert_allclose(wavg[i, s], weighted, rtol=1e-5, atol=1e-6)
    if cls:
        assert (order[:, 0] == 0).all() and (jnp.sum(slot == 0, -1) == 1).all()


def test_padding_changes_nothing_for_the_real_rows(rng):
    n, pad, r = 11, 4, 4
    metric = rng.normal(size=(2, n + pad, 5)).astype(np.float32)
    slot, order = slots.bipartite(jnp.asarray(metric[:, :n]), r)
    padded, padded_order = slots.bipartite(jnp.asarray(metric), r, valid=jnp.arange(n + pad)[None] < n)
    assert (padded[:, n:] == -1).all() and padded_order.shape == (2, n + pad - r)
    for i in range(2):  # the same groups under the same names
        name, name_padded = order[i][slot[i]], padded_order[i][padded[i, :n]]
        np.testing.assert_array_equal(name, name_padded)


def test_bipartite_says_how_many_can_merge():
    with pytest.raises(ValueError, match="^r: expected between 0 and 4"):
        slots.bipartite(jnp.zeros((1, 9, 2)), 5, protect_first=1)


def test_nearest_is_visionzip(rng):
    n, keep_n, c = 20, 6, 4
    metric = rng.normal(size=(2, n, 5)).astype(np.float32)
    x = rng.normal(size=(2, n, 3)).astype(np.float32)
    keep = np.zeros((2, n), bool)
    for i in range(2):
        keep[i, rng.permutation(n)[:keep_n]] = True
    targets, ok = slots.strided(jnp.asarray(~keep), c)
    slot = slots.nearest(jnp.asarray(metric), targets, jnp.asarray(~keep))
    got = slots.merge_tokens(jnp.asarray(x), slot, c, mode="target_plus_mean", targets=targets)
    assert ok.all()
    for i in range(2):
        rest = np.flatnonzero(~keep[i])
        step = max(1, len(rest) // c)
        want = rest[::step][:c]
        np.testing.assert_array_equal(targets[i], want)
        unit = metric[i] / np.linalg.norm(metric[i], axis=-1, keepdims=True)
        others = [j for j in rest if j not in want]
        to = {j: int(np.argmax(unit[want] @ unit[j])) for j in others}
        assert (np.asarray(slot[i])[keep[i]] == -1).all()
        for s in range(c):
            members = [j for j in others if to[j] == s]
            expected = x[i, want[s]] + (x[i, members].mean(0) if members else 0)
            np.testing.assert_allclose(got[i, s], expected, rtol=1e-5, atol=1e-6)


def test_strided_with_fewer_rows_than_slots():
    index, valid = slots.strided(jnp.asarray([[False, True, False, True, True]]), 4)
    assert index[0, :3].tolist() == [1, 3, 4] and valid[0].tolist() == [True, True, True, False]
    slot = slots.nearest(jnp.eye(5)[None], index, jnp.ones((1, 5), bool), valid=valid)
    assert slot[0, [1, 3, 4]].tolist() == [0, 1, 2] and int(slot.max()) == 2


def test_windows_average_pool(rng):
    x = rng.normal(size=(2, 5 * 7, 3)).astype(np.float32)
    slot, n = slots.windows((5, 7), (2, 3))
    assert n == 9 and slot.shape == (1, 35)
    got = slots.merge_tokens(jnp.asarray(x), jnp.asarray(slot), n).reshape(2, 3, 3, 3)
    grid = x.reshape(2, 5, 7, 3)
    for i in range(3):
        for j in range(3):
            cell = grid[:, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].reshape(2, -1, 3).mean(1)
            np.testing.assert_allclose(got[:, i, j], cell, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="^size: "):
        slots.windows((5, 7), 6)


def test_compact_keeps_order_and_says_what_is_padding():
    index, valid = slots.compact(jnp.asarray([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1]], bool), 2)
    assert index.tolist() == [[1, 2], [4, 0]] and valid.tolist() == [[True, True], [True, False]]


def test_merging_is_a_weighted_mean_with_its_gradient(rng):
    x = jnp.asarray(rng.normal(size=(2, 7, 3)), jnp.float32)
    w = jnp.asarray(rng.random((2, 7)), jnp.float32)
    slot = jnp.asarray([[0, 1, 1, -1, 3, 0, 3], [2, 2, 2, 2, 2, 2, -1]])
    one = (slot[..., None] == jnp.arange(4)).astype(jnp.float32)

    def dense(x, w):
        p = one * w[..., None]
        mass = p.sum(1)[..., None]
        return jnp.where(mass > 0, jnp.einsum("bns,bnc->bsc", p, x) / jnp.where(mass > 0, mass, 1), 0)

    def fast(x, w):
        return slots.merge_tokens(x, slot, 4, weight=w)

    np.testing.assert_allclose(fast(x, w), dense(x, w), rtol=1e-5, atol=1e-6)
    assert (fast(x, w)[0, 2] == 0).all()
    got, want = (jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(x, w))), (0, 1))(x, w) for f in (fast, dense))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert (got[0][0, 3] == 0).all()
    # the identity map returns the rows, in their dtype; sums are made in float32
    same = slots.merge_tokens(x.astype(jnp.bfloat16), jnp.arange(7)[None], 7)
    assert same.dtype == jnp.bfloat16 and (same == x.astype(jnp.bfloat16)).all()
    long = slots.merge_tokens(jnp.ones((1, 4096, 1), jnp.bfloat16), jnp.zeros((1, 4096), int), 1)
    assert float(long[0, 0, 0]) == 1.0


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (dict(mode="max"), "mode"),
        (dict(mode="mean", weight=jnp.ones((2, 7))), "weight"),
        (dict(weight=jnp.ones((2, 6))), "weight"),
        (dict(mode="target_plus_mean"), "targets"),
        (dict(slot=jnp.zeros((2, 6), int)), "slot"),
    ],
)
def test_bad_input_is_named(bad, name):
    slot = bad.pop("slot", jnp.zeros((2, 7), int))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        slots.merge_tokens(jnp.zeros((2, 7, 3)), slot, 4, **bad)
