"""The recurrence, one token at a time: the documentation of the kernel, and its oracle in tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._mesh import Dims


def step(state, q, k, v, log_decay=None, scale: float = 1.0):
    """One token. state [B, H, F, Dv], q [B, H, F], k [B, G, F], v [B, G', Dv], log_decay None, [H], [B|1, H] or
    [B|1, H, F]. Returns (out [B, H, Dv] in v's dtype, the new state)."""
    heads, dtype = q.shape[1], state.dtype
    if log_decay is not None:
        decay = jnp.exp(floored(jnp.asarray(log_decay, dtype)))
        decay = decay if decay.ndim > 1 else decay[None]
        state = state * decay.reshape(decay.shape + (1,) * (4 - decay.ndim))
    k, wide = (repeated(x, heads, 1).astype(dtype) for x in (k, v))
    state = state + k[..., :, None] * wide[..., None, :]
    out = jnp.einsum("bhf,bhfe->bhe", q.astype(dtype) * scale, state)
    return out.astype(v.dtype), state


def linear(o: dict, opt):
    q, log_decay = o["q"], o.get("log_decay")
    state = initial(o)
    per_token = log_decay is not None and log_decay.ndim > 1

    def body(state, x):
        q, k, v, d = x
        out, state = step(state, q, k, v, d if per_token else log_decay, opt.scale)
        return state, out

    xs = tuple(jnp.moveaxis(x, 1, 0) for x in (q, o["k"], o["v"]))
    state, out = jax.lax.scan(body, state, (*xs, jnp.moveaxis(log_decay, 1, 0) if per_token else None))
    return jnp.moveaxis(out, 0, 1), state


def dims(o: dict) -> Dims:
    """What the dimensions of the operands and outputs are called, for a mesh: a recurrence is not cut over time."""
    rows, state = ("batch", None, "heads", None), ("batch", "heads", None, None)
    names = {"q": rows, "k": rows, "v": rows, "state": state}
    if "log_decay" in o:
        names["log_decay"] = ("heads",) if o["log_decay"].ndim == 1 else rows[: o["log_decay"].ndim]
    return Dims({x: names[x] for x in o}, (rows, state))


def initial(o: dict):
    """The state before the first token, in the dtype that sums are kept in."""
    q, v = o["q"], o["v"]
    dtype = accumulator(q, o["k"], v)
    if o.get("state") is not None:
        return o["state"].astype(dtype)
    return jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype)


def accumulator(*arrays):
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))


def floored(log_decay):
    """exp of the floor is exactly 0, so results do not change; sums of it stay finite (-inf - -inf is NaN)."""
    return jnp.maximum(log_decay, -120.0 if log_decay.dtype == jnp.float32 else -800.0)


def repeated(x, heads: int, axis: int = 2):
    """Every head of ``axis`` as often as it takes to have ``heads`` of them."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)
