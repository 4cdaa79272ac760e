"""Plain attention over the full table of queries and keys: the documentation of the kernel, and its oracle in tests."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.flash import reference as tables
from pallas_kernels.gather import lists


@dataclasses.dataclass(frozen=True)
class _Tiled:
    """What the tables of lists read."""

    unit: int
    tile: int


def _per_head(x, h: int):
    """[b, M] or [b, G, M] -> [b, 1|H, M]."""
    return x[:, None] if x.ndim == 2 else jnp.repeat(x, h // x.shape[1], axis=1)


def _complex(x, freqs, angle, layout: str, scale: float):
    """x [..., M, D] with its first 2 R channels as complex numbers times e^(i angle freqs)."""
    r = freqs.shape[0]
    first = x[..., :r] if layout == "half" else x[..., 0 : 2 * r : 2]
    second = x[..., r : 2 * r] if layout == "half" else x[..., 1 : 2 * r : 2]
    z = (first + 1j * second) * jnp.exp(1j * angle[..., None] * freqs) * scale
    parts = [z.real, z.imag]
    turned = jnp.concatenate(parts, -1) if layout == "half" else jnp.stack(parts, -1).reshape(*z.shape[:-1], 2 * r)
    return jnp.concatenate([turned, x[..., 2 * r :]], -1)


def gather(o: dict, opt):
    q = o["q"]
    (b, n, h, d), (m, g) = q.shape, o["k"].shape[1:3]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (jnp.repeat(jnp.moveaxis(o[x].astype(acc), 2, 1), h // g, axis=1) for x in ("k", "v"))  # [b, H, M, D]
    k, v, odd = lists.clean(k, v)
    k = jnp.broadcast_to(k[:, :, None], (b, h, n, m, d))
    listed = jnp.ones((1, 1, 1, m), bool)
    weight = angle = 0.0
    if o.get("index") is not None:
        tiled = _Tiled(opt.unit, 1 if o["index"].shape[2] == n else n)
        used = o | {"index": jnp.where((o["index"] >= 0) & (o["index"] < -(-m // opt.unit)), o["index"], -(-m // opt.unit))}
        listed, weight = tables.listed(used, tiled, n, m, h)
        weight = 0.0 if weight is None else weight
        if o.get("pos") is not None:
            offset = jnp.arange(m) % opt.unit
            angle = tables.listed(used | {"log_weight": o["pos"].astype(jnp.float32)}, tiled, n, m, h)[1] + offset
    if o.get("k_rope") is not None:
        angle = angle + _per_head(o["k_rope"].astype(jnp.float32), h)[:, :, None]
    if o.get("freqs") is not None:
        angle = jnp.broadcast_to(jnp.asarray(angle, jnp.float32), (b, h, n, m))
        k = _complex(k, jax.lax.stop_gradient(o["freqs"]), angle, opt.rope_layout, opt.rope_scale)
    s = jnp.einsum("bnhd,bhnmd->bhnm", q.astype(acc), k, precision="highest") * opt.scale + weight
    if o.get("key_bias") is not None:
        s = s + _per_head(jnp.moveaxis(o["key_bias"], 2, 1), h)[:, :, None]
    s = jnp.where(odd[:, :, None], jnp.nan, s)
    seen = jnp.broadcast_to(listed, s.shape)
    if o.get("k_valid") is not None:
        seen = seen & _per_head(o["k_valid"], h)[:, :, None]
    if opt.mask is not None:
        qf = {name: _per_head(x, h)[..., :, None] for name, x in o["q_fields"].items()}
        kf = {name: _per_head(x, h)[..., None, :] for name, x in o["k_fields"].items()}
        seen = seen & opt.mask.test(qf, kf)
    s = jnp.where(seen, s, -jnp.inf)
    top = jnp.max(s, -1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0.0) - top), 0.0)
    mass = p.sum(-1, keepdims=True)
    some = mass != 0
    p = p / jnp.where(some, mass, 1.0)
    lse = jnp.where(some, jnp.log(jnp.where(some, mass, 1.0)) + top, -jnp.inf)
    out = jnp.einsum("bhnm,bhme->bnhe", p, jnp.broadcast_to(v, (b, *v.shape[1:])), precision="highest")
    return out.astype(o["v"].dtype), jnp.moveaxis(lse[..., 0], 1, 2), _in_list_order(o, opt, p)


def _in_list_order(o: dict, opt, p):
    """[B, H, N, M] probabilities -> [B, G|H, N, K * unit] of the listed keys."""
    if opt.sums is None:
        return None
    p = jax.lax.stop_gradient(p)
    (b, h, n, m), g = p.shape, o["k"].shape[2]
    if o.get("index") is not None:
        key, live = lists.slots(o["index"], o["count"], opt.unit, m)
        spread = lambda x: jnp.broadcast_to(jnp.repeat(x, h // x.shape[1], axis=1), (b, h, n, x.shape[-1]))  # noqa: E731
        p = jnp.where(spread(live), jnp.take_along_axis(p, spread(key), axis=-1), 0.0)
    return p if opt.sums == "heads" else p.reshape(b, g, h // g, n, -1).sum(2)
