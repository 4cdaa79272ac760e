from functools import partial
from itertools import combinations

import jax
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split
from jaxattn.tokens.mmtok import content_mask, content_words, mmtok_coverage, mmtok_picks, mmtok_select

RNG = np.random.default_rng(0)


# Temperatures and masks vary without a new program.
select = jax.jit(mmtok_select, static_argnums=3)


def facility(coverage, index):
    return coverage[:, index].max(-1).sum() if len(index) else 0.0


@pytest.fixture(scope="module")
def vectors(golden):
    g = golden("mmtok")
    pad = np.zeros(len(g["vision"]), bool)
    pad[g["padding"]] = True
    return g, [g[n].astype(np.float32) for n in ("text", "vision", "vision_clip")], float(g["alpha"]), pad


def test_golden(vectors):
    g, inputs, alpha, pad = vectors
    none = np.zeros_like(pad)
    np.testing.assert_array_equal(select(*inputs, 8, tau_text=0.02, alpha=alpha, forbidden=none), g["idx_k8"])
    np.testing.assert_array_equal(select(*inputs, 24, alpha=alpha), g["idx_k24_jit"])
    padded = select(*inputs, 8, tau_text=0.5, alpha=alpha, forbidden=pad)
    np.testing.assert_array_equal(padded, g["idx_k8_tt05_pad"])


def test_golden_through_the_record(vectors):
    """The record, with padded text and padded patches behind the real ones, keeps the golden tokens."""
    g, (text, vision, features), alpha, _ = vectors
    more = lambda x, k: np.concatenate([x, np.full((k, x.shape[1]), 7.0, np.float32)])[None]  # noqa: E731
    n, m = len(vision), len(text)
    tok = Tokens(more(vision, 5), Meta.of(n + 5, valid=np.arange(n + 5)[None] < n))
    words = Tokens(more(text, 3), Meta.of(m + 3, valid=np.arange(m + 3)[None] < m))
    program, params = split(tokens.mmtok(keep=24, alpha=alpha))
    facts = {"text": words, "features": more(features, 5)}
    out = jax.jit(lambda params, tok, facts: program.apply(params, State(), tok, facts, Ctx())[0])(params, tok, facts)
    np.testing.assert_array_equal(np.asarray(out.meta.pos)[0][np.asarray(out.meta.valid)[0]], g["idx_k24_jit"])


def test_coverage_by_hand(vectors):
    _, (text, vision, features), alpha, _ = vectors
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731

    def soft(a, b, tau):
        e = np.exp(unit(a.astype(np.float64)) @ unit(b.astype(np.float64)).T / tau)
        return e / e.sum(-1, keepdims=True) / len(a)

    want = np.concatenate([soft(text, vision, 0.02), alpha * soft(features, features, 0.2)])
    np.testing.assert_allclose(jax.jit(mmtok_coverage)(text, vision, features, alpha=alpha), want, atol=1e-6)
    np.testing.assert_allclose(want.sum(), 1 + alpha)


def test_greedy_is_submodular_and_near_the_optimum():
    picks = jax.jit(partial(mmtok_picks, k=3))
    for seed in range(5):
        coverage = np.random.default_rng(seed).exponential(size=(14, 10)).astype(np.float32) ** 3
        order = np.asarray(picks(coverage))
        values = [facility(coverage, order[:i]) for i in range(4)]
        gains = np.diff(values)
        assert (gains >= 0).all() and (np.diff(gains) <= 1e-5).all()
        best = max(facility(coverage, list(s)) for s in combinations(range(10), 3))
        assert (1 - 1 / np.e) * best <= values[-1] <= best + 1e-5
        # true marginal gains: the second pick is the best partner of the first
        assert values[2] >= max(facility(coverage, [order[0], j]) for j in range(10)) - 1e-5


def test_terms(vectors):
    _, (text, vision, features), _, _ = vectors
    other = RNG.normal(size=features.shape).astype(np.float32)
    a, b = (np.asarray(select(text, vision, c, 24, alpha=0.0)) for c in (features, other))
    np.testing.assert_array_equal(a, b)
    c = np.asarray(select(text, vision, other, 24, alpha=4.0))
    assert (c != a).any()
    np.testing.assert_array_equal(select(text, vision, features, 40, alpha=0.5), np.arange(40))


def test_words():
    prompt = "What is the color of the small cat?\nAnswer the question using a single word or phrase."
    assert content_words(prompt) == ["color", "small", "cat"]
    assert content_words("Is this it?") == ["Is", "this", "it"]
    assert content_mask(["The", "red", "digit"]) == [False, True, True]


def test_refused():
    tok = Tokens(np.zeros((1, 6, 4), np.float32), Meta.of(6))
    program, params = split(tokens.mmtok(keep=2))
    with pytest.raises(ValueError, match="evidence: expected the entry 'text'"):
        program.apply(params, State(), tok, {"features": tok.x, "text": None}, Ctx())
    text = (np.zeros((1, 3, 4), np.float32), np.ones((1, 3), bool))
    with pytest.raises(ValueError, match=r"evidence\['features'\]: expected \[1, 6, C\]"):
        program.apply(params, State(), tok, {"features": tok.x[:, :5], "text": text}, Ctx())
    with pytest.raises(ValueError, match="tau_vision: expected a temperature above 0"):
        tokens.mmtok(keep=2, tau_vision=0)
