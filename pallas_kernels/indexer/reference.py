"""Selection from the full table of scores: the documentation of the kernels, and their oracle in tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def per_list(x, lists: int):
    """Facts [b, n] or [b, G, n] -> [b, 1|L, n]."""
    return x[:, None] if x.ndim == 2 else jnp.repeat(x, lists // x.shape[1], axis=1)


def lists_of(o: dict, opt) -> int:
    return o["q"].shape[2] if opt.heads == "each" else o["k"].shape[2]


def eligible(opt, q: dict, k: dict):
    """bool [b, l, n, u]; both sides hold "valid" [b, l, n] and ranges "low", "high" {name: [b, l, n]}."""
    may = q["valid"][..., :, None] & k["valid"][..., None, :]
    if opt.mask is None:
        return may
    ranges = lambda side, at: {x: (side["low"][x][at], side["high"][x][at]) for x in side["low"]}  # noqa: E731
    rows, keys = (..., slice(None), None), (..., None, slice(None))
    return may & opt.mask.interval(ranges(q, rows), ranges(k, keys))[0]


def sides(o: dict, opt) -> tuple[dict, dict]:
    lists = lists_of(o, opt)

    def side(x):
        low, high = ({n: per_list(a, lists) for n, a in o.get(f"{x}_{end}", {}).items()} for end in ("low", "high"))
        return {"valid": per_list(o[f"{x}_valid"], lists), "low": low, "high": high}

    return side("q"), side("k")


def scores(opt, q, k, weight):
    """[b, l, n, u] of q [b, l, r, n, d] and k [b, g, u, d], the heads r of a list reduced; weight [b, l, r, n] or None."""
    (b, lists, r, n, d), (g, u) = q.shape, k.shape[1:3]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    # Rows as one axis, and no axes of one: XLA on CPU takes ten times as long over the others' products.
    rows, spec = q.reshape(b, g, -1, d), "bgxd,bgud->bgxu"
    if b * g == 1:
        rows, k, spec = rows[0, 0], k[0, 0], "xd,ud->xu"
    s = jnp.einsum(spec, rows, k, preferred_element_type=acc, precision=precision)
    return reduced(opt, s.reshape(b, lists, r, n, u) * opt.scale, None if weight is None else weight[..., None].astype(acc))


def reduced(opt, s, weight):
    """Products [b, l, r, ...] gated, weighed and reduced over r. -0 becomes 0: they are the same score."""
    s = jnp.maximum(s, 0) if opt.gate == "relu" else s
    s = s if weight is None else s * weight
    s = s.max(2) if opt.heads == "max" else s.sum(2)
    return jnp.where(s == 0, 0, s)


def by_list(o: dict, opt):
    """(q [B, L, r, N, D], k [B, G, U, D], weight [B, L, r, N] or None)."""
    split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], lists_of(o, opt), -1, *x.shape[3:]), 1, 3)  # noqa: E731
    return split(o["q"]), jnp.moveaxis(o["k"], 2, 1), None if o.get("weight") is None else split(o["weight"])


def chosen(opt, s):
    """(index, count, values) of the largest finite entries of the last axis."""
    units = s.shape[-1]
    values, index = jax.lax.top_k(s, min(opt.k, units))
    return ascending(jnp.where(values > -jnp.inf, index, units), values, units)


def ascending(index, values, units: int):
    """Entries in ascending order of index; ``units`` and more: none."""
    index, values = jax.lax.sort((index.astype(jnp.int32), values), num_keys=1)
    some = index < units
    return jnp.where(some, index, 0), some.sum(-1).astype(jnp.int32), jnp.where(some, values, -jnp.inf)


def select(o: dict, opt):
    s = scores(opt, *by_list(o, opt))
    seen = eligible(opt, *sides(o, opt)) & (s == s)
    return chosen(opt, jnp.where(seen, s, -jnp.inf))
