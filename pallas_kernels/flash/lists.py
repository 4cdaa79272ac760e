"""Lists of key units before any body reads them: what counts once, what counts not at all, what needs no mask.

A list entry that does not count gets the number of the unit past the end; every body ignores that one.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax


def clean(o: dict, opt) -> dict:
    """The operands with lists in which every entry counts: indices outside the keys, and a unit's second appearance in a
    list, are taken out. With ``opt.distinct`` no unit appears twice, and nothing is sorted. A list without entries gets one
    that does not count."""
    index, units = o["index"], -(-o["k"].shape[1] // opt.unit)
    length = index.shape[3]
    per_entry = {x: o[x] for x in ("bounds", "log_weight") if x in o}
    if length == 0:
        grown = {x: jnp.pad(a, [(0, 0)] * 3 + [(0, 1)] + [(0, 0)] * (a.ndim - 4)) for x, a in per_entry.items()}
        return o | grown | {"index": jnp.full((*index.shape[:3], 1), units, jnp.int32), "count": jnp.zeros_like(o["count"])}
    count = jnp.clip(o["count"], 0, length)
    used = (jnp.arange(length) < count[..., None]) & (index >= 0) & (index < units)
    index = jnp.where(used, index, units).astype(jnp.int32)
    if not opt.distinct and length > 1:
        index = _first_of_each(index, units)
    return o | {"index": index, "count": count.astype(jnp.int32)}


def _first_of_each(index, units: int):
    """``index`` with every repetition in a list replaced by ``units``."""
    place = jnp.broadcast_to(jnp.arange(index.shape[-1], dtype=jnp.int32), index.shape)
    ranked, place = lax.sort((index, place), num_keys=1, is_stable=True)
    again = jnp.concatenate([jnp.zeros_like(ranked[..., :1], bool), ranked[..., 1:] == ranked[..., :-1]], -1)
    return lax.sort((place, jnp.where(again, units, ranked)), num_keys=1)[1]


def coarser(o: dict, opt, least: int):
    """(operands, unit) with units of at least ``least`` keys: an entry becomes the live range of a larger unit, which may
    then stand in a list once per range."""
    unit = opt.unit
    if unit >= least:
        return o, unit
    factor = -(-least // unit)
    start = o["index"] % factor * unit
    inside = o.get("bounds", jnp.array([0, unit]))
    bounds = (start[..., None] + inside).astype(jnp.int32)
    return o | {"index": o["index"] // factor, "bounds": bounds}, unit * factor


def full_entries(o: dict, opt, usable):
    """bool [b, Hs, Nq, K]: entries whose keys are all ``usable`` (bool [b, 1|G, M]) and surely seen by every query of
    the tile; from the least and the largest value of each field in a tile. None for a mask that cannot tell."""
    if opt.mask is not None and not hasattr(opt.mask, "interval"):
        return None
    index = o["index"]
    (b, hs, tiles, k), h, g, m = index.shape, o["q"].shape[2], o["k"].shape[2], o["k"].shape[1]
    units = -(-m // opt.unit)

    def shared(x, reduce):
        """x [B|1, 1|G, n] for the batch and heads of the lists, reduced where they share one."""
        x = reduce(x, 0, keepdims=True) if b == 1 else x
        x = reduce(x, 1, keepdims=True) if hs == 1 else x
        return jnp.repeat(x, h // g, axis=1) if hs == h and x.shape[1] == g else x

    def interval(x, size: int):
        x = x[:, None] if x.ndim == 2 else x
        rest = -x.shape[-1] % size
        cut = lambda fill: jnp.pad(x, [(0, 0)] * 2 + [(0, rest)], constant_values=fill)  # noqa: E731
        far = jnp.iinfo(jnp.int32).max // 4  # sums of two of them stay in range
        low, high = (cut(fill).reshape(*x.shape[:2], -1, size) for fill in (far, -far))
        return shared(low.min(-1), jnp.min), shared(high.max(-1), jnp.max)

    def listed(x, spare):
        """x [B|1, 1|.., units] -> [b, hs, tiles, k], ``spare`` for entries that do not count."""
        x = jnp.pad(x, [(0, 0)] * 2 + [(0, 1)], constant_values=spare)
        x = jnp.broadcast_to(x, (b, hs, units + 1))
        return jnp.take_along_axis(x, index.reshape(b, hs, -1), -1).reshape(b, hs, tiles, k)

    whole = jnp.pad(usable, [(0, 0)] * 2 + [(0, units * opt.unit - m)])
    whole = shared(whole.reshape(*whole.shape[:2], units, opt.unit).all(-1), jnp.all)
    full = listed(whole, False)
    if "bounds" in o:
        full &= (o["bounds"][..., 0] <= 0) & (o["bounds"][..., 1] >= opt.unit)
    if opt.mask is not None:
        q = {x: tuple(e[..., None] for e in interval(o["q_fields"][x], opt.tile)) for x in opt.mask.fields()}
        key = {x: tuple(listed(e, 0) for e in interval(o["k_fields"][x], opt.unit)) for x in opt.mask.fields()}
        full &= opt.mask.interval(q, key)[1]
    return full
