"""What the accelerator bodies share: operands into their layout, the derivative, what they refuse."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._vmap import folding
from pallas_kernels.linear import decays
from pallas_kernels.linear.reference import floored, repeated


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one call. ``kv``: heads of keys and values after those of the fewer are repeated. A program works
    on ``pack`` of them, each with ``r`` query heads. Arrays are [B, heads, N, width] with ``heads_first``, else
    [B, N, heads, width]; N and the widths are padded with zeros, which leave the state as it is."""

    b: int
    n: int
    h: int
    kv: int
    r: int
    pack: int
    f: int
    dv: int
    chunk: int
    f_pad: int
    dv_pad: int
    decay: str | None
    scale: float
    float32: bool
    heads_first: bool

    @property
    def chunks(self) -> int:
        return -(-self.n // self.chunk)

    @property
    def groups(self) -> int:
        """Pairs of a kv head and ``r`` query heads: gradients of keys and values come one of each."""
        return self.h // self.r

    @property
    def rows(self) -> int:
        return self.chunks * self.chunk


class Body(NamedTuple):
    """A set of kernels. ``unsupported(o, opt)``: what it cannot do with a call, or None. ``plan(o, opt)``.
    ``forward(p, x, interpret)`` -> {out, end} for arranged operands x. ``backward(p, x, interpret)`` -> {dq, dk, dv, d_state}
    and dd if there are decays, with "do" and "d_end" in x. States are [B, H, Dv, F]."""

    name: str
    unsupported: Callable
    plan: Callable
    forward: Callable
    backward: Callable


def plan(o: dict, opt, *, chunks: dict, most: int | None, pad_width, heads_first: bool) -> Plan:
    """``chunks``: {kind of decay: sizes of a chunk, ascending}; ``most``: query heads of a program that works on several
    kv heads, None for one that works on one and all its query heads."""
    (b, n, h, f), dv = o["q"].shape, o["v"].shape[3]
    kv = math.lcm(o["k"].shape[2], o["v"].shape[2])
    kind = decay_kind(o)
    sizes = chunks[kind]
    wanted = min(opt.chunk or sizes[-1], n)
    chunk = next((x for x in sizes if x >= wanted), sizes[-1])
    all_of = h // kv
    r = all_of if most is None else max(x for x in range(1, most + 1) if all_of % x == 0)
    pack = 1 if most is None or r < all_of else max(x for x in range(1, most // r + 1) if kv % x == 0)
    return Plan(b, n, h, kv, r, pack, f, dv, chunk, pad_width(f), pad_width(dv), kind, opt.scale,
                o["q"].dtype == jnp.float32, heads_first)  # fmt: skip


def decay_kind(o: dict) -> str | None:
    d = o.get("log_decay")
    return None if d is None else "channel" if d.ndim == 4 else "token"


def rows_of(p: Plan, x, width: int):
    """[b, N, heads, E] in the layout of the kernels."""
    x = jnp.pad(x, [(0, 0), (0, p.rows - p.n), (0, 0), (0, width - x.shape[3])])
    return jnp.swapaxes(x, 1, 2) if p.heads_first else x


def from_rows(p: Plan, x, width: int):
    return (jnp.swapaxes(x, 1, 2) if p.heads_first else x)[:, : p.n, :, :width]


def states_of(p: Plan, x):
    """[B, H, F, Dv] -> [B, H, dv_pad, f_pad]."""
    pad = [(0, 0), (0, 0), (0, p.dv_pad - p.dv), (0, p.f_pad - p.f)]
    return jnp.pad(jnp.swapaxes(x.astype(jnp.float32), 2, 3), pad)


def from_states(p: Plan, x):
    return jnp.swapaxes(x[:, :, : p.dv, : p.f], 2, 3)


def arrange(p: Plan, o: dict) -> dict:
    """The operands in the layout of the kernels. A decay is "d": [b, H, N] per token (and per head), like q per channel, -inf
    and all."""
    out = {"q": rows_of(p, o["q"], p.f_pad)}
    for x, width in (("k", p.f_pad), ("v", p.dv_pad)):
        out[x] = rows_of(p, repeated(o[x], p.kv), width)
    if p.decay:
        d = o["log_decay"].astype(jnp.float32)
        if p.decay == "channel":
            out["d"] = rows_of(p, d, p.f_pad)
        else:
            d = jnp.broadcast_to(d[:, None], (p.h, p.n))[None] if d.ndim == 1 else jnp.swapaxes(d, 1, 2)
            out["d"] = jnp.pad(d, [(0, 0), (0, 0), (0, p.rows - p.n)])
    if o.get("state") is not None:
        out["state"] = states_of(p, o["state"])
    else:
        out["state"] = jnp.zeros((p.b, p.h, p.dv_pad, p.f_pad), jnp.float32)
    return out


def _ready(p: Plan, x: dict) -> dict:
    """Decays per token as their running sums in each chunk, [b, H, 2, N]."""
    if p.decay != "token":
        return x
    d = floored(x["d"])
    sums = decays.running(d.reshape(*d.shape[:2], p.chunks, p.chunk))
    return x | {"d": jnp.stack([s.reshape(d.shape) for s in sums], 2)}


def _fold(call, p: Plan, interpret):
    return folding(lambda b, x: call(dataclasses.replace(p, b=b), x, interpret), p.b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _linear(floats: dict, opt, body: Body, interpret):
    p = body.plan(floats, opt)
    found = _fold(body.forward, p, interpret)(_ready(p, arrange(p, floats)))
    return from_rows(p, found["out"], p.dv), from_states(p, found["end"])


def _fwd(floats, opt, body, interpret):
    out, end = _linear(floats, opt, body, interpret)
    return (out, end), (floats, end)


def _bwd(opt, body, interpret, saved, cotangents):
    floats, end = saved
    d_out, d_end = cotangents
    p = body.plan(floats, opt)
    arranged, pull = jax.vjp(functools.partial(arrange, p), floats)
    x = _ready(p, arranged) | {"do": rows_of(p, d_out, p.dv_pad), "d_end": states_of(p, d_end)}
    found = _fold(body.backward, p, interpret)(x)
    grads = {"q": found["dq"], "state": found["d_state"]}
    for name in ("k", "v"):  # a group of heads each: summed over those of a kv head
        axis = 1 if p.heads_first else 2
        d = found["d" + name]
        d = d.reshape(*d.shape[:axis], p.kv, p.groups // p.kv, *d.shape[axis + 1 :])
        grads[name] = d.sum(axis + 1, dtype=jnp.float32).astype(d.dtype) if p.groups > p.kv else d.squeeze(axis + 1)
    if p.decay:
        # Every decay also scales what the last state holds of it; the kernels sum what the outputs say.
        last = jnp.sum(end * d_end.astype(end.dtype), -1)
        if p.decay == "channel":
            last = jnp.pad(last, [(0, 0), (0, 0), (0, p.f_pad - p.f)])
            dd = found["dd"] + jnp.expand_dims(last, 2 if p.heads_first else 1)
        else:
            dd = found["dd"] + last.sum(-1)[..., None]
        dd = jnp.where(floored(arranged["d"]) == arranged["d"], dd, 0.0)  # a state once forgotten is not forgotten more
        grads["d"] = dd if arranged["d"].shape[0] == p.b else dd.sum(0, keepdims=True)
    return pull(grads)


_linear.defvjp(_fwd, _bwd)


def run(body: Body, o: dict, opt, interpret):
    if (why := body.unsupported(o, opt)) is not None:
        raise ValueError(f"implementation: {body.name!r} does not support {why}")
    return _linear(o, opt, body, interpret)


def unsupported(o: dict) -> str | None:
    """What no body of accelerator kernels can do with this call, or None."""
    if o["q"].dtype not in (jnp.float32, jnp.bfloat16):
        return f"q of {o['q'].dtype}: expected float32 or bfloat16"
    for x in ("k", "v"):
        if o[x].dtype != o["q"].dtype:
            return f"{x} of {o[x].dtype} beside q of {o['q'].dtype}: expected one dtype"
    return "an empty sequence" if 0 in o["q"].shape else None
