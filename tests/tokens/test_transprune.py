import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.statistics import transition
from jaxattn.core.types import Ctx, Meta, State, Tokens

RNG = np.random.default_rng(0)
B, S, C, N = 2, 9, 5, 16


def test_transition_values():
    x, y = RNG.normal(size=(2, B, S, C)).astype(np.float32)
    norm = lambda a: np.linalg.norm(a, axis=-1)  # noqa: E731
    turn = np.exp(1 - (x * y).sum(-1) / norm(x) / norm(y))
    want = norm(y) / norm(x) * turn / turn.sum(-1, keepdims=True)
    np.testing.assert_allclose(transition(x, y), want, rtol=1e-5)
    np.testing.assert_allclose(transition(x, x), 1 / S, rtol=1e-5)  # nothing moves: all alike
    twice = y.copy()
    twice[:, 3] *= 2
    np.testing.assert_allclose(transition(x, twice)[:, 3], 2 * want[:, 3], rtol=1e-5)
    np.testing.assert_allclose(tokens.token_transition(x, y, y, x), want + transition(y, x), rtol=1e-5)
    valid = np.arange(S)[None] < 6
    part = transition(np.where(valid[..., None], x, 9), y, valid)
    np.testing.assert_allclose(part[:, :6], transition(x[:, :6], y[:, :6]), rtol=1e-5)
    assert (np.asarray(part)[:, 6:] == 0).all() and np.isfinite(transition(x * 0, y)).all()


def test_scores():
    v, g = RNG.exponential(size=(2, B, N)).astype(np.float32)
    want = v / v.sum(-1, keepdims=True) + g / g.sum(-1, keepdims=True)
    np.testing.assert_allclose(tokens.transprune_scores(v, g), want, rtol=1e-5)
    np.testing.assert_allclose(tokens.transprune_scores(100 * v, g), want, rtol=1e-5)
    np.testing.assert_allclose(tokens.transprune_scores(v).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("mode", ["keep", "mask"])
def test_stages_remember(mode):
    """The second cut adds to what the rows that are left had before."""
    cuts = tokens.transprune(layers=(2, 3), ratios=(0.5, 0.25), mode=mode).schedule(4)
    assert [cut.layers for _, cut in cuts] == [(1,), (2,)]
    tok, state = Tokens(RNG.normal(size=(B, N, C)).astype(np.float32), Meta.of(N)), State()
    t1, g1, t2, g2 = RNG.exponential(size=(4, B, N)).astype(np.float32)
    tok, state, _ = cuts[0][1].apply({}, state, tok, {"transition.1": t1, "prompt": g1}, Ctx())
    first = np.argsort(-np.asarray(tokens.transprune_scores(t1, g1)), -1)[:, :8]
    place = np.asarray(jnp.broadcast_to(tok.meta.pos, tok.x.shape[:2]))
    t2, g2 = (np.take_along_axis(x, place, -1) for x in (t2, g2))
    tok2, _, _ = cuts[1][1].apply({}, state, tok, {"transition.2": t2, "prompt": g2}, Ctx())
    for b in range(B):
        rows = np.sort(first[b])
        there = np.isin(place[b], rows)
        total = t1[b, rows] + t2[b][there]
        score = total / total.sum() + g2[b][there] / g2[b][there].sum()
        want = np.sort(rows[np.argsort(-score)[:4]])
        pos, valid = np.broadcast_to(tok2.meta.pos, tok2.meta.valid.shape)[b], np.asarray(tok2.meta.valid)[b]
        np.testing.assert_array_equal(pos[valid], want)


def test_schedule_of_the_paper():
    cuts = tokens.transprune().schedule(32)
    assert [s for s, _ in cuts] == [7, 9, 12]
    assert [cut.layers for _, cut in cuts] == [(6,), (7, 8), (9, 10, 11)]
    n = 576
    for (_, cut), want in zip(cuts, (504, 360, 72), strict=True):
        n = cut.rows(n)
        assert n == want
    assert all(need.what == "transition" for need in tokens.transprune(attention=False).schedule(32)[1][1].needs())
    with pytest.raises(ValueError, match="ratios: expected fractions"):
        tokens.transprune(ratios=(0.5, 0.7, 0.1))
    with pytest.raises(ValueError, match="layers: expected ascending"):
        tokens.transprune(layers=(3, 2, 5)).schedule(8)
