from functools import partial

import jax
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split
from jaxattn.tokens.hiprune import hiprune_select

SIDE = 8
N = SIDE * SIDE
RNG = np.random.default_rng(0)
MIDDLE, DEEP = (RNG.exponential(size=(4, N)).astype(np.float32) for _ in range(2))


def three_roles(middle, deep, keep, alpha, width):
    """The paper's procedure with sets, one image."""
    n = len(middle)
    anchors = np.argsort(-middle, kind="stable")[: round(keep * alpha / 5)]
    chosen = set(anchors.tolist())
    for a in anchors:
        chosen |= {int(np.clip(a + step, 0, n - 1)) for step in (-1, 1, -width, width)}
    for j in np.argsort(-deep, kind="stable"):
        if len(chosen) == keep:
            break
        chosen.add(int(j))
    return np.array(sorted(chosen))


@partial(jax.jit, static_argnums=(2, 4))
def select(middle, deep, keep, alpha, width):
    return hiprune_select(middle, deep, keep, alpha=alpha, width=width)


@pytest.mark.parametrize("keep, width", [(16, None), (25, 16)])
def test_three_roles(keep, width):
    for alpha in (0.0, 0.3, 0.5, 0.9):
        index = np.asarray(select(MIDDLE, DEEP, keep, alpha, width))
        for b in range(len(index)):
            np.testing.assert_array_equal(index[b], three_roles(MIDDLE[b], DEEP[b], keep, alpha, width or SIDE))


def test_anchors_at_the_border_are_clamped():
    middle = np.zeros((1, N), np.float32)
    middle[0, [0, N - 1]] = 1.0
    deep = -np.arange(N, dtype=np.float32)[None]  # registers: the lowest indices that are free
    index = np.asarray(select(middle, deep, 20, 0.5, None))[0]
    want = {0, 1, SIDE, N - 1, N - 2, N - 1 - SIDE} | {2, 3, 4, 5, 6, 7, *range(9, 17)}
    assert set(index.tolist()) == want and len(index) == 20


def test_alpha_zero_is_the_deep_layer():
    index = np.asarray(select(MIDDLE, DEEP, 16, 0.0, None))
    np.testing.assert_array_equal(index, np.sort(np.argsort(-DEEP, -1)[:, :16], -1))


def test_record_and_crops():
    """The record keeps what the function keeps; two crops are two images with half the budget each."""
    facts = {"middle": MIDDLE[:2].reshape(1, -1), "deep": DEEP[:2].reshape(1, -1)}
    tok = Tokens(np.zeros((1, 2 * N, 1), np.float32), Meta.of(2 * N))
    program, params = split(tokens.hiprune(keep=50, alpha=0.5, crops=2))
    out = program.apply(params, State(), tok, facts, Ctx())[0]
    kept = np.asarray(out.meta.pos)[0][np.asarray(out.meta.valid)[0]]
    both = np.asarray(select(MIDDLE[:2], DEEP[:2], 25, 0.5, None))
    np.testing.assert_array_equal(kept, np.concatenate([both[0], both[1] + N]))


def test_layers():
    assert tokens.hiprune(keep=8).resolve(24).middle == 8  # the 9th of CLIP-L's 24
    middle, deep = tokens.hiprune(keep=8, middle=3, deep=-1).resolve(24).needs()
    assert (middle.at, deep.at, middle.rows) == ("vision.3", "vision.-1", "all")
    with pytest.raises(ValueError, match="middle: expected a layer number"):
        tokens.hiprune(keep=8).needs()


def test_refused():
    with pytest.raises(ValueError, match=r"anchors with 4 neighbours each \(15\) within the 12 kept"):
        tokens.hiprune(keep=12, alpha=1.2)
    with pytest.raises(ValueError, match="width: expected the patches per line"):
        hiprune_select(MIDDLE[:, :-1], DEEP[:, :-1], 4)
    with pytest.raises(ValueError, match="deep: expected the shape of middle"):
        hiprune_select(MIDDLE, DEEP[:, :-1], 4)
