"""What every token method promises, whatever it scores by; budgets that compile nothing; arguments that are refused."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import registry, tokens
from jaxattn.core.labels import KIND_NEWLINE
from jaxattn.core.types import Ctx, Meta, State, Tokens, split

B, H, C, T, SIDE = 3, 2, 6, 5, 6
N = SIDE * SIDE
RNG = np.random.default_rng(0)
GRID = {"row": np.arange(N)[None] // SIDE, "col": np.arange(N)[None] % SIDE}
X = RNG.normal(size=(B, N, C)).astype(np.float32)


def received(*shape):
    p = RNG.exponential(size=shape).astype(np.float32)
    return p / p.sum(-1, keepdims=True)


EVIDENCE = {
    "cls": received(B, N),
    "middle": received(B, N),
    "deep": received(B, N),
    "last": received(B, N),
    "rank": received(B, H, N),
    "features": RNG.normal(size=(B, N, 4)).astype(np.float32),
    "text": (RNG.normal(size=(B, T, C)).astype(np.float32), np.arange(T)[None] < np.array([[5], [3], [1]])),
}
BUDGETED = [tokens.random, tokens.uniform, tokens.fastervlm, tokens.hiprune, tokens.mmtok, tokens.todre, tokens.fastv]
EVERY = [*BUDGETED, tokens.mean_pool]


def rows_of(x=X, valid=None):
    valid = np.ones(x.shape[:2], bool) if valid is None else valid
    return Tokens(x, Meta.of(x.shape[1], valid=valid, **GRID))


@partial(jax.jit, static_argnums=0)
def run(program, params, tok, evidence):
    return program.apply(params, State(), tok, evidence, Ctx())[0]


def apply(record, tok=None, evidence=EVIDENCE):
    tok = rows_of() if tok is None else tok
    out = run(*split(record), tok, evidence)
    assert out.x.shape[1] == record.rows(tok.x.shape[1])
    return jax.tree.map(np.asarray, out)


def kept(record, tok=None, evidence=EVIDENCE):
    """Original indices of the valid rows, per batch row, in order, from the rows' positions."""
    out = apply(record, tok, evidence)
    pos, valid = (np.broadcast_to(a, out.x.shape[:2]) for a in (out.meta.pos, out.meta.valid))
    return [pos[b][valid[b]] for b in range(B)]


@pytest.mark.parametrize("factory", BUDGETED, ids=lambda f: f.__name__)
def test_selectors(factory):
    k = 10  # a bucket of 12: two rows stay empty
    record = factory(keep=k)
    assert record.rows(N) == 12 and split(record)[0].rows(N) == 12
    out, rows = apply(record), kept(record)
    for b, index in enumerate(rows):
        assert len(index) == k and (np.diff(index) > 0).all()
        np.testing.assert_array_equal(out.x[b, :k], X[b, index])  # bit for bit
        slot = np.full(N, -1)
        slot[index] = np.arange(k)
        np.testing.assert_array_equal(out.slot[b], slot)
        np.testing.assert_array_equal(out.meta.labels["row"][b, :k], index // SIDE)
    # everything kept changes nothing
    same = apply(factory(keep=N))
    np.testing.assert_array_equal(same.x[:, :N], X)
    np.testing.assert_array_equal(same.slot, np.broadcast_to(np.arange(N), (B, N)))
    # masking chooses the same rows and moves none
    masked = apply(dataclasses.replace(record, mode="mask"))
    np.testing.assert_array_equal(masked.x, X)
    for b in range(B):
        np.testing.assert_array_equal(np.flatnonzero(masked.meta.valid[b]), rows[b])


@pytest.mark.parametrize("factory", BUDGETED, ids=lambda f: f.__name__)
def test_batch_rows_do_not_meet(factory):
    rows, other = kept(factory(keep=10)), dict(EVIDENCE)
    x = X.copy()
    x[1:] = RNG.normal(size=x[1:].shape)
    for name in ("cls", "middle", "deep", "last", "features"):
        other[name] = np.concatenate([EVIDENCE[name][:1], EVIDENCE[name][1:][::-1]])
    np.testing.assert_array_equal(kept(factory(keep=10), rows_of(x), other)[0], rows[0])


@pytest.mark.parametrize("factory", [tokens.fastervlm, tokens.mmtok, tokens.todre], ids=lambda f: f.__name__)
def test_permutation(factory):
    """Methods that know no place choose the same tokens of a shuffled image."""
    order = RNG.permutation(N)
    moved = {n: EVIDENCE[n][..., order] for n in ("cls",)}
    moved |= {"features": EVIDENCE["features"][:, order], "text": EVIDENCE["text"]}
    for a, b in zip(kept(factory(keep=10)), kept(factory(keep=10), rows_of(X[:, order]), moved), strict=True):
        np.testing.assert_array_equal(a, np.sort(order[b]))


@pytest.mark.parametrize("factory", EVERY, ids=lambda f: f.__name__)
def test_padding_is_never_chosen(factory):
    """Rows that are not valid neither count nor matter."""
    valid = np.ones((B, N), bool)
    valid[0, 20:], valid[1, ::2], valid[2, :] = False, False, np.arange(N) < 4
    tok = rows_of(valid=valid)
    rows, out = kept(factory(keep=10), tok), apply(factory(keep=10), tok)
    garbage = {n: np.where(valid, e, 9.0) if n in ("cls", "middle", "deep", "last") else e for n, e in EVIDENCE.items()}
    garbage["features"] = np.where(valid[..., None], EVIDENCE["features"], 9.0)
    again = apply(factory(keep=10), rows_of(np.where(valid[..., None], X, 9.0), valid), garbage)
    np.testing.assert_array_equal(out.meta.valid, again.meta.valid)
    for b, live in enumerate((10, 10, 4)):
        assert len(rows[b]) == live and valid[b, rows[b]].all()
        np.testing.assert_array_equal(out.x[b, :live], again.x[b, :live])
        assert (out.slot[b][~valid[b]] == -1).all()


def test_budgets_in_a_bucket_compile_once():
    for factory in EVERY:
        run.clear_cache()
        counts = [int(apply(factory(keep=k)).meta.valid[0].sum()) for k in (9, 10, 12)]
        assert counts == [9, 10, 12]
        assert run._cache_size() == 1, factory.__name__
    for factory, values in ((tokens.mmtok, {"tau_text": 0.1, "alpha": 2}), (tokens.random, {"seed": 3})):
        assert split(factory(9))[0] == split(factory(9, **values))[0] and factory(9) != factory(9, **values)


def test_records_are_values():
    names = {"random", "uniform", "mean_pool", "fastervlm", "hiprune", "mmtok", "aim", "aim_merge"}
    assert names <= set(registry.names("tokens"))
    for factory in EVERY:
        assert factory(keep=8) == factory(keep=8) and hash(factory(keep=8)) == hash(factory(keep=8))
        assert registry.parse("tokens", f"{factory.__name__}:keep=8") == factory(keep=8)
    assert tokens.aim() == tokens.aim() and hash(tokens.aim_merge(frames=2)) == hash(tokens.aim_merge(frames=2))
    assert tokens.aim().schedule(8, 64) == tokens.aim().schedule(8, 64)


@pytest.mark.parametrize("factory", EVERY, ids=lambda f: f.__name__)
def test_refused_budgets(factory):
    for keep in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="keep: expected .*at least 1"):
            factory(keep=keep)
    with pytest.raises(ValueError, match=f"keep: expected at most the {N} rows.* got 37"):
        factory(keep=37).rows(N)  # a program's capacity of 40 is no longer an error
    program, params = split(factory(keep=37))
    assert program.rows(N) == N
    with pytest.raises(ValueError, match="keep: expected at most"):
        program.apply(params, State(), rows_of(), EVIDENCE, Ctx())
    with pytest.raises(ValueError, match="positions: expected 'original' or 'fresh', got 'new'"):
        factory(keep=3, positions="new")


def test_refused_evidence():
    with pytest.raises(ValueError, match=r"evidence: expected the entry 'cls', got \['deep'\]"):
        apply(tokens.fastervlm(keep=4), evidence={"deep": EVIDENCE["deep"]})
    with pytest.raises(ValueError, match=r"evidence\['cls'\]: expected \[3, 36\], got shape \(3, 37\)"):
        apply(tokens.fastervlm(keep=4), evidence={"cls": np.zeros((B, N + 1), np.float32)})
    with pytest.raises(ValueError, match="width of text"):
        apply(tokens.mmtok(keep=4), rows_of(X[..., :4]))
    with pytest.raises(ValueError, match="label 'crop'"):
        apply(tokens.fastervlm(keep=4, crops=2))
    with pytest.raises(ValueError, match="mode: expected 'keep' or 'mask'"):
        tokens.uniform(keep=4, mode="gather")


def test_uniform_is_even():
    place = np.arange(64)[None]
    grid = Tokens(np.zeros((1, 64, 1), np.float32), Meta.of(64, row=place // 8, col=place % 8))
    for k, cell in ((16, 2), (4, 4)):
        out = apply(tokens.uniform(keep=k), grid)
        index = np.asarray(out.meta.pos)[0][: k]
        cells = (index // 8 // cell) * 8 + index % 8 // cell
        assert len(set(cells.tolist())) == k, "one token of each cell"
    line = Tokens(np.zeros((1, 60, 1), np.float32), Meta.of(60))
    assert set(np.diff(np.asarray(apply(tokens.uniform(keep=12), line).meta.pos)[0])) == {5}


def test_mean_pool_of_cells():
    out = apply(tokens.mean_pool(keep=9))  # 6 x 6 by runs of four in Z-order: not all squares, but equal masses
    slot = out.slot
    for b in range(B):
        assert (np.bincount(slot[b]) == 4).all()
        for s in range(9):
            members = np.flatnonzero(slot[b] == s)
            np.testing.assert_allclose(out.x[b, s], X[b, members].mean(0), atol=1e-6)
            assert out.meta.pos[b, s] == members[0]
    assert (np.diff(out.meta.pos[:, :9]) > 0).all()


def test_random_draws():
    a, b = kept(tokens.random(12, seed=0)), kept(tokens.random(12, seed=1))
    assert any((x != y).any() for x, y in zip(a, b, strict=True)) and (a[0] != a[1]).any()
    hits = np.zeros(N)
    for seed in range(60):
        hits[np.concatenate(kept(tokens.random(12, seed=seed)))] += 1
    assert 60 - 30 < hits.min() and hits.max() < 60 + 30  # 60 expected of each, deviation 6.3


def test_crops_and_newlines():
    """Two crops with a newline after each line: equal shares, newlines kept besides."""
    crop, line, width = 2, 3, 4
    kind = np.tile(np.r_[np.ones(width - 1, int), KIND_NEWLINE], crop * line)[None]
    which = np.repeat(np.arange(crop), line * width)[None]
    n = kind.shape[1]
    tok = Tokens(RNG.normal(size=(B, n, C)).astype(np.float32), Meta.of(n, kind=kind, crop=which))
    facts = {name: received(B, n) for name in ("cls", "middle", "deep")}
    for record in (tokens.fastervlm(8, crops=2, newlines=6), tokens.hiprune(8, crops=2, newlines=6, width=3, alpha=0)):
        assert record.rows(n) == 8 + 6
        score = facts["cls" if "Faster" in type(record).__name__ else "deep"]
        for b, index in enumerate(kept(record, tok, facts)):
            assert (kind[0, index] == KIND_NEWLINE).sum() == 6
            patches = index[kind[0, index] != KIND_NEWLINE]
            for c in range(crop):
                own = np.flatnonzero((which[0] == c) & (kind[0] != KIND_NEWLINE))
                best = np.sort(own[np.argsort(-score[b, own], kind="stable")[:4]])
                np.testing.assert_array_equal(patches[which[0, patches] == c], best)


def test_gradients():
    """They reach the rows that stay, and only those; a row of zeros harms nobody."""

    @partial(jax.jit, static_argnums=0)
    def gradient(program, params, x):
        return jax.grad(lambda x: jnp.sum(run(program, params, rows_of(x), EVIDENCE).x[:, :8] ** 2))(x)

    for factory in (tokens.fastervlm, tokens.mmtok):
        x = np.where(np.arange(N)[:, None] == 4, 0, X)
        grad = np.asarray(gradient(*split(factory(keep=8)), x))
        for b, index in enumerate(kept(factory(keep=8), rows_of(x))):
            np.testing.assert_allclose(grad[b, index], 2 * x[b, index], rtol=1e-6)
            assert not np.delete(grad[b], index, 0).any()
    for record in (tokens.aim_merge(), tokens.mean_pool(keep=8)):
        grad = np.asarray(gradient(*split(record), x))
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_low_precision_rows():
    """bfloat16 rows stay bfloat16; scores are made in float32, so the choice is that of the same numbers in float32."""
    low = jnp.asarray(X, jnp.bfloat16)
    a, b = (apply(tokens.mmtok(keep=10), rows_of(x)) for x in (low, low.astype(jnp.float32)))
    assert a.x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a.slot, b.slot)
