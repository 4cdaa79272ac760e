import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split


@pytest.mark.parametrize("steepness", [0.01, 0.3, 2.0, 30.0])
@pytest.mark.parametrize("budget", [0.05, 0.33, 0.9])
def test_p_sigmoid_has_the_budget_for_a_mean(steepness, budget):
    rates = np.array(tokens.p_sigmoid(32, budget, steepness))
    np.testing.assert_allclose(rates.sum(), 32 * budget, atol=1e-6)
    assert (np.diff(rates) <= 0).all() and rates.min() >= 0 and rates.max() <= 1
    logit = np.log(rates[1:-1] / (1 - rates[1:-1])) if steepness < 1 else None
    if logit is not None:  # a logistic curve of that steepness
        np.testing.assert_allclose(np.diff(logit), -steepness, rtol=1e-6)


def test_p_sigmoid_limits():
    np.testing.assert_allclose(tokens.p_sigmoid(16, 0.3, 0.0), 0.3)
    np.testing.assert_allclose(tokens.p_sigmoid(16, 0.3, 1e-4), 0.3, atol=1e-3)
    np.testing.assert_allclose(tokens.p_sigmoid(16, 0.25, 200.0), [1] * 4 + [0] * 12, atol=1e-6)


def test_the_search_finds_the_least_rates_of_an_oracle():
    need = (1.0, 0.8125, 0.8125, 0.5, 0.25, 0.0, 0.0)
    asked = []

    def performance(rates):
        asked.append(rates)
        return 0.9 if all(r >= n for r, n in zip(rates, need, strict=True)) else 0.5

    assert tokens.g_search_rates(performance, 7) == need
    assert len(asked) <= 1 + 6 * 7
    assert all(a >= b for rates in asked for a, b in zip(rates, rates[1:], strict=False))
    assert tokens.g_search_rates(performance, 7, loss=0.5) == (1.0, *[0.0] * 6)


def test_p_sigmoid_search_finds_the_steepness():
    want = np.array(tokens.p_sigmoid(12, 0.4, 0.7))
    rates, search = tokens.p_sigmoid_search(lambda r: -np.square(np.array(r[1:]) - want[1:]).sum(), 12, 0.4, calls=24)
    np.testing.assert_allclose(rates, want, atol=0.02)
    np.testing.assert_allclose(np.mean(rates), 0.4, atol=1e-6)
    assert len(search.values) == 24


def test_cuts_keep_a_prefix_of_the_rank():
    """Layer i reads ceil(r_i N) tokens, the largest of the layer above; what left stays away."""
    rng = np.random.default_rng(0)
    cuts = tokens.g_search((1.0, 0.7, 0.7, 0.33, 0.0)).schedule(5)
    assert [layer for layer, _ in cuts] == [1, 3, 4]
    tok, n = Tokens(rng.normal(size=(2, 10, 3)).astype(np.float32), Meta.of(10)), 10
    scores = rng.uniform(size=(2, 10)).astype(np.float32)
    for (_, cut), count in zip(cuts, (7, 4, 0), strict=True):
        assert [need.at for need in cut.needs()] == ["last"] and cut.rows(n) == max(count, 1)
        place = np.broadcast_to(tok.meta.pos, tok.x.shape[:2])
        tok, _, _ = cut.apply({}, State(), tok, {"rank": np.take_along_axis(scores, place, -1)}, Ctx())
        n = tok.x.shape[1]
        for b in range(2):
            left = np.asarray(tok.meta.pos)[b][np.asarray(tok.meta.valid)[b]]
            np.testing.assert_array_equal(left, np.sort(np.argsort(-scores[b])[:count]))


def test_one_program_serves_all_shares():
    """In mode "mask" shares are operands: programs are equal, and rows are those that mode "keep" leaves."""
    rng = np.random.default_rng(1)
    x, scores = rng.normal(size=(2, 10, 3)).astype(np.float32), rng.uniform(size=(2, 10)).astype(np.float32)
    programs = set()
    for shares in ((1.0, 0.7, 0.7, 0.2), (1.0, 1.0, 0.5, 0.0)):
        tok, count = Tokens(x, Meta.of(10)), 10
        for layer, cut in tokens.g_search(shares, mode="mask").schedule(4):
            program, params = split(cut)
            programs.add(program)
            tok, _, _ = program.apply(params, State(), tok, {"rank": scores}, Ctx())
            count = min(count, int(np.ceil(10 * shares[layer] - 1e-6)))
            want = np.argsort(np.argsort(-scores)) < count
            np.testing.assert_array_equal(np.broadcast_to(tok.meta.valid, (2, 10)), want)
    assert len(programs) == 1
    waits = tokens.g_search((1.0, 0.9, 0.8, 0.1), least=0.15, mode="mask").schedule(4)
    np.testing.assert_allclose([cut.rate for _, cut in waits], [1.0, 0.8, 0.1], rtol=1e-6)


def test_schedules():
    assert [cut.rate for _, cut in tokens.g_search(keep=0.5, steepness=500.0).schedule(8)][-1] < 1e-6
    many, few = tokens.g_search(keep=0.3, steepness=0.5).schedule(16), tokens.g_search(keep=0.3, least=0.2).schedule(16)
    assert len(few) < len(many) and len(few) <= 5
    with pytest.raises(ValueError, match="rates: expected shares that start at 1 and never rise"):
        tokens.g_search((1.0, 0.2, 0.3))
    with pytest.raises(ValueError, match="rates: expected one share per layer, 4, got 3"):
        tokens.g_search((1.0, 0.2, 0.1)).schedule(4)
