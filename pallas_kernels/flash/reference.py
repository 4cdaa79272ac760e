"""Plain attention over the full N x M table: the documentation of the kernel, and its oracle in tests."""

from __future__ import annotations

import jax.numpy as jnp


def logits(o: dict, opt):
    """(logits [B, H, N, M] before masking, bool broadcastable to them: which keys each row sees)."""
    q, k = o["q"], o["k"]
    (b, n, h, d), (m, g) = q.shape, k.shape[1:3]
    acc = jnp.promote_types(q.dtype, jnp.float32)

    def heads(x):  # [b, M, 1|G|H] -> [b, 1|H, M]
        x = jnp.moveaxis(x, 2, 1)
        return x if x.shape[1] == 1 else jnp.repeat(x, h // x.shape[1], axis=1)

    def field(x):  # [b, N] or [b, G, N] -> [b, 1|H, N]
        return x[:, None] if x.ndim == 2 else jnp.repeat(x, h // g, axis=1)

    broken = ~jnp.isfinite(k).all(-1)  # [b, m, g]: rows that see such a key get NaN, others nothing
    if "v" in o:
        broken |= ~jnp.isfinite(o["v"]).all(-1)
    k = jnp.where(jnp.isfinite(k), k, 0)
    s = jnp.einsum("bngrd,bmgd->bgrnm", q.reshape(b, n, g, h // g, d), k, preferred_element_type=acc)
    s = s.reshape(b, h, n, m) * opt.scale
    qf = {name: field(x)[..., :, None] for name, x in o["q_fields"].items()}
    kf = {name: field(x)[..., None, :] for name, x in o["k_fields"].items()}
    if opt.score_mod is not None:
        row = {name: heads(x)[..., :, None] for name, x in o.get("row", {}).items()}
        key = {name: heads(x)[..., None, :] for name, x in o.get("key", {}).items()}
        s = opt.score_mod(s, qf, kf, row, key)
    if o.get("key_bias") is not None:
        s = s + heads(o["key_bias"])[..., None, :]
    if o.get("bias") is not None:
        s = s + o["bias"]
    seen, weight = listed(o, opt, n, m, h)
    if weight is not None:
        s = s + weight
    s = jnp.where(heads(broken)[..., None, :], jnp.nan, s)
    seen = seen & field(o["k_valid"])[..., None, :]
    if opt.mask is not None:
        seen = seen & opt.mask.test(qf, kf)
    return s, seen


def flash(o: dict, opt):
    v = o["v"]
    (b, n, h, _), g = o["q"].shape, v.shape[2]
    acc = jnp.promote_types(o["q"].dtype, jnp.float32)
    s, seen = logits(o, opt)
    if opt.normalizer == "none":
        p = jnp.where(seen, s, 0.0)
        lse = jnp.zeros((b, n, h), acc)
    else:
        s = jnp.where(seen, s, -jnp.inf)
        top = jnp.max(s, -1, keepdims=True)
        top = jnp.where(jnp.isfinite(top), top, 0.0)
        p = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0.0) - top), 0.0)
        mass = p.sum(-1, keepdims=True)
        some = jnp.where(mass == 0, 1.0, mass)
        p = p / some
        lse = jnp.where(mass == 0, -jnp.inf, jnp.log(some) + top)
        lse = jnp.broadcast_to(jnp.moveaxis(lse[..., 0], 1, 2), (b, n, h))
    v_finite = jnp.where(jnp.isfinite(v), v, 0)
    out = jnp.einsum("bhnm,bmhe->bnhe", p, jnp.repeat(v_finite, h // g, axis=2).astype(acc))
    return out.astype(v.dtype), lse


def listed(o: dict, opt, n: int, m: int, h: int):
    """Which keys the lists hold, bool [b, 1|H, N, M], and the units' log weights in the same shape or None."""
    index, count = o["index"], o["count"]
    k = index.shape[-1]
    units = -(-m // opt.unit)
    live = jnp.arange(k) < count[..., None]
    start = index[..., None] * opt.unit  # [b, Hs, Nq, K, 1]
    key = start + jnp.arange(opt.unit)
    live = live[..., None] & (key < units * opt.unit)
    if o.get("bounds") is not None:
        offset = jnp.arange(opt.unit)
        live = live & (offset >= o["bounds"][..., :1]) & (offset < o["bounds"][..., 1:])
    flat = jnp.where(live, key, units * opt.unit).reshape(*index.shape[:-1], -1)
    table = jnp.zeros((*flat.shape[:-1], units * opt.unit + 1), bool)
    table = jnp.put_along_axis(table, flat, True, axis=-1, inplace=False)[..., :m]

    def spread(x):  # [b, Hs, Nq, M] -> [b, 1|H, N, M]
        x = jnp.repeat(x, opt.tile, axis=2)[:, :, :n]
        return x if x.shape[1] == 1 else jnp.repeat(x, h // x.shape[1], axis=1)

    if o.get("log_weight") is None:
        return spread(table), None
    w = jnp.broadcast_to(o["log_weight"][..., None], (*index.shape, opt.unit)).reshape(flat.shape)
    weight = jnp.zeros((*flat.shape[:-1], units * opt.unit + 1), w.dtype)
    weight = jnp.put_along_axis(weight, flat, w, axis=-1, inplace=False)[..., :m]
    return spread(table), spread(weight)
