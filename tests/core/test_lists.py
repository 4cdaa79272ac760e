"""Calls whose lists one query, or a few together, read: the same attention by another kernel, and positions of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import mask as masks
from jaxattn.core import statistics
from jaxattn.core.attend import attend, attend_call, attend_lowered, lower, make_call
from jaxattn.core.rope import Rope
from jaxattn.core.types import Meta, Selection

B, H, G, D, M, UNIT = 2, 4, 2, 8, 48, 8


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def some_call(rng, n: int, own: bool):
    lists = (B, G, n if own else 1, 3)
    index = np.stack([np.sort(rng.permutation(M // UNIT)[:3]) for _ in range(np.prod(lists[:3]))]).reshape(lists)
    count = jnp.asarray(rng.integers(0, 4, size=lists[:3]), jnp.int32)
    where = Selection(jnp.asarray(index, jnp.int32), count, UNIT, 1 if own else n, log_weight=normal(rng, *lists))
    meta = Meta.of(M, valid=jnp.asarray(rng.random((B, M)) < 0.8), size=jnp.asarray(rng.integers(1, 4, (1, M)), jnp.float32))
    key = {"bias": normal(rng, 1, M, H)}
    return make_call(normal(rng, B, n, H, D), normal(rng, B, M, G, D), normal(rng, B, M, G, D), where=where, k_meta=meta,
                     mask=masks.causal(), key=key)  # fmt: skip


@pytest.mark.parametrize("n, own", [(3, False), (20, True)])
def test_both_kernels_agree(rng, n, own, monkeypatch):
    monkeypatch.setattr("jaxattn.core.attend.MANY", 1)
    call = some_call(rng, n, own)

    def loss(q, k, weight, listed):
        here = call.replace(q=q, k=k, where=call.where.replace(log_weight=weight))
        out, lse = attend_lowered(*lower(here), listed)
        return (out * jnp.arange(out.size).reshape(out.shape)).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum(), lse

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    args = call.q, call.k, call.where.log_weight
    for a, b in zip(jax.tree.leaves(run(*args, True)), jax.tree.leaves(run(*args, False)), strict=True):
        top = float(jnp.abs(jnp.where(jnp.isfinite(b), b, 0.0)).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * top)


@pytest.mark.parametrize("layout, n, tile", [("half", 4, 4), ("interleaved", 6, 2)])
def test_retrieved_units_stand_where_their_selection_puts_them(rng, layout, n, tile):
    rope = Rope(6, 100.0, layout)
    q, k, v = normal(rng, 1, n, H, D), normal(rng, 1, M, G, D), normal(rng, 1, M, G, D)
    q_meta, tiles = Meta.of(n, pos=np.arange(n)[None] + 100), n // tile
    chosen = np.array([[1, 4], [0, 5], [2, 3]], np.int32)[:tiles]
    pos = np.array([[84, 92], [70, 80], [60, 90]], np.int32)[:tiles]
    where = Selection(jnp.asarray(chosen)[None, None], jnp.full((1, 1, tiles), 2), UNIT, tile, pos=jnp.asarray(pos)[None, None])
    call = make_call(rope.apply(q, q_meta.pos), rope.apply(k, np.arange(M)), v, where=where, q_meta=q_meta, mask=masks.causal())
    call = call.replace(rope=rope)
    part = attend_call(call)[0]
    for t in range(tiles):
        rows, keys = slice(t * tile, (t + 1) * tile), (chosen[t][:, None] * UNIT + np.arange(UNIT)).reshape(-1)
        moved = rope.apply(k[:, keys], (pos[t][:, None] + np.arange(UNIT)).reshape(-1))
        want = attend(call.q[:, rows], moved, v[:, keys])
        np.testing.assert_allclose(part.out[:, rows], want.out, atol=1e-5)
        np.testing.assert_allclose(part.lse[:, rows], want.lse, atol=1e-5)
    np.testing.assert_allclose(statistics.log_mass(call), part.lse, atol=1e-5)
    with pytest.raises(ValueError, match="where.pos: expected the layer's Rope"):
        attend_call(call.replace(rope=None))
    with pytest.raises(ValueError, match="where.pos: expected none here"):
        statistics.received(call, part.lse, jnp.ones((1, n)))
    with pytest.raises(ValueError, match="where.pos: expected a Rope over one position"):
        attend_call(call.replace(rope=dataclasses.replace(rope, sections=(1, 2))))
