"""Linear attention with decay: one recurrence, in chunks, step by step, or (not causal) as two products.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T          S: [F, Dv], kept in float32
    o_t = scale * q_t S_t

There is no normaliser. A denominator is one more column of values: `with_ones(v)` in, `row_correct` out.
The recurrence is the operation `pallas_kernels.linear`, in chunks after Lightning Attention-2 (arXiv:2401.04658), with
decays per head, token or channel.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import linear as op
from pallas_kernels.linear import reference
from pallas_kernels.linear.reference import accumulator, repeated


def linear_attend(
    q, k, v, *, log_decay=None, state=None, chunk=None, causal=True, scale=1.0, implementation=None
):
    """Linear attention over a sequence.

    Args:
        q: [B, N, H, F] (feature-mapped) queries.
        k: [B, N, G, F] keys, H a multiple of G.
        v: [B, N, G', Dv] values, H a multiple of G' (usually G' = G).
        log_decay: natural log of the factor on the state before token t is added: None (no decay), [H],
            [B|1, N, H] or [B|1, N, H, F]. Expected <= 0; -inf forgets everything before the token.
        state: [B, H, F, Dv] state before the first token; None is zeros.
        chunk: tokens per block of the recurrence, None for what suits the implementation. Changes speed and memory,
            not the result.
        causal: False lets every token see all tokens (and `state`); log_decay must then be None.
        scale: factor on the logits.
        implementation: None (choose) | "xla" (chunks) | "reference" (token by token) | "tpu" | "gpu" (kernels).

    Returns:
        out [B, N, H, Dv] in the dtype of v, and the state after the last token, [B, H, F, Dv], float32 or
        wider.

    Memory is linear in N, in the gradient too: one state per chunk is kept, the rest is recomputed.

    Raises:
        ValueError: for shapes that do not fit, a decay without causality, an unknown implementation or one that does
            not support the call.
    """
    _check(q, k, v, log_decay, state, causal)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected a positive number of tokens, got {chunk}")
    operands = {"q": q, "k": k, "v": v, "log_decay": log_decay, "state": state}
    operands = {name: jnp.asarray(x) for name, x in operands.items() if x is not None}
    if not causal:
        return _all_to_all(q, k, v, reference.initial(operands), scale)
    return op.linear(operands, op.Options(chunk, scale), implementation)


def linear_reference(q, k, v, *, log_decay=None, state=None, causal=True, scale=1.0):
    """The recurrence, one token at a time. Same arguments and results as `linear_attend`."""
    return linear_attend(
        q, k, v, log_decay=log_decay, state=state, causal=causal, scale=scale, implementation="reference"
    )


def linear_step(state, q1, k1, v1, log_decay1=None, *, scale=1.0):
    """One token of the recurrence, for decoding.

    Args:
        state: [B, H, F, Dv]. q1: [B, H, F]. k1: [B, G, F]. v1: [B, G', Dv].
        log_decay1: None, [H], [B|1, H] or [B|1, H, F].

    Returns:
        out [B, H, Dv] in the dtype of v1, and the new state.
    """
    return reference.step(state, q1, k1, v1, log_decay1, scale)


def with_ones(v):
    """Appends a column of ones to v: the last column of the output is then the sum of the weights."""
    return jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)


def row_correct(num, z, vbar=None, mode="divide", eps=None):
    """Turns unnormalised rows into the output of a linear attention: beta(z) * num - gamma(z) * vbar.

    Args:
        num: [B, N, H, Dv], sum_j s_ij v_j.
        z: [B, N, H], sum_j s_ij (the ones column).
        vbar: mean of the values, broadcastable to num; only read by "inline" and "mala".
        mode: "divide": num / z, rows with z = 0 give zeros;
            "inline": num + (1 - z) vbar (InLine, "Bridging the Divide", NeurIPS 2024);
            "mala": (1 + 1/z) num - z vbar (arXiv:2507.00698);
            "none": num.
        eps: added to z where it divides; default 0 for "divide", 1e-6 for "mala".

    Returns:
        [B, N, H, Dv] in the dtype of num.
    """
    if mode not in ("divide", "inline", "mala", "none"):
        raise ValueError(f"mode: expected 'divide', 'inline', 'mala' or 'none', got {mode!r}")
    if mode == "none":
        return num
    if mode != "divide" and vbar is None:
        raise ValueError(f"vbar: mode {mode!r} needs the mean of the values, got None")
    dtype = accumulator(num)
    x, z = num.astype(dtype), z.astype(dtype)[..., None]
    if mode == "inline":
        out = x + (1 - z) * vbar.astype(dtype)
    elif mode == "mala":
        out = x + x / (z + (1e-6 if eps is None else eps)) - z * vbar.astype(dtype)
    else:
        d = z + (0.0 if eps is None else eps)
        out = jnp.where(d == 0, 0.0, x / jnp.where(d == 0, 1.0, d))
    return out.astype(num.dtype)


def taylor2(x, packed=False):
    """Feature map of the Taylor exponential: phi(q).phi(k) = 1 + s + s^2 / 2 with s = q.k / sqrt(f).

    Args:
        x: [..., f]. packed: keep each product of two channels once (same inner products, half the features).

    Returns:
        [..., 1 + f + f^2], or [..., 1 + f + f (f + 1) / 2] if packed, in the dtype of x. Used by Based
        (arXiv:2402.18668).
    """
    f = x.shape[-1]
    wide = x.astype(accumulator(x))
    if packed:
        i, j = np.triu_indices(f)
        square = wide[..., i] * wide[..., j] * np.where(i == j, 1, 2**0.5).astype(wide.dtype)
    else:
        square = (wide[..., :, None] * wide[..., None, :]).reshape(*x.shape[:-1], f * f)
    square = square / (2 * f) ** 0.5
    one = jnp.ones((*x.shape[:-1], 1), wide.dtype)
    return jnp.concatenate([one, wide / f**0.25, square], axis=-1).astype(x.dtype)


def scan_mix(a, b, axis=1, *, initial=None, reverse=False):
    """Diagonal recurrence x_t = a_t * x_{t-1} + b_t for all t at once (associative scan, log N depth).

    Args:
        a, b: broadcastable to the same shape; time is `axis`.
        initial: x before the first step (shape without `axis`), None is zeros.
        reverse: run from the last step to the first.

    Returns:
        x, in the dtype of b; computed in at least float32.
    """
    dtype = accumulator(a, b)
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    a_, b_ = jnp.broadcast_to(a.astype(dtype), shape), jnp.broadcast_to(b.astype(dtype), shape)
    axis = axis % len(shape)
    if initial is not None:
        first = [slice(None)] * len(shape)
        first[axis] = -1 if reverse else 0
        first = tuple(first)
        b_ = b_.at[first].add(a_[first] * initial.astype(dtype))

    def join(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return jax.lax.associative_scan(join, (a_, b_), reverse=reverse, axis=axis)[1].astype(b.dtype)


# --- not causal ------------------------------------------------------------------------------------------


def _all_to_all(q, k, v, state, scale):
    heads, dtype = q.shape[2], state.dtype
    if k.shape[2] == v.shape[2]:  # sum over tokens before repeating heads
        kv = jnp.einsum("bnhf,bnhe->bhfe", k.astype(dtype), v.astype(dtype))
        state = state + repeated(kv, heads, 1)
    else:
        k_, v_ = (repeated(x, heads).astype(dtype) for x in (k, v))
        state = state + jnp.einsum("bnhf,bnhe->bhfe", k_, v_)
    out = jnp.einsum("bnhf,bhfe->bnhe", q.astype(dtype) * scale, state)
    return out.astype(v.dtype), state


def _check(q, k, v, log_decay, state, causal):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[:2] != q.shape[:2]:
            want = "[B, N, heads, channels]" + ("" if name == "q" else f" with B, N = {q.shape[:2]} as in q")
            raise ValueError(f"{name}: expected {want}, got {x.shape}")
        if x.shape[2] == 0 or q.shape[2] % x.shape[2]:
            raise ValueError(f"{name}: expected a number of heads that divides {q.shape[2]}, got {x.shape}")
    b, n, h, f = q.shape
    if k.shape[3] != f:
        raise ValueError(f"k: expected {f} channels as in q, got {k.shape}")
    if state is not None and state.shape != (b, h, f, v.shape[3]):
        raise ValueError(f"state: expected {(b, h, f, v.shape[3])}, got {state.shape}")
    if log_decay is None:
        return
    if not causal:
        raise ValueError("log_decay: expected None when causal=False, a decay needs an order")
    shape = tuple(log_decay.shape)
    fits = len(shape) in (3, 4) and shape[0] in (1, b) and shape[1:] == (n, h, f)[: len(shape) - 1]
    if shape != (h,) and not fits:
        raise ValueError(f"log_decay: expected {(h,)}, {(b, n, h)} or {(b, n, h, f)}, got {shape}")
