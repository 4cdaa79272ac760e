"""The fast path in plain XLA: listed units are fetched a few thousand keys at a time, every key is read where it lies.

Batch and heads stay array dimensions, so a sharded batch or head axis stays sharded. Loops stop at the longest list.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash import xla as tiles
from pallas_kernels.gather import lists, rotary
from pallas_kernels.gather.body import Body, heads_first, run
from pallas_kernels.gather.lists import Shape

KEYS = 4096  # listed keys of a row per step
FETCHED = 2**21  # key channels fetched at a time: what fits in the caches of a core
QUERIES = 16  # rows that read every key together
CUT = 4096, 1024  # keys of a part of the full length, at best and at least


def _units(o: dict, name: str, s: Shape):
    """[bk, g, units, unit, D]."""
    x = heads_first(o[name])
    if s.full:
        return x
    pad = s.units * s.unit - s.m
    x = jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) if pad else x
    return x.reshape(*x.shape[:2], s.units, s.unit, x.shape[3])


def _keys(o: dict, opt, s: Shape) -> dict:
    return {name: _units(o, name, s) for name in ("k", "v")}


def _rows_at_once(o: dict, opt, s: Shape) -> int:
    if s.rows == 1:
        return QUERIES if s.full else 0
    width = min(s.length, KEYS) * (s.d + s.dv) * s.b * max(s.g, o["index"].shape[1])
    return max(1, FETCHED // width)


def _dot(spec: str, a, b, acc):
    return jnp.einsum(spec, a, b, preferred_element_type=acc)


def _fetch(x, index, usable, s: Shape):
    """[bk, g, units, unit, D] at [b', g', r', rows, c] -> [b, g, r'', rows, c * unit, D], 0 where nothing is to be used:
    what an invalid slot holds, NaN too, goes nowhere."""
    found = tiles._fetch(x[:, :, None], jnp.clip(index, 0, s.units - 1).reshape(*index.shape[:3], -1))
    found = found.reshape(*found.shape[:3], index.shape[3], -1, x.shape[-1])
    return found if usable is None else jnp.where(usable[..., None], found, 0)


def _fetched(s: Shape, opt, rows: dict, keys: dict, listed):
    """(k, v, odd or None) of some entries."""
    k, v = (_fetch(keys[x], *listed, s) for x in ("k", "v"))
    return lists.clean(k, v) if _hides(s, opt, rows) else (k, v, None)


def _put(total, index, grad, s: Shape):
    """Add ``grad`` (shaped as ``_fetch`` returned it) to the listed units of ``total``."""
    index = jnp.clip(index, 0, s.units - 1).reshape(*index.shape[:3], -1)
    grad = grad.reshape(*grad.shape[:3], -1, s.unit, grad.shape[-1])
    if total.shape[0] == 1 and grad.shape[0] > 1:  # a pool: the lists of all batch rows are one
        index = jnp.broadcast_to(index, (grad.shape[0], *index.shape[1:]))
        index, grad = (jnp.moveaxis(x, 0, 2).reshape(1, *x.shape[1:3], -1, *x.shape[4:]) for x in (index, grad))
    return tiles._put(total[:, :, None], index, grad)[:, :, 0]


def _hides(s: Shape, opt, rows: dict) -> bool:
    """Whether keys that were fetched may be hidden from a row; what no row may read of a list is not fetched."""
    return "add" in rows and (s.full or opt.mask is not None)


def _logits(q, k, add, turn, freqs, opt, acc, odd=None):
    """[b, g, r, rows, tile, L]. ``odd`` [b, g, 1|r, rows, L] of ``lists.clean``, where keys may be hidden."""
    if turn is not None:
        k = rotary.turn(k, turn, freqs, opt.rope_layout, opt.rope_scale)
    s = _dot("bgrqtd,bgxqld->bgrqtl" if k.shape[2] == 1 else "bgrqtd,bgrqld->bgrqtl", q, k, acc) * opt.scale
    if add is None:
        return s
    return s + add.astype(acc) if odd is None else lists.added(s, add.astype(acc), odd[:, :, :, :, None])


def _weighted(p, v, acc):
    return _dot("bgrqtl,bgxqld->bgrqtd" if v.shape[2] == 1 else "bgrqtl,bgrqld->bgrqtd", p.astype(v.dtype), v, acc)


def _steps(s: Shape, rows: dict):
    """Entries per step and how many steps the longest list takes, as (step, static limit, dynamic number)."""
    step = max(1, min(s.entries, KEYS // s.unit))
    limit = -(-s.entries // step)
    return step, limit, (rows["count"].max() + step - 1) // step


def _padded(rows: dict, s: Shape, step: int) -> dict:
    """Lists, additions and turns filled up to whole steps."""
    extra = -s.entries % step
    pad = lambda x, n, value: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n)], constant_values=value)  # noqa: E731
    out = dict(rows)
    if extra:
        out |= {"index": pad(rows["index"], extra, 0), "add": pad(rows["add"], extra * s.unit, -jnp.inf)}
        out |= {"usable": pad(rows["usable"], extra * s.unit, False)} if "usable" in rows else {}
        out |= {"turn": pad(rows["turn"], extra * s.unit, 0.0)} if "turn" in rows else {}
    return out


def _over_steps(s: Shape, rows: dict, body, carry):
    """Fold ``body(first entry, (index, usable), add, turn, carry)`` over the lists."""
    step, limit, number = _steps(s, rows)
    rows = _padded(rows, s, step)

    def one(j, carry):
        cut = lambda x, size: lax.dynamic_slice_in_dim(x, j * size, size, x.ndim - 1)  # noqa: E731
        turn = cut(rows["turn"], step * s.unit) if "turn" in rows else None
        listed = cut(rows["index"], step), cut(rows["usable"], step * s.unit) if "usable" in rows else None
        return body(j * step, listed, cut(rows["add"], step * s.unit), turn, carry)

    return one(0, carry) if limit == 1 else lax.fori_loop(0, number, one, carry)


def _finish(top, mass, total):
    some = mass != 0
    safe = jnp.where(some, mass, 1.0)
    lse = jnp.where(some, jnp.where(some, top, 0.0) + jnp.log(safe), -jnp.inf)
    return total / safe[..., None], lse


def _softmax(x):
    """(largest, where finite; exponentials; their sum) of the last axis."""
    top = x.max(-1)
    e = jnp.exp(x - jnp.where(top > -jnp.inf, top, 0.0)[..., None])
    return top, e, e.sum(-1)


def _forward(s: Shape, opt, rows: dict, keys: dict):
    q = rows["q"]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    if s.full:
        return _forward_full(s, opt, rows, keys, acc)
    logits_of = functools.partial(_logits, freqs=rows.get("freqs"), opt=opt, acc=acc)

    def body(first, listed, add, turn, carry):
        top, mass, total, logits = carry
        k, v, odd = _fetched(s, opt, rows, keys, listed)
        x = logits_of(q, k, add, turn, odd=odd)
        new_top, e, new_mass = _softmax(x)
        new = jnp.maximum(top, new_top)
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        old, fresh = jnp.exp(top - safe), jnp.exp(new_top - safe)
        out = _weighted(e, v, acc)
        if logits is not None:
            logits = lax.dynamic_update_slice_in_dim(logits, x, first * s.unit, 5)
        return new, mass * old + new_mass * fresh, total * old[..., None] + out * fresh[..., None], logits

    shape = q.shape[:-1]
    step = _steps(s, rows)[0]
    logits = jnp.full((*shape, -(-s.entries // step) * step * s.unit), -jnp.inf, acc) if opt.sums else None
    init = jnp.full(shape, -jnp.inf, acc), jnp.zeros(shape, acc), jnp.zeros((*shape, s.dv), acc), logits
    top, mass, total, logits = _over_steps(s, rows, body, init)
    return *_finish(top, mass, total), None if logits is None else logits[..., : s.length]


def _parts(s: Shape) -> int:
    """Into how many parts every key is divided: their products run side by side, and no part is padded."""
    most = max(1, s.m // CUT[0])
    return next((c for c in range(most, max(1, s.m // CUT[1]) + 1) if s.m % c == 0), 1)


def _forward_full(s: Shape, opt, rows: dict, keys: dict, acc):
    k, v = keys["k"], keys["v"]
    if not _hides(s, opt, rows):
        return _every_key(s, opt, rows, k, v, False, acc)
    finite = jnp.isfinite(k).all() & jnp.isfinite(v).all()  # a look is cheaper than cleaned copies, which few calls need
    plain = lambda: _every_key(s, opt, rows, k, v, False, acc)  # noqa: E731
    return lax.cond(finite, plain, lambda: _every_key(s, opt, rows, *lists.clean(k, v), acc))


def _every_key(s: Shape, opt, rows: dict, k, v, odd, acc):
    """``odd`` of ``lists.clean``, or False."""
    c = _parts(s)
    cut = lambda x: x.reshape(*x.shape[:2], c, s.m // c, x.shape[3])  # noqa: E731
    by_part = lambda x: x.reshape(*x.shape[:-1], c, s.m // c)  # noqa: E731
    q = rows["q"][:, :, :, 0]  # [b, g, r, t, D]
    k, v = cut(k), cut(v)
    if "turn" in rows:
        angle = by_part(rows["turn"][:, :, 0, 0])
        k = rotary.turn(k, angle, rows["freqs"], opt.rope_layout, opt.rope_scale)
    x = _dot("bgrtd,bgcld->bgcrtl", q, k, acc) * opt.scale
    if "add" in rows:
        add = by_part(rows["add"][:, :, :, 0])  # [b', g', r', t', c, l]
        odd = odd if odd is False else odd.reshape(*odd.shape[:2], c, s.m // c)[:, :, :, None, None]
        x = lists.added(x, jnp.moveaxis(add, 4, 2).astype(acc), odd)
    top, e, mass = _softmax(x)
    total = _dot("bgcrtl,bgcld->bgcrtd", e.astype(v.dtype), v, acc)
    best = top.max(2, keepdims=True)
    share = jnp.exp(top - jnp.where(best > -jnp.inf, best, 0.0))
    out, lse = _finish(best[:, :, 0], (mass * share).sum(2), (total * share[..., None]).sum(2))
    logits = None
    if opt.sums is not None:
        logits = jnp.moveaxis(x, 2, 4).reshape(*q.shape[:4], s.m)[:, :, :, None]
    return out[:, :, :, None], lse[:, :, :, None], logits


# ------------------------------------------------------------------------------------------------------------ backward


def _zeros(o: dict, opt, s: Shape) -> dict:
    acc = jnp.promote_types(o["q"].dtype, jnp.float32)
    bk = o["k"].shape[0]
    if s.full:
        return {x: jnp.zeros((bk, s.g, s.m, w), acc) for x, w in (("k", s.d), ("v", s.dv))}
    return {x: jnp.zeros((bk, s.g, s.units, s.unit, w), acc) for x, w in (("k", s.d), ("v", s.dv))}


def _finish_totals(o: dict, s: Shape, totals: dict):
    flat = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, : s.m]  # noqa: E731
    return tuple(jnp.moveaxis(flat(totals[x]), 1, 2) for x in ("k", "v"))


def _gradient(s: Shape, opt, rows: dict, k, v, odd, add, turn, acc):
    """Gradients of q, k, v and the additions of some listed keys."""
    f = functools.partial(_logits, turn=turn, freqs=rows.get("freqs"), opt=opt, acc=acc, odd=odd)
    x, pull = jax.vjp(f, rows["q"], k, add) if add is not None else jax.vjp(lambda q, k: f(q, k, None), rows["q"], k)
    hidden = x == -jnp.inf  # selected after the arithmetic: what a hidden pair holds, NaN too, goes nowhere
    p = jnp.where(hidden, 0.0, jnp.exp(x - rows["lse"][..., None]))
    shared = v.shape[2] == 1
    dp = _dot("bgrqtd,bgxqld->bgrqtl" if shared else "bgrqtd,bgrqld->bgrqtl", rows["do"], v, acc)
    ds = jnp.where(hidden, 0.0, p * (dp - rows["delta"][..., None]))
    dq, dk, *d_add = pull(ds.astype(x.dtype))
    _, pull_v = jax.vjp(lambda v: _weighted(p, v, acc), v)
    return dq.astype(acc), dk, pull_v(rows["do"].astype(acc))[0], d_add[0] if d_add else None


def _backward(s: Shape, opt, rows: dict, keys: dict, totals: dict, wants: bool):
    acc = totals["k"].dtype
    if s.full:
        k, v, odd = keys["k"][:, :, None, None], keys["v"][:, :, None, None], None
        if _hides(s, opt, rows):
            k, v, odd = lists.clean(k, v)
        dq, dk, dv, d_add = _gradient(s, opt, rows, k, v, odd, rows.get("add"), rows.get("turn"), acc)
        totals = {"k": totals["k"] + dk[:, :, 0, 0].astype(acc), "v": totals["v"] + dv[:, :, 0, 0].astype(acc)}
        return dq, d_add, totals

    def body(first, listed, add, turn, carry):
        dq, d_add, totals = carry
        k, v, odd = _fetched(s, opt, rows, keys, listed)
        more, dk, dv, d = _gradient(s, opt, rows, k, v, odd, add, turn, acc)
        totals = {x: _put(totals[x], listed[0], g.astype(acc), s) for x, g in (("k", dk), ("v", dv))}
        if wants:
            d_add = lax.dynamic_update_slice_in_dim(d_add, d.astype(acc), first * s.unit, 5)
        return dq + more, d_add, totals

    step = _steps(s, rows)[0]
    d_add = None
    if wants:
        d_add = jnp.zeros((*rows["add"].shape[:5], -(-s.entries // step) * step * s.unit), acc)
    dq, d_add, totals = _over_steps(s, rows, body, (jnp.zeros(rows["q"].shape, acc), d_add, totals))
    return dq, None if d_add is None else d_add[..., : s.length], totals


BODY = Body(_keys, _forward, _backward, _zeros, _finish_totals, _rows_at_once, True, False)


def gather(o: dict, opt):
    return run(BODY, o, opt)
