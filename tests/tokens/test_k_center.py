import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens
from jaxattn.core.types import Meta, Tokens

RNG = np.random.default_rng(0)
SIDE = 4
N = SIDE * SIDE


def image(x, valid=None):
    row, col = (jnp.asarray(a.reshape(1, N), jnp.int32) for a in np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"))
    meta = Meta.of(N, row=row, col=col)
    return Tokens(jnp.asarray(x, jnp.float32), meta if valid is None else meta.replace(valid=jnp.asarray(valid)))


def kept(x, keep, valid=None, **options):
    record = tokens.k_center(keep, **options)
    params = {"keep": jnp.int32(keep), "spread": jnp.float32(record.spread)}
    out, _, _ = record.apply(params, None, image(x, valid), {}, None)
    pos, live = np.asarray(out.meta.pos), np.broadcast_to(out.meta.valid, out.meta.pos.shape)
    return [sorted(int(i) for i in p[ok]) for p, ok in zip(pos, live, strict=True)]


def greedy(x, keep, spread, valid):
    """The definition, pair by pair."""
    rows = np.flatnonzero(valid)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    at = np.stack([np.arange(N) // SIDE, np.arange(N) % SIDE], -1)
    extent = np.maximum(at[rows].max(0), 1)
    s = unit @ unit.T + spread * np.cos(np.pi * (at[:, None] - at[None]) / extent).mean(-1)
    chosen = [rows[np.argmin(s[np.ix_(rows, rows)].sum(1))]]
    while len(chosen) < keep:
        left = [i for i in rows if i not in chosen]
        chosen.append(min(left, key=lambda i: max(s[i, j] for j in chosen)))
    return sorted(int(i) for i in chosen)


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_picks_what_the_definition_picks(spread):
    x, valid = RNG.normal(size=(3, N, 6)), np.ones((3, N), bool)
    valid[1, 5:9] = valid[2, 12:] = False  # a whole last row: the extent shrinks with it
    assert kept(x, 6, valid, spread=spread) == [greedy(a, 6, spread, v) for a, v in zip(x, valid, strict=True)]


def test_rows_that_are_missing_are_never_picked_and_a_whole_budget_keeps_all():
    x, valid = RNG.normal(size=(1, N, 4)), np.zeros((1, N), bool)
    valid[0, [2, 7, 11]] = True
    assert kept(x, 8, valid) == [[2, 7, 11]]
    assert kept(x, N) == [list(range(N))]


def test_bad_spread_is_named():
    with pytest.raises(ValueError, match="spread: expected 0 or more, got -1"):
        tokens.k_center(4, spread=-1.0)


def test_choosing_passes_no_gradient_but_what_is_kept_does():
    x = jnp.asarray(RNG.normal(size=(1, N, 4)), jnp.float32)
    record, params = tokens.k_center(5), {"keep": jnp.int32(5), "spread": jnp.float32(2.0)}
    total = lambda x: record.apply(params, None, image(x), {}, None)[0].x[:, :5].sum()  # noqa: E731
    grad = np.asarray(jax.grad(total)(x))[0]
    assert sorted(set(np.flatnonzero(grad.any(-1)))) == kept(np.asarray(x), 5)[0]
