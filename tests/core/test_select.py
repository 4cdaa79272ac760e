"""Every selector against its definition in numpy, with ties, caps and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import mask as masks
from jaxattn.core import select
from jaxattn.core.attend import attend
from jaxattn.core.types import Meta, Selection


def scores_with_ties(rng, *shape):
    return rng.integers(0, 6, shape).astype(np.float32)


def order_of(row):
    return np.argsort(-row, kind="stable")


def test_top_k_and_keep_top_break_ties_to_the_lowest_index(rng):
    s = scores_with_ties(rng, 4, 12)
    values, index = select.top_k(jnp.asarray(s), 5)
    kept, valid = select.keep_top(jnp.asarray(s), 5)
    for r in range(4):
        want = order_of(s[r])[:5]
        np.testing.assert_array_equal(index[r], want)
        np.testing.assert_array_equal(values[r], s[r, want])
        np.testing.assert_array_equal(kept[r], np.sort(want))
    assert valid.all()
    with pytest.raises(ValueError, match="^k: expected between 1 and the 12 entries, got 13"):
        select.top_k(jnp.asarray(s), 13)


def test_keep_top_counts_below_the_capacity(rng):
    s = rng.normal(size=(3, 9)).astype(np.float32)
    s[2, 1:] = -np.inf
    kept, valid = select.keep_top(jnp.asarray(s), 4, count=jnp.asarray([4, 2, 3]))
    for r, n in enumerate((4, 2, 1)):
        assert valid[r].tolist() == [True] * n + [False] * (4 - n)
        np.testing.assert_array_equal(kept[r, :n], np.sort(order_of(s[r])[:n]))
        assert (kept[r, n:] == 0).all()


def test_protected_and_forbidden_rows(rng):
    s = jnp.asarray(rng.normal(size=(1, 8)), jnp.float32)
    rows = jnp.arange(8)[None] % 4 == 3
    kept, _ = select.keep_top(select.protect(s, rows), 3)
    assert set(kept[0].tolist()) >= {3, 7}
    kept, valid = select.keep_top(select.forbid(s, rows), 8)
    assert not set(kept[0][valid[0]].tolist()) & {3, 7} and int(valid.sum()) == 6


def test_rank_of(rng):
    s = scores_with_ties(rng, 3, 10)
    for r, rank in enumerate(select.rank_of(jnp.asarray(s))):
        assert rank[order_of(s[r])].tolist() == list(range(10))


@pytest.mark.parametrize("rule", ["until", "within", "beyond"])
def test_coverage(rng, rule):
    p = rng.dirichlet(np.ones(11) * 0.4, size=5).astype(np.float32)
    for gamma in (0.0, 0.35, 0.9):
        got = select.coverage_count(jnp.asarray(p), gamma, rule=rule)
        kept = select.top_p(jnp.asarray(p), gamma, rule=rule)
        for r in range(5):
            c = np.cumsum(np.sort(p[r])[::-1])
            within = int((c <= gamma).sum())
            want = {"until": int(np.argmax(c >= gamma)) + 1, "within": within, "beyond": within + 1}[rule]
            assert int(got[r]) == want
            assert set(np.flatnonzero(kept[r])) == set(order_of(p[r])[:want])
    assert (select.coverage_count(jnp.asarray(p), 2.0) == 11).all()
    with pytest.raises(ValueError, match="^rule: expected 'until', 'within' or 'beyond'"):
        select.coverage_count(jnp.asarray(p), 0.5, rule="upto")


def test_per_group(rng):
    s, group = scores_with_ties(rng, 2, 20), rng.integers(0, 3, (2, 20))
    quota = np.array([[2, 0, 30], [1, 4, 3]])
    got = select.per_group(jnp.asarray(s), jnp.asarray(group), jnp.asarray(quota))
    for r in range(2):
        for g in range(3):
            members = [i for i in order_of(s[r]) if group[r, i] == g]
            assert set(np.flatnonzero(np.asarray(got[r]) & (group[r] == g))) == set(members[: quota[r, g]])


def test_greedy_is_farthest_point_sampling(rng):
    x = rng.normal(size=(15, 3)).astype(np.float32)
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    want, best = [], np.full(15, 1e9)
    best[4] = -1
    taken = {4}
    for _ in range(6):
        j = max((i for i in range(15) if i not in taken), key=lambda i: (best[i], -i))
        want.append(j)
        taken.add(j)
        best = np.minimum(best, d[j])
    dj = jnp.asarray(d)
    got = select.greedy(
        lambda b: b, lambda b, j: jnp.minimum(b, dj[j]), jnp.full(15, 1e9), 15, 6, forbidden=jnp.arange(15) == 4
    )
    assert got.tolist() == want


def test_gather_and_scatter(rng):
    x = rng.normal(size=(2, 7, 3)).astype(np.float32)
    index = np.array([[6, 0, 0, 3], [1, 2, 5, 4]])
    np.testing.assert_array_equal(select.gather_tokens(jnp.asarray(x), jnp.asarray(index)), x[[[0], [1]], index])
    rows = rng.normal(size=(2, 2, 3)).astype(np.float32)
    got = np.asarray(select.scatter_tokens(jnp.asarray(x), jnp.asarray([[2, 7], [0, 6]]), jnp.asarray(rows)))
    want = x.copy()
    want[0, 2], want[1, 0], want[1, 6] = rows[0, 0], rows[1, 0], rows[1, 1]
    np.testing.assert_array_equal(got, want)


def test_meta_gather_takes_every_field(rng):
    index = jnp.asarray([[3, 1], [0, 4]])
    pos = rng.integers(0, 9, (2, 3, 5)).astype(np.int32)
    rope = rng.normal(size=(2, 3, 5, 2)).astype(np.float32)
    meta = Meta(pos, np.arange(5)[None] < 4, rope, np.arange(10.0).reshape(2, 5), {"kind": pos * 2})
    got = select.gather_meta(meta, index)
    for b in range(2):
        i = np.asarray(index[b])
        np.testing.assert_array_equal(got.pos[b], pos[b][:, i])
        np.testing.assert_array_equal(got.labels["kind"][b], 2 * pos[b][:, i])
        np.testing.assert_array_equal(got.valid[b], i < 4)
        np.testing.assert_array_equal(got.rope[b], rope[b][:, i])
        np.testing.assert_array_equal(got.size[b], meta.size[b, i])
    flat = select.gather_meta(Meta.of(5, rope=rng.normal(size=(1, 5, 3))), index)
    assert flat.rope.shape == (2, 2, 3) and flat.pos.tolist() == index.tolist()


def test_selections_and_their_tables(rng):
    active = rng.random((2, 3, 4, 9)) < 0.4
    active[0, 0, 0] = False
    where = select.from_mask(jnp.asarray(active), unit=4, tile=8)
    np.testing.assert_array_equal(select.to_mask(where, 9), active)
    for b, h, i in np.ndindex(2, 3, 4):
        n = int(where.count[b, h, i])
        np.testing.assert_array_equal(where.index[b, h, i, :n], np.flatnonzero(active[b, h, i]))
        assert (where.index[b, h, i, n:] == 0).all()
    scores = rng.normal(size=active.shape).astype(np.float32)
    best = select.to_mask(select.from_mask(jnp.asarray(active), unit=4, tile=8, cap=2, scores=jnp.asarray(scores)), 9)
    lowest = select.to_mask(select.from_mask(jnp.asarray(active), unit=4, tile=8, cap=2), 9)
    for b, h, i in np.ndindex(2, 3, 4):
        on = np.flatnonzero(active[b, h, i])
        assert set(np.flatnonzero(best[b, h, i])) == set(on[np.argsort(-scores[b, h, i, on])][:2])
        assert set(np.flatnonzero(lowest[b, h, i])) == set(on[:2])


def test_from_index_sorts_and_counts_duplicates_once():
    index = jnp.asarray([[[[5, 2, 5, 0, 2], [1, 1, 1, 7, 7]]]])
    valid = jnp.asarray([[[[True, True, True, False, True], [True, True, True, True, False]]]])
    where = select.from_index(index, valid, unit=2, tile=1)
    assert where.count[0, 0].tolist() == [2, 2]
    assert where.index[0, 0].tolist() == [[2, 5, 0, 0, 0], [1, 7, 0, 0, 0]]


def test_union_and_expand(rng):
    a, b = (rng.random((2, h, 3, 6)) < 0.4 for h in (1, 2))
    pair = [select.from_mask(jnp.asarray(x), unit=4, tile=2) for x in (a, b)]
    np.testing.assert_array_equal(select.to_mask(select.union(*pair), 6), a | b)
    fine = select.expand(pair[1], 2)
    assert fine.unit == 2
    np.testing.assert_array_equal(select.to_mask(fine, 12), np.repeat(b, 2, -1))
    with pytest.raises(ValueError, match="^b: expected unit and tile of a"):
        select.union(pair[0], fine)
    with pytest.raises(ValueError, match="^factor: expected a divisor of the unit 4, got 3"):
        select.expand(pair[0], 3)


def test_expand_keeps_what_belongs_to_a_unit(rng):
    index, count = jnp.asarray([[[[1, 3]]]]), jnp.asarray([[[2]]])
    bounds = jnp.asarray([[[[[1, 5], [3, 6]]]]])
    where = Selection(index, count, 6, 1, bounds=bounds, pos=index * 10, log_weight=index * 0.5)
    fine = select.expand(where, 3)
    assert fine.index[0, 0, 0].tolist() == [3, 4, 5, 9, 10, 11]
    live = lambda s: [  # noqa: E731
        int(u) * s.unit + o for u, (a, b) in zip(s.index[0, 0, 0], s.bounds[0, 0, 0], strict=True) for o in range(a, b)
    ]
    assert live(fine) == live(where)
    assert fine.pos[0, 0, 0].tolist() == [10, 12, 14, 30, 32, 34]
    assert fine.log_weight[0, 0, 0].tolist() == [0.5] * 3 + [1.5] * 3
    with pytest.raises(ValueError, match="^a: expected a selection without bounds"):
        select.union(where, where)


def test_indexed_is_the_top_k_of_the_table_of_unit_scores(rng):
    """Pooled over what is valid, eligible where the mask may show a key to a query of the tile."""
    n, m, unit, tile, kept = 21, 50, 8, 4, 3
    q, k = (jnp.asarray(rng.normal(size=(2, x, h, 6)), jnp.float32) for x, h in ((n, 4), (m, 2)))
    valid = np.arange(m)[None] < np.array([[50], [37]])
    k_meta, q_meta = Meta.of(m, valid=valid), Meta.of(n, pos=np.arange(n)[None] + m - n)
    run = functools.partial(select.indexed, unit=unit, tile=tile, mask=masks.causal(), q_meta=q_meta, k_meta=k_meta)
    last = np.minimum(np.arange(tile, n + tile, tile), n) - 1 + m - n
    for pool in ("mean", "max"):
        where, values = jax.jit(lambda q, k, pool=pool: run(q, k, kept, pool=pool))(q, k)

        def pooled(x, size, valid, how={"mean": np.nanmean, "max": np.nanmax}[pool]):
            x = np.where(valid[..., None, None], x, np.nan)
            x = np.pad(x, [(0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)], constant_values=np.nan)
            return how(x.reshape(2, -1, size, *x.shape[2:]), 2)

        keys = pooled(k, unit, valid | (np.arange(m) >= 40))  # units without a valid key: any number
        table = np.einsum("bnhd,buhd->bhnu", pooled(q, tile, np.ones((1, n), bool)), np.repeat(keys, 2, 2)) * 6**-0.5
        seen = np.broadcast_to((np.arange(7) * unit <= last[:, None]) & valid[:, None, None, ::unit], table.shape)
        want = select.from_mask(jnp.asarray(seen), unit=unit, tile=tile, cap=kept, scores=jnp.asarray(table))
        np.testing.assert_array_equal(where.index, want.index)
        np.testing.assert_array_equal(where.count, want.count)
        chosen = np.take_along_axis(table, np.asarray(where.index), -1)
        chosen = np.where(np.arange(kept) < np.asarray(where.count)[..., None], chosen, -np.inf)
        np.testing.assert_allclose(values, chosen, atol=1e-5)
    assert attend(q, k, k, where=where, mask=masks.causal(), q_meta=q_meta, k_meta=k_meta).out.shape == q.shape


def test_a_lightning_indexer_learns_from_its_scores(rng):
    """One index key per token, ReLU, weights: I(t, s) = sum_h w(t, h) relu(q(t, h) . k(s))."""
    q, k, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 9, 3, 4), (1, 9, 1, 4), (1, 9, 3)))
    run = functools.partial(select.indexed, mask=masks.causal(), heads="sum", gate="relu", scale=1.0)

    def loss(q, k, w):
        table = jnp.einsum("bthd,bsxd->bths", q, k)
        table = jnp.einsum("bth,bths->bts", w, jax.nn.relu(table))[:, None]
        table = jnp.where(jnp.tril(jnp.ones((9, 9), bool)), table, -jnp.inf)
        where, values = run(q, k, 4, weight=w)
        want = jnp.take_along_axis(table, where.index, -1)
        live = jnp.arange(4) < where.count[..., None]
        return tuple(jnp.sum(jnp.where(live, jnp.where(live, x, 0.0) ** 2, 0.0)) for x in (values, want))

    got, want = (jax.jit(jax.grad(lambda *x, i=i: loss(*x)[i], (0, 1, 2)))(q, k, w) for i in (0, 1))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"entries": 0}, "entries"),
        ({"entries": 2, "pool": "sum"}, "pool"),
        ({"entries": 2, "unit": 3, "unit_keys": jnp.zeros((1, 3, 1, 4))}, "unit_keys"),
        ({"entries": 2, "k_meta": Meta.of(5)}, "k_meta"),
    ],
)
def test_bad_arguments_of_indexed_are_named(kwargs, name):
    x = jnp.zeros((1, 6, 1, 4))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        select.indexed(x, x, kwargs.pop("entries"), **kwargs)
