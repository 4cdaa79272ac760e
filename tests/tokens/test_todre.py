import jax
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split

RNG = np.random.default_rng(0)
B, N, D = 2, 20, 6
X = RNG.normal(size=(B, N, D)).astype(np.float32)
CLS = RNG.exponential(size=(B, N)).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("combine", ["sum", "max"])
def test_picks_by_hand(combine):
    got = jax.jit(tokens.todre_select, static_argnums=2, static_argnames="combine")(X, CLS, 7, combine=combine)
    for b in range(B):
        near, picked = unit(X[b]) @ unit(X[b]).T, [int(CLS[b].argmax())]
        while len(picked) < 7:
            cost = getattr(np, combine)(near[:, picked], axis=-1)
            cost[picked] = np.inf
            picked.append(int(cost.argmin()))
        np.testing.assert_array_equal(got[b], sorted(picked))


def test_two_clusters():
    x = np.concatenate([np.tile([1.0, 0.1], (9, 1)), np.tile([0.1, 1.0], (4, 1))]).astype(np.float32)
    x += 0.01 * RNG.normal(size=x.shape).astype(np.float32)
    for combine in ("sum", "max"):
        picks = np.asarray(tokens.todre_picks(x, 3, 2, combine=combine))
        assert picks[0] == 3 and picks[1] == (unit(x) @ unit(x)[3]).argmin() and picks[1] >= 9


def test_record_and_thumbnail():
    tok = Tokens(X, Meta.of(N, crop=(np.arange(N)[None] >= 5).astype(np.int32)))
    for thumbnail, pool in ((None, slice(None)), (0, slice(0, 5))):
        program, params = split(tokens.todre(6, thumbnail=thumbnail))
        out, _, aux = program.apply(params, State(), tok, {"cls": CLS}, Ctx())
        pivot = CLS[:, pool].argmax(-1)
        np.testing.assert_array_equal(aux["pivot"], pivot)
        for b in range(B):
            want = np.sort(np.asarray(tokens.todre_picks(X[b], pivot[b], 6)))
            np.testing.assert_array_equal(np.asarray(out.meta.pos)[b][np.asarray(out.meta.valid)[b]], want)
    assert tokens.todre(6, pivot="random").needs() == ()


def test_ratios_of_groups():
    s = 9
    attention = np.tril(RNG.exponential(size=(B, s, s)))
    attention /= attention.sum(-1, keepdims=True)
    vision = np.broadcast_to((np.arange(s) >= 2) & (np.arange(s) < 6), (B, s))
    text = np.broadcast_to(np.arange(s) >= 6, (B, s))
    a_tv, a_vt = tokens.group_ratios(attention, vision, text)
    np.testing.assert_allclose(a_tv, attention[:, 6:, 2:6].sum((1, 2)) / 3, rtol=1e-5)
    assert (np.asarray(a_vt) == 0).all()  # text behind the image is not seen by it


def test_exit():
    ((site, _),) = tokens.todre_exit().schedule(32)
    assert site == 29  # behind layer 28 of 0..31
    mass = np.array([[[0.9, 0.0], [0.05, 0.9]], [[0.9, 0.0], [0.3, 0.6]], [[0.5, 0.2], [0.05, 0.9]]], np.float32)
    tok = Tokens(np.zeros((3, 4, 1), np.float32), Meta.of(4, valid=np.ones((3, 4), bool)))
    for tau, stays in ((0.1, [False, True, True]), (0.0, [True] * 3), (1.1, [False] * 3)):
        ((_, cut),) = tokens.todre_exit(tau).schedule(8)
        program, params = split(cut)
        out = program.apply(params, State(), tok, {"between": mass}, Ctx())[0]
        np.testing.assert_array_equal(np.asarray(out.meta.valid).all(-1), stays)
        assert program.rows(4) == 4
