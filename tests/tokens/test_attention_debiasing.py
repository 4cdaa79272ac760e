import numpy as np
import pytest

from jaxattn import registry, tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split

RNG = np.random.default_rng(0)
B, SIDE = 2, 8
N = SIDE * SIDE
TREND = 0.01 * np.exp(0.05 * np.arange(N))


def kept(record, facts, tok=None):
    tok = Tokens(np.zeros((B, N, 1), np.float32), Meta.of(N)) if tok is None else tok
    program, params = split(record)
    out = program.apply(params, State(), tok, facts, Ctx())[0]
    pos, valid = np.broadcast_to(out.meta.pos, out.meta.valid.shape), np.asarray(out.meta.valid)
    return [pos[b][valid[b]] for b in range(len(valid))]


def test_fit():
    a, b = tokens.fit_trend(TREND)
    assert abs(a - 0.01) < 1e-6 and abs(b - 0.05) < 1e-6
    noisy = TREND * RNG.gamma(50, 1 / 50, size=(200, N))
    assert abs(tokens.fit_trend(noisy)[1] - 0.05) < 1e-3
    np.testing.assert_allclose(tokens.trend_weights(N, b), TREND[0] / TREND, rtol=1e-5)


def test_trend_is_divided_out():
    """Scores trend * c rank as c does, for a host with its own record and for weights of any shape."""
    c = RNG.exponential(size=(B, N))
    facts = {"last": (TREND * c).astype(np.float32)}
    want = np.sort(np.argsort(-c, -1)[:, :8], -1)
    for record in (tokens.attention_debiasing(tokens.fastv(8), decay=0.05),
                   tokens.attention_debiasing("fastv:keep=8", weights=TREND[0] / TREND)):  # fmt: skip
        np.testing.assert_array_equal(kept(record, facts), want)
    ranked = np.argsort(-np.asarray(tokens.debias(facts["last"], 0.05)), -1)
    np.testing.assert_array_equal(ranked[:, :8], np.argsort(-c, -1)[:, :8])
    assert (np.sort(np.argsort(-facts["last"], -1)[:, :8], -1) != want).any()
    assert registry.parse("tokens", "attention_debiasing:host='fastv:keep=8',decay=0.05") == tokens.attention_debiasing(
        tokens.fastv(8), decay=0.05
    )


def test_padding():
    assert tokens.real_patches(500, 500).all()
    real = tokens.real_patches(200, 100, grid=SIDE).reshape(SIDE, SIDE)
    np.testing.assert_array_equal(real, np.repeat((np.arange(SIDE) >= 2) & (np.arange(SIDE) < 6), SIDE).reshape(SIDE, SIDE))
    # a line of patches of which a quarter is image
    line = lambda t: tokens.real_patches(8, 4.5, grid=SIDE, threshold=t).reshape(SIDE, SIDE)[1]  # noqa: E731
    assert line(0.8).all() and not line(0.5).any()
    facts = {"last": RNG.exponential(size=(B, N)).astype(np.float32)}
    for record, tok in (
        (tokens.attention_debiasing(tokens.fastv(30), size=(200, 100), grid=SIDE), None),
        (tokens.attention_debiasing(tokens.fastv(30)), Tokens(
            np.zeros((B, N, 1), np.float32), Meta.of(N, padding=(~real).reshape(1, -1).astype(np.int32)))),
    ):  # fmt: skip
        for row in kept(record, facts, tok):
            assert len(row) == 30 and real.reshape(-1)[row].all()
    # fewer real patches than the budget: so many stay
    less = tokens.attention_debiasing(tokens.fastv(40), size=(200, 100), grid=SIDE)
    assert [len(row) for row in kept(less, facts)] == [32, 32]


def test_rows_moved_before():
    """The trend is that of the place a row had in the image."""
    order = np.arange(0, N, 2)
    slot = np.full((B, N), -1)
    slot[:, order] = np.arange(len(order))
    tok = Tokens(np.zeros((B, N // 2, 1), np.float32), Meta.of(N // 2, pos=order[None].astype(np.int32)), slot)
    c = RNG.exponential(size=(B, N // 2))
    got = kept(tokens.attention_debiasing(tokens.fastv(8), decay=0.05), {"last": (TREND[order] * c).astype(np.float32)}, tok)
    np.testing.assert_array_equal(got, order[np.sort(np.argsort(-c, -1)[:, :8], -1)])


def test_only_the_first_stage():
    record = tokens.attention_debiasing("pyramiddrop")
    stages = record.schedule(32)
    plain = tokens.pyramiddrop().schedule(32)
    assert [s for s, _ in stages] == [8, 16, 24] and stages[1:] == plain[1:]
    assert stages[0][1].host == plain[0][1] and stages[0][1].positions == "fresh"
    assert [r.rows(n) for (_, r), n in zip(plain, (576, 288, 144), strict=True)] == [288, 144, 72]
    with pytest.raises(ValueError, match="host: expected a token method that scores by attention"):
        tokens.attention_debiasing(tokens.uniform(4))
