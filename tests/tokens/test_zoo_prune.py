import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, State, Tokens, split

B, N, C, D, M = 2, 18, 6, 10, 24
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, N, C)).astype(np.float32)
W1, W2 = (RNG.normal(size=s).astype(np.float32) for s in ((C, 12), (12, D)))
U = tokens.unit_directions(jax.random.key(1), M, C)


def mlp(x):
    return jax.nn.gelu(x @ W1) @ W2


def test_linear_maps_respond_alike():
    w = W1 @ W2
    s = tokens.sensitivity(lambda x: x @ w, X, U, 0.5)
    np.testing.assert_allclose(s, np.linalg.norm(np.asarray(U) @ w, axis=-1).mean(), rtol=1e-4)


def test_small_steps_are_derivatives():
    with jax.enable_x64(True):
        x, u = X.astype(np.float64), np.asarray(U, np.float64)
        want = np.mean([np.linalg.norm(jax.jvp(mlp, (x,), (np.broadcast_to(d, x.shape),))[1], axis=-1) for d in u[:5]], 0)
        np.testing.assert_allclose(tokens.sensitivity(mlp, x, u[:5], 1e-3), want, rtol=1e-4)


def test_greedy_by_hand():
    z, s = np.asarray(mlp(X)), np.asarray(tokens.sensitivity(mlp, X, U))
    got = np.asarray(tokens.zoo_prune_select(mlp, X, U, 7))
    for b in range(B):
        unit = z[b] / np.linalg.norm(z[b], axis=-1, keepdims=True)
        hat = (s[b] - s[b].min()) / (s[b].max() - s[b].min())
        picked = [int(s[b].argmax())]
        while len(picked) < 7:
            gain = hat * (1 - (unit @ unit[picked].T).max(-1))
            gain[picked] = -np.inf
            picked.append(int(gain.argmax()))
        np.testing.assert_array_equal(got[b], sorted(picked))
    assert (np.asarray(tokens.zoo_prune_select(mlp, X, U, 1))[:, 0] == s.argmax(-1)).all()


def test_duplicates_come_last():
    z = RNG.normal(size=(8, D)).astype(np.float32)
    z = np.concatenate([z, z])  # every token twice
    picks = np.asarray(tokens.zoo_prune_picks(jnp.asarray(np.linspace(2, 1, 16, dtype=np.float32)), z, 8))
    assert set((picks % 8).tolist()) == set(range(8))


def test_record():
    """The record gets the projector as a fact; rows that are not valid are never kept."""
    valid = np.arange(N)[None] < np.array([[N], [5]])
    program, params = split(tokens.zoo_prune(6, directions=M))

    @jax.jit
    def run(params, x):
        facts = {"features": x, "project": mlp}
        return program.apply(params, State(), Tokens(mlp(x), Meta.of(N, valid=valid)), facts, Ctx())

    out, _, aux = run(params, X)
    s = tokens.sensitivity(mlp, X, tokens.unit_directions(jax.random.key(0), M, C))
    np.testing.assert_allclose(aux["scores"], s, rtol=1e-4)
    want = np.sort(np.asarray(tokens.zoo_prune_picks(s[0], mlp(X[0]), 6)))
    live = np.asarray(out.meta.valid)
    np.testing.assert_array_equal(np.asarray(out.meta.pos)[0][live[0]], want)
    assert live[1].sum() == 5
    with pytest.raises(ValueError, match="evidence: expected the entry 'project'"):
        program.apply(params, State(), Tokens(X, Meta.of(N)), {"features": X}, Ctx())
