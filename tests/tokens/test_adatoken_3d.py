import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core import mask as masks
from jaxattn.core.attend import make_call
from jaxattn.core.types import Ctx, Meta, State, Tokens

RNG = np.random.default_rng(0)


def test_flow_against_the_map():
    b, n, h, d = 2, 13, 3, 8
    q, k = RNG.normal(size=(2, b, n, h, d)).astype(np.float32)
    group = np.array([0] * 2 + [1] * 5 + [2] * 2 + [3] * 4, np.int32)[None]
    valid = np.ones((b, n), bool)
    valid[1, -1] = False
    meta = Meta.of(n, valid=valid, group=group)
    call = make_call(q, k, k, mask=masks.causal(), q_meta=meta, k_meta=meta)
    found = np.asarray(tokens.information_flow(call, "group", 4))
    s = np.einsum("bnhd,bmhd->bhnm", q, k) * d**-0.5
    s = np.where(np.tril(np.ones((n, n), bool)) & valid[:, None, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).mean(1)
    for i in range(b):
        for a in range(4):
            rows = np.flatnonzero((group[0] == a) & valid[i])
            for c in range(4):
                np.testing.assert_allclose(found[i, a, c], p[i, rows][:, group[0] == c].sum() / len(rows), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    assert np.asarray(tokens.information_flow(call, "group", 5))[:, 4].max() == 0  # a group without rows


def test_shares_of_a_power_law():
    """c_j ~ j^-2 of N tokens: the share of mass of the k largest is known, in any order and over several samples."""
    n, eps = 1000, 0.05
    c = 1.0 / np.arange(1, n + 1) ** 2
    samples = np.stack([RNG.permutation(c) * w for w in (1.0, 3.0)])[:, None]
    samples = np.concatenate([samples, samples], 1)
    k = int(np.argmax(np.cumsum(c) / c.sum() >= 1 - eps)) + 1
    assert tokens.adatoken_rates(samples, eps) == (1.0, k / n)
    np.testing.assert_allclose(tokens.contribution_curve(samples)[0], np.cumsum(c) / c.sum(), rtol=1e-9)


def test_shares():
    some = np.zeros((3, 4, 20))
    for layer, alive in enumerate((20, 12, 16, 5)):  # every token with mass counts where eps is 0
        some[:, layer, :alive] = RNG.uniform(0.1, 1, size=(3, alive))
    assert tokens.adatoken_rates(some, 0.0) == (1.0, 1.0, 0.6, 0.6)
    with pytest.raises(ValueError, match="eps: expected in"):
        tokens.adatoken_rates(some, 1.0)
    with pytest.raises(ValueError, match="rates: expected one share per layer, 5, got 4"):
        tokens.adatoken_3d((1.0, 0.5, 0.5, 0.2)).schedule(5)


def test_only_spatial_tokens_leave():
    """Each sample keeps its own largest contributors among the spatial rows; 2-D rows stay."""
    n, flat = 12, 3
    spatial = np.where(np.arange(n) < n - flat, 1, 0)[None].astype(np.int32)
    cuts = tokens.adatoken_3d((1.0, 0.5, 0.5, 0.2), name="spatial", others=flat).schedule(4)
    assert [layer for layer, _ in cuts] == [1, 3]
    x = RNG.normal(size=(2, n, 4)).astype(np.float32)
    tok, scores = Tokens(x, Meta.of(n, spatial=spatial)), RNG.uniform(size=(2, n)).astype(np.float32)
    for (_, cut), left in zip(cuts, (5, 2), strict=True):
        assert cut.needs()[0].rows == "text"
        place = np.broadcast_to(tok.meta.pos, tok.x.shape[:2])
        tok, _, _ = cut.apply({}, State(), tok, {"rank": np.take_along_axis(scores, place, -1)}, Ctx())
        assert tok.x.shape[1] == left + flat == cut.rows(place.shape[1])
        for b in range(2):
            want = np.sort(np.argsort(-scores[b, : n - flat])[:left])
            np.testing.assert_array_equal(np.asarray(tok.meta.pos)[b], [*want, *range(n - flat, n)])
