import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core import mask as masks
from jaxattn.core.attend import make_call
from jaxattn.core.labels import KIND_TEXT, KIND_VISION
from jaxattn.core.types import Ctx, Meta, State, Tokens
from models import evidence as ev

RNG = np.random.default_rng(0)
B, H, S, N, D = 2, 4, 17, 9, 8
IMAGE = np.arange(3, 3 + N)  # [prefix | image | prompt]
PROMPT = np.arange(3 + N, S)


def probabilities(q, k, valid):
    s = np.einsum("bnhd,bmhd->bhnm", q, k) * D**-0.5
    s = np.where(np.tril(np.ones((S, S), bool)) & valid[:, None, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def by_loops(a, text, image):
    """The definition, one term at a time."""
    score = np.zeros((a.shape[0], len(image)))
    for b in range(a.shape[0]):
        for h in range(a.shape[1]):
            w = a[b, h][np.ix_(text, text)]
            twice = w + w.T - np.diag(np.diag(w))
            for j, row in enumerate(text):
                score[b] += twice[:, j].sum() * a[b, h, row, image]
    return score


def test_scores_by_definition():
    a = RNG.exponential(size=(B, H, S, S))
    np.testing.assert_allclose(tokens.adaptinfer_scores(a, PROMPT, IMAGE), by_loops(a, PROMPT, IMAGE), rtol=1e-5)
    np.testing.assert_allclose(tokens.text_prior(a[:, :, -1:, -1:])[..., 0], a[:, :, -1, -1], rtol=1e-6)  # T = 1
    twice = a.copy()
    twice[..., IMAGE] *= 2  # linear in the attention to the image
    np.testing.assert_allclose(
        tokens.adaptinfer_scores(twice, PROMPT, IMAGE), 2 * by_loops(a, PROMPT, IMAGE), rtol=1e-5
    )
    prior = np.asarray(tokens.text_prior(np.broadcast_to(np.eye(4), (H, 4, 4))))
    np.testing.assert_allclose(prior, 1)  # text that reads itself: the sum of text rows


def test_evidence_is_the_definition():
    """The streamed evidence, rows in the model's order (image first), with padding and a prefix before the image."""
    q, k = RNG.normal(size=(2, B, S, H, D)).astype(np.float32)
    valid = np.ones((B, S), bool)
    valid[1, -2:] = False
    want = np.stack([by_loops(probabilities(q, k, valid)[b : b + 1], PROMPT[valid[b, PROMPT]], IMAGE)[0] for b in range(B)])
    order = np.concatenate([IMAGE, np.arange(3), PROMPT])
    what = np.where(np.isin(order, IMAGE), KIND_VISION, KIND_TEXT)[None].astype(np.int32)
    meta = Meta.of(S, pos=np.broadcast_to(order, (B, S)), valid=valid[:, order], kind=np.broadcast_to(what, (B, S)))
    call = make_call(q[:, order], k[:, order], k[:, order], mask=masks.causal(), q_meta=meta, k_meta=meta)
    (need,) = tokens.adaptinfer().schedule(32)[0][1].needs()
    groups = {"vision": (0, N), "text": (N, S)}
    found = ev.answer(need, call, None, hidden=q[:, order, 0], k_raw=k, groups=groups, evidence={})
    np.testing.assert_allclose(found[:, :N], want, rtol=1e-4, atol=1e-6)


def test_cuts():
    record = tokens.adaptinfer((6, 3, 0))
    cuts = record.schedule(32)
    assert [site for site, _ in cuts] == [2, 11, 21]
    assert [c.rows(n) for (_, c), n in zip(cuts, (9, 6, 3), strict=True)] == [6, 3, 1]
    tok = Tokens(jnp.asarray(RNG.normal(size=(B, 9, 3))), Meta.of(9))
    scores = RNG.uniform(size=(B, 9)).astype(np.float32)
    out, _, _ = cuts[0][1].apply({}, State(), tok, {"adaptinfer": scores}, Ctx())
    np.testing.assert_array_equal(np.asarray(out.meta.pos), np.sort(np.argsort(-scores, -1)[:, :6], -1))
    none, _, _ = cuts[2][1].apply({}, State(), out, {"adaptinfer": scores[:, :6]}, Ctx())
    assert not np.asarray(none.meta.valid).any()
    for budget in (128, 64, 48, 32):  # the authors' means count one layer of all tokens, their cuts leave two
        average = tokens.adaptinfer(tokens.adaptinfer_counts(budget)).average(576, 32)
        assert abs(average - 576 / 32 - budget) < 1.1, (budget, average)
    with pytest.raises(ValueError, match="keep: expected rows that each cut leaves, not rising"):
        tokens.adaptinfer((3, 6, 1))


def test_layers_are_where_attention_moves():
    base = RNG.exponential(size=(4, 30))
    p = np.concatenate([base[:1].repeat(3, 0), base[1:2].repeat(5, 0), base[2:3].repeat(2, 0), base[3:].repeat(6, 0)])
    assert tokens.adaptinfer_layers(p) == (2, 7, 9)
    shift = tokens.attention_shift(p)
    assert (shift[[0, 1, 3]] < 1e-12).all() and (shift[[2, 7, 9]] > 0.05).all()
    far = np.eye(2)  # disjoint attention: the most two distributions can differ
    np.testing.assert_allclose(tokens.attention_shift(far), np.log(2))
