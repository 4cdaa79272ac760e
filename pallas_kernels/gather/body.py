"""What the fast bodies share: the parts of a call, the tables of a part, the derivative."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mesh import varying
from pallas_kernels.gather import lists
from pallas_kernels.gather.lists import Shape

ALONE = 4096  # lists from which on those of one kv head are work enough for a chip


class Body(NamedTuple):
    """The kernels of one backend, over one part of the rows.

    ``rows``: {"q" [b, g, r, rows, tile, D], "index" [b', g', r', rows, K], "count", "usable", "add", "turn", "freqs"}, all
    but q where there are any, and for the gradient "do", "lse" and "delta". ``keys(o, opt, s)``: what is read of k and v, made
    once. ``forward(s, opt, rows, keys)`` -> (out, lse, logits in list order or None). ``backward(s, opt, rows, keys,
    totals, wants)`` -> (dq, gradient of add where wanted, totals); ``zeros(o, opt, s)`` makes totals and
    ``finish(o, s, totals)`` turns them into dk, dv. ``tables``: entries that are not in use are hidden by the table.
    ``by_head``: many lists are computed one kv head after another, because keys are arranged and their gradients summed up
    beside k and v, and the arrays of one head are small; else heads stay an axis, which a mesh may cut.
    """

    keys: Callable
    forward: Callable
    backward: Callable
    zeros: Callable
    finish: Callable
    rows_at_once: Callable
    tables: bool
    by_head: bool


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


def _over_parts(o: dict, opt, body: Body, of_heads, totals):
    """Fold over the parts of a call: ``of_heads(part, its operands of keys, totals) -> (step, its state, finish)`` for the
    heads of a part, ``step(part, its operands, new, state) -> state`` for its rows, ``finish(state) -> totals``. ``new``
    bool [rows]: the last part reaches back where parts do not divide the rows; None where all are."""
    s = lists.shape_of(o, opt)
    size = lists.rows_per_part(o, opt, s, body.rows_at_once(o, opt, s))
    heads = 1 if body.by_head and s.rows >= ALONE else s.g
    parts = -(-s.n // size)

    def loop(n: int, f, init):
        return f(0, init) if n == 1 else lax.fori_loop(0, n, f, init)

    def one(i, totals):
        part = lists.Part(s, 0, s.n, i * heads, heads)
        here = o | part.of_keys(o)
        step, state, finish = of_heads(part, here, totals)

        def rows(j, state):
            some = dataclasses.replace(part, start=jnp.minimum(j * size, s.n - size) if parts > 1 else 0, size=size)
            new = some.new(j * size) if s.n % size else None
            return step(some, here | some.of_rows(o), new, state)

        return finish(loop(parts, rows, state))

    return loop(s.g // heads, one, totals)


def _forward(o: dict, opt, body: Body):
    s = lists.shape_of(o, opt)
    acc = jnp.promote_types(o["q"].dtype, jnp.float32)
    found = {"out": jnp.zeros((s.b, s.n, s.h, s.dv), o["v"].dtype), "lse": jnp.zeros((s.b, s.n, s.h), acc)}
    if opt.sums is not None:
        found["sums"] = jnp.zeros((s.b, s.g if opt.sums == "kv" else s.h, s.n, s.length), acc)

    def of_heads(part, here: dict, found: dict):
        return functools.partial(of_rows, body.keys(here, opt, part.shape)), found, lambda found: found

    def of_rows(keys, part, here: dict, new, found: dict):
        c = lists.shape_of(here, opt)
        add = lists.additions(here, opt, c, lists=body.tables)
        out, lse, logits = body.forward(c, opt, _rows(here, opt, c, body, add), keys)
        more = {"out": (lists.restore(out, c), 1, 2), "lse": (lists.restore(lse, c), 1, 2)}
        if opt.sums is not None:
            some = lse != -jnp.inf
            p = jnp.where(some[..., None], jnp.exp(logits - jnp.where(some, lse, 0.0)[..., None]), 0.0)
            p = p.sum(2, keepdims=True) if opt.sums == "kv" else p
            more["sums"] = p.reshape(c.b, -1, c.n, c.length), 2, 1
        return {x: part.put(found[x], *more[x]) for x in found}

    found = _over_parts(o, opt, body, of_heads, varying(found, o))
    return found["out"], found["lse"], found.get("sums")


def _backward(o: dict, opt, body: Body, out, lse, d_out, d_lse):
    s, acc = lists.shape_of(o, opt), lse.dtype
    some = lse != -jnp.inf  # a row that sees nothing has no visible key: a finite stand-in is enough
    delta = jnp.sum(d_out.astype(acc) * out.astype(acc), -1) - jnp.where(some, d_lse, 0.0)
    o = o | {"do": d_out, "lse": jnp.where(some, lse, 0.0), "delta": delta}
    weights = [name for name in WEIGHTS if name in o]
    axes = {"q": (1, 2), "k": (None, 2), "v": (None, 2), "key_bias": (None, 2), "log_weight": (2 if s.rows > 1 else None, 1)}
    # Sums over rows and heads stay float32 until the end; what a part alone knows is rounded at once.
    grads = {x: jnp.zeros(o[x].shape, acc if x in weights else o[x].dtype) for x in ("q", "k", "v", *weights)}

    def of_heads(part, here: dict, grads: dict):
        state = {"grads": grads, "keys": varying(body.zeros(here, opt, part.shape), o)}

        def finish(state: dict) -> dict:
            found = dict(zip("kv", body.finish(here, part.shape, state["keys"]), strict=True))
            return state["grads"] | {x: part.put(state["grads"][x], found[x], *axes[x]) for x in found}

        return functools.partial(of_rows, body.keys(here, opt, part.shape)), state, finish

    def of_rows(keys, part, here: dict, new, state: dict):
        c = lists.shape_of(here, opt)
        if new is not None:
            here |= {x: jnp.where(new.reshape(-1, *[1] * (here[x].ndim - 2)), here[x], 0) for x in ("do", "delta")}
        table = lambda w: lists.additions(here | w, opt, c, lists=body.tables)  # noqa: E731
        add, pull = jax.vjp(table, {name: here[name] for name in weights})
        rows = _rows(here, opt, c, body, add) | {x: lists.arrange(here[x], c) for x in ("do", "lse", "delta")}
        dq, d_add, totals = body.backward(c, opt, rows, keys, state["keys"], bool(weights))
        more = {"q": lists.restore(dq, c)} | (pull(d_add.astype(add.dtype))[0] if weights else {})
        grads = {x: part.put(state["grads"][x], more[x], *axes[x], add=True) for x in more}
        return {"grads": state["grads"] | grads, "keys": totals}

    return _over_parts(o, opt, body, of_heads, varying(grads, o))


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
