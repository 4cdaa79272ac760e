"""The streaming pass in plain XLA, over the same tiles and lists as attention, in memory linear in length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash import xla as tiles
from pallas_kernels.profile.reference import apart, known

# ----------------------------------------------------------------------------------------------------------- reduce


def _spread(x, o: dict, opt):
    """Rows [B, N, H] -> [b, g, r, Nq, t]."""
    g = o["k"].shape[2]
    return tiles._tiles(tiles._heads(x, g, o["q"].shape[2] // g), opt.tile)


def _forward(o: dict, opt, lse, weights):
    (b, n, h, _), (m, g) = o["q"].shape, o["k"].shape[1:3]
    acc = jnp.promote_types(o["q"].dtype, jnp.float32)
    rows, keys, *others = tiles._arrange(o, opt)
    arranged, lists, keys = (rows, tiles.captured(keys), *others), others[-1], keys["k"]
    lse, weights = _spread(lse, o, opt), _spread(weights, o, opt)

    def tile(columns, i):
        take = functools.partial(lax.dynamic_index_in_dim, index=i, axis=3, keepdims=False)
        lse_i, w_i = take(lse), take(weights)

        def body(j, carry):
            columns, total = carry
            diff, _, ints, index = tiles._step_inputs(i, j, *arranged, opt)
            s = jnp.where(tiles._visible(ints, opt), tiles._logits(diff, ints, opt, acc), -jnp.inf)
            p = jnp.exp(s - lse_i[..., None])
            total = total + jnp.sum(p * jnp.where(s > -jnp.inf, s, 0.0), -1)
            found = jnp.einsum("bgrtu,bgrt->bgru", p, w_i)
            found = found.reshape(*found.shape[:3], opt.step, opt.unit)
            return tiles._put(columns, index, found), total

        return tiles._loop(i, lists, opt, body, (columns, jnp.zeros(lse_i.shape, acc)))

    columns = jnp.zeros((b, g, h // g, keys.shape[3], opt.unit), acc)
    n_tiles = lse.shape[3]
    if n_tiles == 1:
        columns, total = tile(columns, 0)
        total = total[None]
    else:
        columns, total = lax.scan(tile, columns, jnp.arange(n_tiles))
    return columns.reshape(b, h, -1)[..., :m], tiles._unarrange(total, b, n)


class Passes(NamedTuple):
    """``forward(operands, options, lse, weights)`` -> (columns, logits).  ``gradient(floats, ints, options, rows,
    d_columns)`` -> (gradient of floats, of weights): of the logits it is p (weights d_columns + plain + by_logit s), with
    ``rows``: those three and "lse", [B, N, H] each."""

    forward: Callable
    gradient: Callable


def _gradient(floats: dict, ints: dict, opt, rows: dict, d_columns):
    o = floats | ints
    (b, n, h, _), g = o["q"].shape, o["k"].shape[2]
    d_columns = tiles._tiles(d_columns.reshape(b, g, h // g, -1), opt.unit)
    per_row = {x: _spread(a, o, opt) for x, a in rows.items()}

    def pair(row, s, ok, v, index):
        at = {x: a[..., None] for x, a in row.items()}
        p = jnp.exp(jnp.where(ok, s, -jnp.inf) - at["lse"])
        pd = p * tiles._merge_units(tiles._fetch(d_columns, index))[..., None, :]
        ds = at["weights"] * pd + p * (at["plain"] + at["by_logit"] * jnp.where(ok, s, 0.0))
        return ds, None, pd.sum(-1)

    found = jnp.zeros(per_row["lse"].shape[:3] + (opt.tile,), d_columns.dtype)
    grads, d_weights = tiles.pull_back(o, opt, per_row, found, pair)
    return tiles.push_floats(floats, ints, opt, grads), tiles._unarrange(d_weights, b, n)


PASSES = Passes(_forward, _gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def differentiable(floats: dict, ints: dict, opt, passes: Passes, lse, weights):
    return passes.forward(floats | ints, opt, lse, weights)


def _fwd(floats, ints, opt, passes, lse, weights):
    columns, total = passes.forward(floats | ints, opt, lse, weights)
    return (columns, total), (floats, ints, lse, weights, total)


def _bwd(opt, passes, saved, cotangents):
    floats, ints, lse, weights, total = saved
    d_columns, d_total = cotangents
    rows = {"lse": lse, "weights": weights, "plain": d_total, "by_logit": d_total}
    d_floats, d_weights = passes.gradient(floats, ints, opt, rows, d_columns)
    d_lse = -(weights * d_weights + d_total * total)  # p depends on lse through exp(-lse) alone
    return d_floats, None, d_lse.astype(lse.dtype), d_weights.astype(weights.dtype)


differentiable.defvjp(_fwd, _bwd)


def without_values(o: dict) -> dict:
    """The tile machinery fetches values; here they have no columns."""
    return o | {"v": o["k"][..., :0]}


def reduce(o: dict, opt):
    o, lse, weights = apart(o, "lse", "weights")
    acc = jnp.promote_types(o["q"].dtype, jnp.float32)
    return differentiable(*tiles.divide(without_values(o)), opt, PASSES, lse.astype(acc), weights.astype(acc))


def log_mass(o: dict, opt):
    """[B, N, H] log of the mass of each row's keys."""
    return tiles.flash(without_values(o), opt)[1]


def profile(o: dict, opt):
    o, weights = apart(o, "weights")
    lse = log_mass(o, opt)
    return reduce(o | known(lse, weights), opt)[0], lse


# -------------------------------------------------------------------------------------------------------- diagonals


def diagonals(o: dict, scale: float, unit: int = 512):
    q, k, lse = o["q"], o["k"], o.get("lse")
    (b, r, h, d), (m, g) = q.shape, k.shape[1:3]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    u = max(unit, r)  # then a tile's diagonals reach into the next tile only
    q = q.reshape(b, r, g, h // g, d)
    n_tiles = -(-m // u)
    k = jnp.moveaxis(jnp.pad(k, ((0, 0), (0, n_tiles * u - m), (0, 0), (0, 0))).reshape(b, n_tiles, u, g, d), 1, 0)
    tiles_of_keys = k, jnp.arange(n_tiles) * u

    def logits(x):
        k, start = x
        s = jnp.einsum("brgcd,bugd->bgcru", q, k, preferred_element_type=acc).reshape(b, h, r, u) * scale
        return jnp.where(start + jnp.arange(u) <= m - r + jnp.arange(r)[:, None], s, -jnp.inf)

    if lse is None:
        # A tile's log mass per row: the first tile has a key for every row, so the sum over tiles is finite.
        mass = jax.checkpoint(lambda _, x: (None, _log_mass(logits(x))))
        lse = jax.nn.logsumexp(lax.scan(mass, None, tiles_of_keys)[1], 0)[..., None]
    else:
        lse = jnp.moveaxis(lse, 2, 1)[..., None]

    @jax.checkpoint  # a tile's probabilities are made again in reverse mode, not kept
    def tile(_, x):
        p = jnp.exp(logits(x) - lse)
        # Row r-1-i moves i to the right: rows of width u + r read again with one element less per row.
        skew = jnp.pad(p[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, r))).reshape(b, h, -1)
        skew = skew[..., : r * (u + r - 1)].reshape(b, h, r, u + r - 1).sum(2)
        return None, (p.sum(2), jnp.pad(skew, ((0, 0), (0, 0), (0, u - r + 1))))

    _, (vertical, slash) = lax.scan(tile, None, tiles_of_keys)
    flat = lambda x: jnp.moveaxis(x, 0, 2).reshape(b, h, -1)[..., :m]  # noqa: E731
    return flat(vertical), flat(overlapped(slash, u))


def _log_mass(s):
    """log sum exp over the last axis, -inf (and no gradient) where all of it is -inf."""
    some = s.max(-1) > -jnp.inf
    return jnp.where(some, jax.nn.logsumexp(jnp.where(some[..., None], s, 0.0), -1), -jnp.inf)


def overlapped(x, u: int):
    """[tiles, ..., W] sums of tiles that start ``u`` apart and reach W - u <= u into the next: [tiles, ..., u]."""
    more = jnp.pad(x[:-1, ..., u:], [(0, 0)] * (x.ndim - 1) + [(0, 2 * u - x.shape[-1])])
    return x[..., :u].at[1:].add(more)
