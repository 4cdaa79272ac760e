import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Ctx, Meta, Spec, State, Tokens, split
from jaxattn.tokens.textmonkey import init_perceiver, read_back, textmonkey_redundancy
from tests.jaxprs import largest

RNG = np.random.default_rng(0)
B, N, D = 2, 11, 8
X = RNG.normal(size=(B, N, D)).astype(np.float32)
VALID = np.ones((B, N), bool)
VALID[1, 8:] = False
redundancy = jax.jit(textmonkey_redundancy, static_argnames="tile")


def by_hand(x):
    """The map with 2 taken off its lower triangle, the diagonal included."""
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return (unit @ unit.T - 2 * np.tril(np.ones((len(x), len(x))))).max(-1)


@functools.partial(jax.jit, static_argnums=0)
def apply(program, params, x, valid):
    out = program.apply(params, State(), Tokens(x, Meta.of(N, valid=valid)), {}, Ctx())[0]
    return out.x, out.meta, out.slot


def trained(params, seed=1):
    """The parameters with a last layer that says something."""
    last = 0.5 * jax.random.normal(jax.random.key(seed), params["last"]["kernel"].shape)
    return {**params, "last": {"kernel": last}}


def test_redundancy_looks_only_ahead_and_in_tiles():
    for tile in (4, N):
        np.testing.assert_allclose(redundancy(X, tile=tile), [by_hand(x) for x in X], atol=1e-5)
    found = redundancy(X, valid=VALID, tile=4)
    np.testing.assert_allclose(found[1, :8], by_hand(X[1, :8]), atol=1e-5)
    assert (np.asarray(found)[:, -1] == -1).all()
    n = 1024
    size, _, shape = largest(textmonkey_redundancy, jax.ShapeDtypeStruct((1, n, D), jnp.float32))
    assert size <= 128 * n, f"{shape} of {n} tokens"


def test_the_earlier_of_two_equal_tokens_leaves_first():
    x = np.array(X)
    x[:, 6] = 3.0 * x[:, 2]  # cosines do not see lengths
    record = tokens.textmonkey(N - 1, width=16, heads=2)
    program, params = split(record)
    params |= record.init(jax.random.key(0), Spec(dim=D))
    y, meta, slot = apply(program, params, x, np.ones((B, N), bool))
    kept = np.asarray(meta.pos)[np.asarray(meta.valid)].reshape(B, -1)
    np.testing.assert_array_equal(kept, np.tile(np.delete(np.arange(N), 2), (B, 1)))
    assert (np.asarray(slot)[:, 2] == -1).all()
    # A last layer of zeros: the kept tokens bit by bit, and everything in order where everything stays.
    np.testing.assert_array_equal(np.asarray(y)[:, : N - 1], np.delete(x, 2, 1))
    whole, params = split(tokens.textmonkey(N, width=16, heads=2))
    params |= record.init(jax.random.key(0), Spec(dim=D))
    np.testing.assert_array_equal(apply(whole, params, x, np.ones((B, N), bool))[0][:, :N], x)


def perceiver_by_hand(p, x, latents, heads):
    """One example, rows that count only."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)

    def norm(q, y):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        return y * q["scale"] + q["bias"]

    a, b = (norm(p[f"norm_{n}"], y @ p["down"]["kernel"]) for n, y in (("tokens", x), ("latents", latents)))
    k, v = np.split(np.concatenate([a, b]) @ p["kv"]["kernel"], 2, axis=-1)
    split_heads = lambda y: y.reshape(len(y), heads, -1).transpose(1, 0, 2)  # noqa: E731
    q, k, v = (split_heads(y) for y in (b @ p["q"]["kernel"], k, v))
    s = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    s = np.exp(s - s.max(-1, keepdims=True))
    out = (s / s.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(latents), -1) @ p["out"]["kernel"]
    h = norm(p["norm_mlp"], out) @ p["up"]["kernel"]
    return np.asarray(jax.nn.gelu(h.astype(np.float32), approximate=False)) @ p["last"]["kernel"] * p["gain"]


def test_gathered_as_masked_as_by_hand():
    """A trained last layer: dropped content comes back, and padding says nothing."""
    keep, params0 = 5, trained(init_perceiver(jax.random.key(3), D, 16))
    found = {}
    for mode in ("keep", "mask"):
        program, params = split(tokens.textmonkey(keep, width=16, heads=2, mode=mode))
        y, meta, _ = apply(program, params | params0, X, VALID)
        live = np.asarray(meta.valid)
        assert (live.sum(-1) == keep).all() and y.shape[1] == program.rows(N)
        found[mode] = np.asarray(y)[live].reshape(B, keep, D)
        pos = np.broadcast_to(meta.pos, live.shape)[live].reshape(B, keep)
    np.testing.assert_allclose(found["keep"], found["mask"], atol=1e-5)
    for b in range(B):
        rows = X[b][VALID[b]]
        np.testing.assert_array_equal(pos[b], np.sort(np.argsort(by_hand(rows), kind="stable")[:keep]))
        want = rows[pos[b]] + perceiver_by_hand(params0, rows, rows[pos[b]], 2)
        np.testing.assert_allclose(found["keep"][b], want, atol=1e-4)


def test_gradients_reach_what_was_dropped():
    params = init_perceiver(jax.random.key(3), D, 16)
    live = jnp.ones((B, 4), bool)

    @jax.jit
    def gradient(params, x):
        return jax.grad(lambda p, x: read_back(p, x, x[:, :4], jnp.asarray(VALID), live, heads=2).sum(), (0, 1))(params, x)

    at_first, _ = gradient(params, X)
    assert np.abs(at_first["last"]["kernel"]).max() > 0 and np.abs(at_first["kv"]["kernel"]).max() == 0
    _, of_tokens = gradient(trained(params), X)
    of_tokens = np.abs(np.asarray(of_tokens)).max(-1)
    assert (of_tokens[VALID] > 0).all() and (of_tokens[~VALID] == 0).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="width: expected None or a multiple of the 8 heads, got 12"):
        tokens.textmonkey(4, width=12)
    with pytest.raises(ValueError, match="keep: expected a whole number"):
        tokens.textmonkey(0)
