"""What the fast bodies share: chunks of rows, the tables of a chunk, the derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gather import lists
from pallas_kernels.gather.lists import Shape


class Body(NamedTuple):
    """The kernels of one backend, over one chunk of rows.

    ``rows``: {"q" [b, g, r, rows, tile, D], "index" [b', g', r', rows, K], "count", "usable", "add", "turn", "freqs"}, all
    but q where there are any, and for the gradient "do", "lse" and "delta". ``keys(o, opt, s)``: what is read of k and v, made
    once. ``forward(s, opt, rows, keys)`` -> (out, lse, logits in list order or None). ``backward(s, opt, rows, keys,
    totals, wants)`` -> (dq, gradient of add where wanted, totals); ``zeros(o, opt, s)`` makes totals and
    ``finish(o, s, totals)`` turns them into dk, dv. ``tables``: entries that are not in use are hidden by the table.
    """

    keys: Callable
    forward: Callable
    backward: Callable
    zeros: Callable
    finish: Callable
    rows_at_once: Callable
    tables: bool


FLOATS = ("q", "k", "v", "key_bias", "log_weight")
WEIGHTS = ("key_bias", "log_weight")  # floats that reach the logits through the table of additions


def divide(o: dict) -> tuple[dict, dict]:
    """Operands as (differentiable, other) dicts."""
    return {k: x for k, x in o.items() if k in FLOATS and x is not None}, {
        k: x for k, x in o.items() if k not in FLOATS and x is not None
    }


def _rows(o: dict, opt, s: Shape, body: Body, add) -> dict:
    rows = {"q": lists.arrange(o["q"], s), "add": add, "turn": lists.turns(o, s)}
    if not s.full:
        rows |= {"index": lists.heads(o["index"], s), "count": jnp.clip(lists.heads(o["count"], s), 0, s.entries)}
        if o.get("k_valid") is not None or o.get("bounds") is not None:
            rows["usable"] = lists.usable(o, s)
    if rows["turn"] is not None:
        rows["freqs"] = o["freqs"]
    return {name: x for name, x in rows.items() if x is not None}


def _chunks(o: dict, opt, body: Body):
    """(shape of a chunk, operands cut into chunks or None where one chunk holds everything, chunk -> operands)."""
    s = lists.shape_of(o, opt)
    size = lists.rows_per_chunk(o, opt, s, body.rows_at_once(o, opt, s))
    if size == s.n:
        return s, None
    return s, lists.chunked(o, s, size)


def _forward(o: dict, opt, body: Body):
    s, cut = _chunks(o, opt, body)
    keys = body.keys(o, opt, s)

    def one(part: dict):
        here = o | part
        c = lists.shape_of(here, opt)
        add = lists.additions(here, opt, c, lists=body.tables)
        out, lse, logits = body.forward(c, opt, _rows(here, opt, c, body, add), keys)
        found = {"out": lists.restore(out, c).astype(o["v"].dtype), "lse": lists.restore(lse, c)}
        if opt.sums is not None:
            some = lse != -jnp.inf
            p = jnp.where(some[..., None], jnp.exp(logits - jnp.where(some, lse, 0.0)[..., None]), 0.0)
            p = p.sum(2, keepdims=True) if opt.sums == "kv" else p
            found["sums"] = p.reshape(s.b, -1, c.n, s.length)
        return found

    if cut is None:
        found = one({})
    else:
        found = lax.map(one, cut)
        found = {name: lists.together(x, s, 2 if name == "sums" else 1) for name, x in found.items()}
    return found["out"], found["lse"], found.get("sums")


def _backward(o: dict, opt, body: Body, out, lse, d_out, d_lse):
    acc = lse.dtype
    o = o | {"do": d_out, "out": out, "lse": lse, "d_lse": d_lse}
    s, cut = _chunks(o, opt, body)
    keys = body.keys(o, opt, s)
    weights = [name for name in WEIGHTS if name in o]
    by_row = ["q", *(name for name in weights if name == "log_weight" and s.rows > 1)]

    def one(totals, part: dict):
        here = o | part
        c = lists.shape_of(here, opt)
        table = lambda w: lists.additions(here | w, opt, c, lists=body.tables)  # noqa: E731
        add, pull = jax.vjp(table, {name: here[name] for name in weights})
        delta = jnp.sum(here["do"].astype(acc) * here["out"].astype(acc), -1)
        some = here["lse"] != -jnp.inf  # a row that sees nothing has no visible key: a finite stand-in is enough
        sums = {"lse": jnp.where(some, here["lse"], 0.0), "delta": delta - jnp.where(some, here["d_lse"], 0.0)}
        rows = _rows(here, opt, c, body, add) | {x: lists.arrange(a, c) for x, a in {"do": here["do"], **sums}.items()}
        dq, d_add, totals["keys"] = body.backward(c, opt, rows, keys, totals["keys"], bool(weights))
        grads = {"q": lists.restore(dq, c).astype(here["q"].dtype)}
        if weights:
            grads |= pull(d_add.astype(add.dtype))[0]
        for name in totals:
            if name != "keys":
                totals[name] = totals[name] + grads[name].astype(acc)
        return totals, {name: grads[name] for name in by_row}

    totals = {"keys": body.zeros(o, opt, s)} | {x: jnp.zeros(o[x].shape, acc) for x in weights if x not in by_row}
    if cut is None:
        totals, grads = one(totals, {})
    else:
        totals, grads = lax.scan(lambda t, part: one(dict(t), part), totals, cut)
        grads = {name: lists.together(x, s, 1 if name == "q" else 2) for name, x in grads.items()}
    dk, dv = body.finish(o, s, totals.pop("keys"))
    return grads | totals | {"k": dk, "v": dv}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gather(floats: dict, ints: dict, opt, body: Body):
    return _forward(floats | ints, opt, body)


def _fwd(floats, ints, opt, body):
    out, lse, sums = _forward(floats | ints, opt, body)
    return (out, lse, sums), (floats, ints, out, lse)


def _bwd(opt, body, saved, cotangents):
    floats, ints, out, lse = saved
    grads = _backward(floats | ints, opt, body, out, lse, *cotangents[:2])
    return {name: grads[name].astype(x.dtype) for name, x in floats.items()}, None


_gather.defvjp(_fwd, _bwd)


def run(body: Body, o: dict, opt):
    return _gather(*divide(o), opt, body)


def heads_first(x):
    """[b, M, G, D] -> [b, G, M, D]."""
    return jnp.moveaxis(x, 2, 1)
