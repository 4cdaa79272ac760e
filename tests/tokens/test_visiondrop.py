from functools import partial

import jax
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split

B, N, C, D = 2, 17, 5, 4
RNG = np.random.default_rng(0)
X, M = (RNG.normal(size=(B, N, w)).astype(np.float32) for w in (C, D))
S = RNG.exponential(size=(B, N)).astype(np.float32)
step = jax.jit(tokens.dominant_contextual, static_argnums=(3, 4))


def by_hand(x, s, m, dominant, contextual):
    """One image: rows, and the members of each contextual row (its target first)."""
    top = np.sort(np.argsort(-s, kind="stable")[:dominant])
    rest = np.setdiff1d(np.arange(len(x)), top)
    m = m / np.linalg.norm(m, axis=-1, keepdims=True)
    if not contextual:
        return x[top], []
    stride = max(1, len(rest) // contextual)
    targets = rest[::stride][:contextual]
    members = [[t] for t in targets]
    for j in rest:
        if j not in targets:
            members[int((m[targets] @ m[j]).argmax())].append(j)
    return np.concatenate([x[top], [x[g[0]] + (x[g[1:]].mean(0) if g[1:] else 0) for g in members]]), members


@pytest.mark.parametrize("dominant, contextual", [(6, 4), (9, 0), (2, 15)])
def test_step(dominant, contextual):
    rows, slot, index, valid = step(X, S, M, dominant, contextual)
    assert np.asarray(valid).all()
    for b in range(B):
        want, members = by_hand(X[b], S[b], M[b], dominant, contextual)
        np.testing.assert_allclose(rows[b], want, atol=1e-5)
        np.testing.assert_array_equal(rows[b, :dominant], X[b][np.sort(np.argsort(-S[b])[:dominant])])  # bit for bit
        for c, group in enumerate(members):
            assert index[b, dominant + c] == group[0]
            assert set(np.flatnonzero(np.asarray(slot)[b] == dominant + c)) == set(group)


def test_padding_has_no_part():
    more = lambda x: np.concatenate([x, np.full((B, 3, *x.shape[2:]), 7.0, np.float32)], 1)  # noqa: E731
    valid = np.broadcast_to(np.arange(N + 3) < N, (B, N + 3))
    a, b = step(X, S, M, 6, 4), step(more(X), more(S), more(M), 6, 4, valid=valid)
    np.testing.assert_allclose(a[0], b[0], atol=1e-6)
    assert (np.asarray(b[1])[:, N:] == -1).all()


def test_encoder():
    """Record and plain function alike; the class row leads and counts among the dominant rows."""
    hidden = np.concatenate([RNG.normal(size=(B, 1, C)).astype(np.float32), X], 1)
    cls = RNG.dirichlet(np.ones(N + 1), size=(B, 2)).astype(np.float32)
    keys = RNG.normal(size=(B, N + 1, 2, D)).astype(np.float32)
    want = tokens.visiondrop_encode(hidden, cls, keys, 6, 3)
    assert want.shape == (B, 9, C)
    record = tokens.visiondrop(6, 3)
    assert record.rows(N) == 9
    facts = {"cls": cls[..., 1:].sum(1), "keys": keys[:, 1:], "special": hidden[:, :1]}
    program, params = split(record)
    out = program.apply(params, State(), Tokens(X, Meta.of(N)), facts, Ctx())[0]
    np.testing.assert_allclose(out.x, want, atol=1e-6)
    assert (np.diff(np.asarray(out.meta.pos)) > 0).all() and np.asarray(out.meta.valid).all()
    plain = split(tokens.visiondrop(6, 0, cls=False))[0].apply({}, State(), Tokens(X, Meta.of(N)), facts, Ctx())[0]
    np.testing.assert_array_equal(plain.slot >= 0, np.argsort(np.argsort(-facts["cls"], -1), -1) < 6)


def test_stages():
    record = tokens.visiondrop_stages()
    assert record.sites(32) == (8, 16, 24) and record.average(48, 32) == 32
    assert [cut.rows(100) for _, cut in record.schedule(32)] == [35, 26, 19]
    image, keys = record.schedule(32)[0][1].needs()
    assert (image.rows, image.at, keys.what) == ("vision", "next", "rotated_keys")
    (_, cut), *_ = tokens.visiondrop_stages(((6, 4),), layers=(1,)).schedule(4)
    keys = np.repeat(M[:, :, None], 2, 2)
    run = jax.jit(partial(cut.apply, {}, State(), ctx=Ctx()))
    out = run(tokens=Tokens(X, Meta.of(N)), evidence={"image": S, "keys": keys})[0]
    np.testing.assert_allclose(out.x, step(X, S, M, 6, 4)[0], atol=1e-6)
    with pytest.raises(ValueError, match="keep: expected pairs"):
        tokens.visiondrop_stages((3, 2))
