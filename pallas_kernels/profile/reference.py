"""The reductions from the full table: the documentation of the kernel, and its oracle in tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.flash.pairs import FAR
from pallas_kernels.flash.reference import flash, logits


def apart(o: dict, *names):
    """(the other operands, *those of ``names``, None where there is none)."""
    return {x: a for x, a in o.items() if x not in names}, *(o.get(x) for x in names)


def reduce(o: dict, opt):
    o, lse, weights = apart(o, "lse", "weights")
    s, seen = logits(o, opt)
    s = jnp.where(seen, s, 0.0)
    p = jnp.where(seen, jnp.exp(s - jnp.moveaxis(lse, 2, 1)[..., None]), 0.0)  # [B, H, N, M]
    return jnp.einsum("bhnm,bnh->bhm", p, weights.astype(p.dtype)), jnp.einsum("bhnm,bhnm->bnh", p, s)


def known(lse, weights) -> dict:
    """Operands of ``reduce`` in which rows that see nothing count nowhere."""
    some = lse > -jnp.inf
    return {"lse": jnp.where(some, lse, FAR), "weights": jnp.where(some, weights, 0.0)}


def profile(o: dict, opt):
    o, weights = apart(o, "weights")
    lse = flash(o | {"v": o["k"][..., :0]}, opt)[1]
    return reduce(o | known(lse, weights), opt)[0], lse


def diagonals(o: dict, scale: float):
    q, k, lse = o["q"], o["k"], o.get("lse")
    (r, h), (m, g) = q.shape[1:3], k.shape[1:3]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    s = jnp.einsum("brhd,bmhd->bhrm", q.astype(acc), jnp.repeat(k, h // g, axis=2).astype(acc)) * scale
    i, j = jnp.arange(r)[:, None], jnp.arange(m)[None, :]
    back = (m - r + i) - j  # how many keys back; negative is the future
    if lse is None:
        lse = jnp.moveaxis(jax.nn.logsumexp(jnp.where(back >= 0, s, -jnp.inf), -1), 1, 2)
    p = jnp.where(back >= 0, jnp.exp(s - jnp.moveaxis(lse, 2, 1)[..., None]), 0.0)
    target = jnp.where(back >= 0, m - 1 - back, m)
    slash = jnp.zeros((*p.shape[:2], m + 1), acc).at[:, :, target].add(p)[..., :m]
    return p.sum(2), slash
