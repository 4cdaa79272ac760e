"""The sink metric: known maps, padding, and the same figures from a bound model as from its maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.analysis.attention_sink_emergence import attention_sink_emergence, importance, norm_profile, sink_rate
from jaxattn.core import statistics
from jaxattn.core.attend import attend_call, make_call
from jaxattn.core.mask import causal
from models.language import llm

T = 64


def received(a):
    """Maps [..., T, T] to sums over the queries."""
    return a.sum(-2)


def test_uniform_causal_attention_has_no_sink():
    call = make_call(np.zeros((1, T, 2, 4), np.float32), *np.zeros((2, 1, T, 1, 4), np.float32), mask=causal())
    own, _ = statistics.received(call, attend_call(call)[0].lse, np.ones((1, T), np.float32))
    alpha = importance(own[:, None])
    harmonic = (1 / np.arange(1, T + 1)).sum()
    np.testing.assert_allclose(alpha[0, 0, :, 0], harmonic / T, rtol=1e-5)
    assert abs(float(alpha[0, 0, 0, 0]) - 0.074) < 1e-3 and sink_rate(own[:, None]) == 0
    # The last key is seen by one query, which gives it 1/T.
    np.testing.assert_allclose(alpha[0, 0, :, -1], 1 / T, rtol=1e-5)


def test_all_mass_on_the_first_token():
    a = np.zeros((2, 3, 4, T, T), np.float32)
    a[..., 0] = 1
    rate = sink_rate(received(a), k=None)
    assert rate[0] == 100 and (rate[1:] == 0).all() and sink_rate(received(a), k=2) == 0
    a[0, 1, 2:] = np.eye(T)  # two of 24 heads look at themselves
    # Seen by T - k + 1 queries and looked at by one of them, key k is a sink of such a head for the last three k only.
    expected = [100 * 22 / 24] + [0] * (T - 4) + [100 * 2 / 24] * 3
    np.testing.assert_allclose(sink_rate(received(a), k=None), expected, rtol=1e-6)


def test_padding_does_not_count():
    rng = np.random.default_rng(0)
    n = 9
    a = np.tril(rng.random((1, 2, 3, n, n)).astype(np.float32))
    a /= a.sum(-1, keepdims=True)
    padded = np.zeros((2, 2, 3, 12, 12), np.float32)
    padded[:, :, :, :n, :n] = a
    valid = np.arange(12)[None].repeat(2, 0) < n
    np.testing.assert_allclose(importance(received(padded), valid)[:1, ..., :n], importance(received(a)), rtol=1e-6)
    np.testing.assert_allclose(sink_rate(received(padded), valid=valid, k=None)[:n], sink_rate(received(a), k=None))
    assert (sink_rate(received(padded), valid=valid, k=None)[n:] == 0).all()
    by_hand = [a[0, 1, 2, k:, k].sum() / (n - k) for k in range(n)]
    np.testing.assert_allclose(importance(received(a))[0, 1, 2], by_hand, rtol=1e-5)


def test_norms():
    x = np.ones((2, 3, 5, 4)) * np.arange(1, 6)[:, None]
    np.testing.assert_allclose(norm_profile(x), 2 * np.arange(1, 6)[None].repeat(3, 0), rtol=1e-6)
    assert norm_profile(np.ones((2, 3, 5, 2, 4))).shape == (3, 5)
    assert norm_profile(jnp.ones((1, 1, 2, 4), jnp.bfloat16)).dtype == jnp.float32


def test_from_a_bound_model():
    c = llm.tiny(vocab=32, layers=2, dim=16, hidden=16)
    params = llm.init(c)
    tokens = np.random.default_rng(0).integers(0, 32, (3, 16)).astype(np.int32)
    probe = attention_sink_emergence(c.layers, norms=True)
    bound = llm.bind(c, params, steering=(probe,))

    @jax.jit
    def figures(arrays, params, tokens):
        out = llm.forward(bound._replace(arrays=arrays, params=params), tokens)
        return out.logits, probe.reduce(out.stack.evidence), out.stack.evidence

    logits, found, evidence = figures(bound.arrays, params, tokens)
    assert found["sink_rate"].shape == (16,) and found["importance"].shape == (3, 2, 4, 16)
    assert found["hidden_norm"].shape == found["key_norm"].shape == (2, 16)
    # Nothing is edited; causal rows sum to one, so the sums of a head add up to the number of queries.
    plain = jax.jit(lambda params: llm.forward(llm.bind(c, params), tokens).logits)(params)
    np.testing.assert_allclose(logits, plain, atol=1e-5)
    queries = np.arange(16, 0, -1)
    np.testing.assert_allclose((np.asarray(found["importance"]) * queries).sum(-1), 16, rtol=1e-4)
    hidden = evidence["attention_sink_emergence.hidden.0"]
    embedded = np.asarray(params["embed"]["embedding"])[tokens]
    np.testing.assert_allclose(hidden, embedded, atol=1e-6)
    np.testing.assert_allclose(found["hidden_norm"][0], np.linalg.norm(embedded, axis=-1).mean(0), rtol=1e-5)


def test_record_and_errors():
    assert attention_sink_emergence(3) == attention_sink_emergence((0, 1, 2)) and hash(attention_sink_emergence(3))
    assert [n.at for n in attention_sink_emergence((0, -1), site="vision").needs()] == ["vision.0", "vision.-1"]
    with pytest.raises(ValueError, match="evidence"):
        attention_sink_emergence(2).reduce({})
    with pytest.raises(ValueError, match="k:"):
        sink_rate(np.zeros((1, 1, 1, 4)), k=0)
    with pytest.raises(ValueError, match="received"):
        importance(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="layers"):
        attention_sink_emergence(())
