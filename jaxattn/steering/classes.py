"""Classes of keys: what methods share that move probability between them.

Every edit of this kind multiplies the probabilities of a class of keys by a factor that depends on the row's class
masses alone, so the edited output is sum_c gain_c * (share of class c) and no map is needed (``Call.gain``).
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.types import Array, Call, expect


def per_key(x: Array) -> Array:
    """A Meta field [B|1, M] or [B, G, M] as side rows [B|1, M, 1|G]."""
    return x[..., None] if x.ndim == 2 else jnp.moveaxis(x, 1, 2)


def per_query_head(x: Array, h: int) -> Array:
    """Side rows [B|1, M, 1|G|H] with their kv heads repeated for the H query heads they serve (1 stays 1)."""
    return x if x.shape[-1] in (1, h) else jnp.repeat(x, h // x.shape[-1], axis=-1)


def over_keys(call: Call, fact, how: str = "sum") -> Array:
    """[B|1, 1, 1|H]: a fact reduced over all keys of a Call, own and past, as each query head sees them.

    Args:
      fact: (meta, key) -> number [B|1, M, 1|G]; int32.  how: "sum", or "max" of facts that are at least -1.
    """
    expect("how", repr(how), "'sum' or 'max'", how in ("sum", "max"))
    h, g = call.q.shape[2], call.k.shape[2]
    reduce, join, nothing = (jnp.sum, jnp.add, 0) if how == "sum" else (jnp.max, jnp.maximum, -1)
    total = None
    for meta, key, heads in [(call.k_meta, call.key, None), *((v.meta, v.key, v.heads) for v in call.past)]:
        x = reduce(jnp.asarray(fact(meta, key), jnp.int32), axis=1)
        if heads is not None:  # a View of some kv heads says nothing about the others
            x = jnp.broadcast_to(x, (x.shape[0], heads.shape[0]))
            x = jnp.full((x.shape[0], g), nothing, jnp.int32).at[:, heads].set(x)
        total = x if total is None else join(total, x)
    return per_query_head(total, h)[:, None]


def redistribute(masses: Array, take: tuple[int, ...], to: int, keep) -> Array:
    """Gains [..., C] that keep the fraction ``keep`` of the classes ``take`` and give the rest to class ``to``, in
    proportion to the probabilities there. Rows sum to what they summed to; a row without mass on ``to`` is untouched.

    Args:
      masses: [..., C].  keep: scalar, or broadcastable to [...].
    """
    taken = masses[..., list(take)].sum(-1)
    some = masses[..., to] > 1e-20  # the quotient stays finite in float32
    more = 1.0 + (1.0 - keep) * taken / jnp.where(some, masses[..., to], 1.0)
    gains = jnp.ones_like(masses).at[..., to].set(more)
    for c in take:
        gains = gains.at[..., c].set(keep)
    return jnp.where(some[..., None], gains, 1.0)


__all__ = ["over_keys", "per_key", "per_query_head", "redistribute"]
