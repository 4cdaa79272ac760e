"""Gathering and masking mean the same; slot maps compose; positions stay or restart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import attend
from jaxattn.core.mask import causal
from jaxattn.core.reduce import choose, dispose, fresh, reduce_keep, reduce_mask, reduce_merge
from jaxattn.core.slots import bipartite, merge_tokens
from jaxattn.core.types import Meta, Tokens

B, N, H, D = 2, 13, 2, 8
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, N, H * D)).astype(np.float32)
START = 5  # rows come after a prefix
SCORES = RNG.normal(size=(B, N)).astype(np.float32)
ALL = np.ones((B, N), bool)


def rows(n=N, **fields):
    return Tokens(X[:, :n], Meta.of(n, pos=START + np.arange(n, dtype=np.int32)[None], **fields))


def self_attention(tokens):
    q = tokens.x.reshape(*tokens.x.shape[:2], H, D)
    meta = tokens.meta
    at = meta.pos if meta.rope is None else meta.rope
    angle = at[..., None, None] * 0.3 ** jnp.arange(D // 2)
    c, s = jnp.cos(angle), jnp.sin(angle)
    q = jnp.concatenate([q[..., : D // 2] * c - q[..., D // 2 :] * s, q[..., D // 2 :] * c + q[..., : D // 2] * s], -1)
    return attend(q, q, q, mask=causal(), q_meta=meta, k_meta=meta).out


@pytest.mark.parametrize("positions", ["original", "fresh"])
def test_gather_is_mask(positions):
    """The same outputs at surviving rows through causal attention with rotary positions, one cut after another."""
    keep, final = rows(), rows()
    for cut, seed in ((9, 0), (4, 1)):
        score = np.random.default_rng(seed).normal(size=(B, N)).astype(np.float32)
        here = keep.meta.labels["origin"] if cut == 4 else np.broadcast_to(np.arange(N), (B, N))
        valid = np.broadcast_to(keep.meta.valid, here.shape)
        chosen = choose(jnp.take_along_axis(score, here, 1), cut, valid)
        if cut == 9:
            origin = {"origin": np.arange(N, dtype=np.int32)[None]}
            keep, final = (t.replace(meta=t.meta.replace(labels=origin)) for t in (keep, final))
        keep = dispose(keep, chosen, cut + 1, "keep", positions)  # one row of capacity stays empty
        masked = choose(score, cut, jnp.broadcast_to(final.meta.valid, (B, N)))
        final = dispose(final, masked, cut + 1, "mask", positions)
    short, long = self_attention(keep), self_attention(final)
    for b in range(B):
        alive = np.flatnonzero(np.asarray(final.meta.valid)[b])
        assert len(alive) == 4 and keep.x.shape[1] == 5
        np.testing.assert_array_equal(np.asarray(keep.meta.labels["origin"])[b, :4], alive)
        np.testing.assert_allclose(short[b, :4], long[b, alive], atol=1e-6)
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(keep.slot)[b] >= 0), alive)
        np.testing.assert_array_equal(np.asarray(keep.slot)[b, alive], np.arange(4))
        np.testing.assert_array_equal(np.asarray(final.slot)[b, alive], alive)
        want = START + (np.arange(4) if positions == "fresh" else alive)
        at = keep.meta.pos if positions == "original" else keep.meta.rope
        np.testing.assert_array_equal(np.asarray(at)[b, :4], want)
        np.testing.assert_array_equal(np.asarray(keep.meta.pos)[b, :4], START + alive)


def test_dropped_rows_say_nothing():
    keep = choose(SCORES, 5, ALL)
    a = reduce_mask(rows(), keep)
    b = a.replace(x=jnp.where(keep[..., None], X, 9.0))
    at = np.asarray(keep)
    np.testing.assert_array_equal(np.asarray(self_attention(a))[at], np.asarray(self_attention(b))[at])


def test_choose():
    keep = np.asarray(choose(SCORES, jnp.array([3, 7]), ALL))
    for b, k in enumerate((3, 7)):
        np.testing.assert_array_equal(np.flatnonzero(keep[b]), np.sort(np.argsort(-SCORES[b])[:k]))
    np.testing.assert_array_equal(choose(np.zeros((1, 4)), 2, np.array([[False, True, True, True]])),
                                  [[False, True, True, False]])  # fmt: skip
    always = np.arange(N)[None] == np.full((B, 1), 6)
    with_it = np.asarray(choose(SCORES, 3, ALL, always=always))
    assert with_it[:, 6].all() and (with_it.sum(-1) == 4).all()
    crop = np.broadcast_to(np.arange(N) % 3, (B, N))
    keep = np.asarray(choose(SCORES, 7, ALL, crop=crop, crops=3))
    for c in range(3):
        best = np.where(crop == c, SCORES, -np.inf).argsort(-1)[:, -2:]
        np.testing.assert_array_equal(np.sort(np.flatnonzero(keep[0] & (crop[0] == c))), np.sort(best[0]))


def test_rotary_axes_and_padding():
    """Positions of three axes restart alike; rows the caller calls invalid stay invalid."""
    axes = np.stack([np.arange(N)] * 3, -1)[None] + np.array([7, 7, 7])
    valid = np.arange(N)[None] < np.array([[N], [6]])
    index = np.array([[2, 4, 12], [1, 3, 9]], np.int32)
    out = reduce_keep(rows(rope=axes, valid=valid), index, positions="fresh")
    assert out.meta.rope.shape == (B, 3, 3)
    np.testing.assert_array_equal(out.meta.valid, [[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(out.meta.rope[0], [[7] * 3, [8] * 3, [9] * 3])
    np.testing.assert_array_equal(out.meta.rope[1, :2, 0], [7, 8])
    np.testing.assert_array_equal(out.slot[1], [-1, 0, -1, 1, *[-1] * 9])


def test_fresh_over_groups():
    """Prefix, image and question in one order of time: what follows a pruned image moves up."""
    image = rows(6).meta.replace(valid=np.array([[1, 0, 0, 1, 1, 0]], bool))
    before = Meta.of(START)
    after = Meta.of(4, pos=START + 6 + np.arange(4, dtype=np.int32)[None], valid=np.array([[1, 1, 0, 1]], bool))
    a, b, c = fresh(before, image, after)
    np.testing.assert_array_equal(a.rope, [np.arange(START)])
    np.testing.assert_array_equal(np.asarray(b.rope)[0, [0, 3, 4]], [5, 6, 7])
    np.testing.assert_array_equal(np.asarray(c.rope)[0, [0, 1, 3]], [8, 9, 10])
    np.testing.assert_array_equal(c.pos, after.pos)
    (shifted,) = fresh(after, start=100)
    np.testing.assert_array_equal(np.asarray(shifted.rope)[0, [0, 1, 3]], [100, 101, 102])


def test_merge_moves_meta_and_slots():
    valid = np.arange(N)[None] < np.array([[N], [9]])
    tokens = reduce_keep(rows(valid=valid), np.broadcast_to(np.arange(1, N, dtype=np.int32), (B, N - 1)))
    slot, order = bipartite(tokens.x, 4, valid=tokens.meta.valid)
    x = merge_tokens(tokens.x, slot, 8, mode="mean")
    alive = jnp.take_along_axis(tokens.meta.valid, order, 1)
    for positions in ("original", "fresh"):
        out = reduce_merge(tokens, x, slot, order, alive, positions=positions)
        assert (np.asarray(out.slot)[:, 0] == -1).all() and (np.asarray(out.slot)[1, 9:] == -1).all()
        for b in range(B):
            for s in np.flatnonzero(np.asarray(out.meta.valid)[b]):
                members = np.flatnonzero(np.asarray(out.slot)[b] == s)
                np.testing.assert_allclose(out.x[b, s], X[b, members].mean(0), atol=1e-6)
                if positions == "original":
                    assert np.asarray(out.meta.pos)[b, s] - START in members
            live = np.asarray(out.meta.valid)[b]
            pos = np.asarray(out.meta.pos)[b][live]
            if positions == "fresh":
                assert (np.diff(pos) > 0).all()
                first = START + 1
                np.testing.assert_array_equal(np.asarray(out.meta.rope)[b][live], first + np.arange(live.sum()))


def test_sharded_batches_stay_sharded():
    """Reducing a batch that is split over devices moves no rows between them."""
    devices = jax.devices()[:2]
    if len(devices) < 2:
        pytest.skip("one device")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def step(x, scores):
        meta = Meta.of(N)
        return dispose(Tokens(x, meta), choose(scores, 5, jnp.ones((B, N), bool)), 6).x

    run = jax.jit(step, in_shardings=split, out_shardings=split)
    text = run.lower(X, SCORES).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    np.testing.assert_array_equal(run(X, SCORES), step(X, SCORES))
