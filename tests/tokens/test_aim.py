import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core import statistics
from jaxattn.core.attend import make_call
from jaxattn.core.mask import causal
from jaxattn.core.types import Ctx, Meta, State, Tokens, split
from jaxattn.tokens.aim import aim_merge_tokens, pagerank_importance

B, H, D = 2, 2, 8
RNG = np.random.default_rng(0)


def pagerank(q, k, visible, valid=None):
    """Five steps of d <- d P from a uniform row vector over the valid rows, P at temperature 0.1, with the map."""
    valid = np.ones(q.shape[:2], bool) if valid is None else valid
    logits = np.where(visible, np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(D) / 0.1, -np.inf)
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - np.where(np.isfinite(top), top, 0))
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-30)
    d = np.broadcast_to((valid / valid.sum(-1, keepdims=True))[:, None, None], (B, H, 1, q.shape[1]))
    for _ in range(5):
        d = d @ p
    return d[:, :, 0]


def test_importance_is_pagerank():
    n = 11
    q, k = (RNG.normal(size=(B, n, H, D)).astype(np.float32) for _ in range(2))
    even = jnp.full((B, n), 1 / n)

    def iterate(q, k, mask):
        return statistics.iterated(make_call(q, k, k, mask=mask), even, 5, 0.1)

    rank = jax.jit(iterate, static_argnums=2)
    d = rank(q, k, causal())
    want = pagerank(q, k, np.tril(np.ones((n, n), bool)))
    np.testing.assert_allclose(d, want, atol=1e-5)
    np.testing.assert_allclose(np.asarray(d).sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(pagerank_importance(d), np.sqrt((want**2).mean(1)), atol=1e-5)
    level = rank(np.zeros_like(q), np.zeros_like(k), None)
    np.testing.assert_allclose(pagerank_importance(level), 1 / n, atol=1e-6)


def test_schedule_of_the_paper():
    n, text = 200, 0
    cuts = tokens.aim().schedule(28, n)
    assert [site for site, _ in cuts] == list(range(15, 23)) == list(tokens.aim().sites(28))
    for site, record in cuts:
        rate = max(0.0, 1 - 0.125 * (site - 1 - 13))  # of the layer done before the cut
        assert record.count(n) == text + int(n * rate)
    assert cuts[-1][1].count(n) == 0 and cuts[-1][1].rows(n) == 1
    # without the number of rows at hand, successive cuts find the same counts where eight divides it
    left, blind = n, tokens.aim().schedule(28)
    for (_, record), (_, exact) in zip(blind, cuts, strict=True):
        left = record.count(left)
        assert left == exact.count(n)
    assert [site for site, _ in tokens.aim(start=1, end=3).schedule(4, n)] == [2, 3]
    (need,) = cuts[0][1].needs()
    assert (need.at, need.iterate, need.over_heads) == ("last", 5, None) and np.isclose(need.temperature, 0.1)


def layer(x, pos, valid):
    """One residual causal attention over valid rows, and the PageRank of its rows; with the map."""
    q = x.reshape(*x.shape[:2], H, D)
    visible = ((pos[:, None, :] <= pos[:, :, None]) & valid[:, None, :])[:, None]
    p = np.where(visible, np.exp(np.einsum("bihd,bjhd->bhij", q, q) / np.sqrt(D)), 0)
    out = np.einsum("bhij,bjhd->bihd", p / np.maximum(p.sum(-1, keepdims=True), 1e-30), q)
    d = pagerank(q, q, visible, valid)
    return x + np.where(valid[..., None], out.reshape(x.shape), 0), d


def test_cuts_gather_as_they_mask():
    """Layers of causal attention over [image | text]: the text reads the same, whether image rows go or hide; the last
    cut leaves nothing but text."""
    n, t = 12, 4
    start = RNG.normal(size=(B, n + t, H * D)).astype(np.float32)
    cut = jax.jit(lambda program, tok, d: program.apply({}, State(), tok, {"rank": d}, Ctx())[0], static_argnums=0)
    finals = {}
    for mode in ("keep", "mask"):
        pos = np.broadcast_to(np.arange(n + t, dtype=np.int32), (B, n + t))
        x, valid, counts = start, np.ones(pos.shape, bool), []
        for _, record in tokens.aim(start=0, end=2, mode=mode).schedule(4, n):
            x, d = layer(x, pos, valid)
            v = x.shape[1] - t
            program, params = split(record)
            out = cut(program, Tokens(x[:, :v], Meta(pos[:, :v], valid[:, :v])), d[:, :, :v].astype(np.float32))
            assert out.x.shape[1] == record.rows(v) and params == {}
            x, pos, valid = (np.concatenate([np.asarray(new), old[:, v:]], 1)
                             for new, old in ((out.x, x), (out.meta.pos, pos), (out.meta.valid, valid)))  # fmt: skip
            counts.append(valid[:, :-t].sum(-1).tolist())
        assert counts == [[8, 8], [4, 4], [0, 0]]
        assert x.shape[1] == t + (1 if mode == "keep" else n)
        finals[mode] = layer(x, pos, valid)[0][:, -t:]
    np.testing.assert_allclose(finals["keep"], finals["mask"], atol=1e-5)


def two_passes(x):
    """The published merge with loops, one frame: list of (vector) in output order."""
    n0 = len(x)
    for r in (n0 // 2, n0 // 4):
        a, b = x[::2], x[1::2]
        unit = lambda y: y / np.linalg.norm(y, axis=-1, keepdims=True)  # noqa: E731
        similar = unit(a) @ unit(b).T
        order = np.argsort(-similar.max(-1), kind="stable")
        members = {j: [b[j]] for j in range(len(b))}
        for i in order[:r]:
            members[int(similar[i].argmax())].append(a[i])
        x = np.stack([*a[order[r:]], *(np.mean(m, 0) for m in members.values())])
    return x


@pytest.mark.parametrize("n", [16, 13])
def test_merge_of_frames(n):
    """Two frames in a row merge apart, each as the two passes say, to what is left of n0 rows."""
    x = RNG.normal(size=(B, 2 * n, C := 5)).astype(np.float32)
    record = tokens.aim_merge(frames=2)
    left = n - n // 2 - n // 4
    tok = Tokens(x, Meta.of(2 * n, pos=7 + np.arange(2 * n, dtype=np.int32)[None]))
    out = jax.jit(lambda tok: record.apply({}, State(), tok, {}, Ctx())[0])(tok)
    assert out.x.shape == (B, record.rows(2 * n), C) and record.rows(2 * n) == 2 * left
    for b in range(B):
        for f in range(2):
            mine = slice(f * left, (f + 1) * left)
            np.testing.assert_allclose(out.x[b, mine], two_passes(x[b, f * n : (f + 1) * n]), atol=1e-5)
            slot = np.asarray(out.slot)[b, f * n : (f + 1) * n]
            assert slot.min() == f * left and slot.max() == (f + 1) * left - 1 and len(set(slot)) == left
    np.testing.assert_array_equal(out.meta.rope, np.broadcast_to(7 + np.arange(2 * left), (B, 2 * left)))
    assert (np.diff(np.asarray(out.meta.pos)) > 0).all()


def test_merge_of_nothing_is_a_permutation():
    x = RNG.normal(size=(1, 9, 5)).astype(np.float32)
    out = np.asarray(jax.jit(lambda x: aim_merge_tokens(x, parts=(0,)))(x))[0]
    where = [int(np.flatnonzero((x[0] == row).all(-1))[0]) for row in out]
    assert sorted(where[:5]) == [0, 2, 4, 6, 8] and where[5:] == [1, 3, 5, 7]


def test_refused():
    with pytest.raises(ValueError, match="end: expected at least start = 5"):
        tokens.aim(start=5, end=3)
    with pytest.raises(ValueError, match="start below the 4 layers"):
        tokens.aim(start=6).schedule(4)
    with pytest.raises(ValueError, match="multiple of the 2 frames"):
        tokens.aim_merge(frames=2).rows(9)
    with pytest.raises(ValueError, match="at most half"):
        tokens.aim_merge(parts=(2, 2)).rows(8 + 1)
    with pytest.raises(ValueError, match=r"evidence\['rank'\]: expected \[1, H, 6\]"):
        (_, cut), *_ = tokens.aim().schedule(4, 6)
        cut.apply({}, State(), Tokens(np.zeros((1, 6, 2), np.float32), Meta.of(6)), {"rank": np.zeros((1, 6))}, Ctx())
