"""Linear attention with decay: one recurrence, in chunks, step by step, or (not causal) as two products.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T          S: [F, Dv], kept in float32
    o_t = scale * q_t S_t

There is no normaliser. A denominator is one more column of values: `with_ones(v)` in, `row_correct` out.
The chunked form follows Lightning Attention-2 (arXiv:2401.04658), with decays per head, token or channel. It
only exponentiates differences of cumulated log-decays, which are <= 0: strong decays underflow, they never
overflow.
"""

import jax
import jax.numpy as jnp
import numpy as np

SUBCHUNK = 16  # per-channel decays need [t, s, F] weights inside a block: keep that block small


def linear_attend(
    q, k, v, *, log_decay=None, state=None, chunk=128, causal=True, scale=1.0, implementation=None
):
    """Linear attention over a sequence.

    Args:
        q: [B, N, H, F] (feature-mapped) queries.
        k: [B, N, G, F] keys, H a multiple of G.
        v: [B, N, G', Dv] values, H a multiple of G' (usually G' = G).
        log_decay: natural log of the factor on the state before token t is added: None (no decay), [H],
            [B|1, N, H] or [B|1, N, H, F]. Expected <= 0; -inf forgets everything before the token.
        state: [B, H, F, Dv] state before the first token; None is zeros.
        chunk: tokens per block of the recurrence. Changes speed and memory, not the result.
        causal: False lets every token see all tokens (and `state`); log_decay must then be None.
        scale: factor on the logits.
        implementation: None (choose) | "xla" (chunks) | "reference" (token by token).

    Returns:
        out [B, N, H, Dv] in the dtype of v, and the state after the last token, [B, H, F, Dv], float32 or
        wider.

    Memory is linear in N, in the gradient too: one state per chunk is kept, the rest is recomputed.

    Raises:
        ValueError: for shapes that do not fit, a decay without causality, or an unknown implementation.
    """
    if implementation not in (None, "reference", "xla"):
        raise ValueError(f"implementation: expected None, 'reference' or 'xla', got {implementation!r}")
    _check(q, k, v, log_decay, state, causal)
    if chunk < 1:
        raise ValueError(f"chunk: expected a positive number of tokens, got {chunk}")
    dtype = _accumulator(q, k, v)
    state = _initial(state, q, v, dtype)
    if not causal:
        return _all_to_all(q, k, v, state, scale)
    if implementation == "reference" or q.shape[1] == 0:
        return _recurrence(q, k, v, log_decay, state, scale)
    return _chunked(q, k, v, log_decay, state, chunk, scale)


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
    heads, dtype = q1.shape[1], state.dtype
    if log_decay1 is not None:
        decay = jnp.exp(_floor(jnp.asarray(log_decay1, dtype)))
        state = state * _expand_to(decay if decay.ndim > 1 else decay[None], 4)
    k1, v1 = _spread(k1, heads, 1).astype(dtype), _spread(v1, heads, 1)
    state = state + k1[..., :, None] * v1.astype(dtype)[..., None, :]
    out = jnp.einsum("bhf,bhfe->bhe", q1.astype(dtype) * scale, state)
    return out.astype(v1.dtype), state


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
    dtype = _accumulator(num)
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
    wide = x.astype(_accumulator(x))
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
    dtype = _accumulator(a, b)
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


# --- forms ------------------------------------------------------------------------------------------


def _all_to_all(q, k, v, state, scale):
    heads, dtype = q.shape[2], state.dtype
    if k.shape[2] == v.shape[2]:  # sum over tokens before repeating heads
        kv = jnp.einsum("bnhf,bnhe->bhfe", k.astype(dtype), v.astype(dtype))
        state = state + _spread(kv, heads, 1)
    else:
        k_, v_ = (_spread(x, heads).astype(dtype) for x in (k, v))
        state = state + jnp.einsum("bnhf,bnhe->bhfe", k_, v_)
    out = jnp.einsum("bnhf,bhfe->bnhe", q.astype(dtype) * scale, state)
    return out.astype(v.dtype), state


def _recurrence(q, k, v, log_decay, state, scale):
    per_token = log_decay is not None and log_decay.ndim > 1

    def step(state, x):
        q1, k1, v1, d1 = x
        out, state = linear_step(state, q1, k1, v1, d1 if per_token else log_decay, scale=scale)
        return state, out

    xs = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v))
    state, out = jax.lax.scan(step, state, (*xs, jnp.moveaxis(log_decay, 1, 0) if per_token else None))
    return jnp.moveaxis(out, 0, 1), state


def _chunked(q, k, v, log_decay, state, chunk, scale):
    n, heads, dtype = q.shape[1], q.shape[2], state.dtype
    size = min(chunk, n)
    per_channel = log_decay is not None and log_decay.ndim == 4
    sub = min(SUBCHUNK, size)
    if per_channel:
        size = -(-size // sub) * sub
    pieces = -(-n // size)
    # padded tokens have k = 0 and log-decay 0: the state passes through them unchanged
    xs = [_pieces(x, pieces, size) for x in (q, k, v)]
    per_head = None
    if log_decay is None:
        xs.append(None)
    elif log_decay.ndim == 1:
        per_head = _floor(log_decay.astype(dtype))
        real = (np.arange(pieces * size) < n).reshape(pieces, 1, size, 1)
        # exact: a count times log_decay instead of a running sum
        xs.append(jnp.asarray(np.cumsum(real, axis=2), dtype))
    else:
        xs.append(_pieces(_floor(log_decay.astype(dtype)), pieces, size))

    def body(state, x):
        q, k, v, d = x
        q, k, v = q.astype(dtype) * scale, *(_spread(t, heads).astype(dtype) for t in (k, v))
        if per_channel:
            split = [_pieces(t, size // sub, sub) for t in (q, k, v, d)]
            state, out = jax.lax.scan(_channel_block, state, tuple(split))
            out = _join(out)
        else:
            cum = None if d is None else (per_head * d if per_head is not None else jnp.cumsum(d, axis=1))
            state, out = _block(state, q, k, v, cum)
        return state, out.astype(x[2].dtype)

    body = jax.checkpoint(body, prevent_cse=False)
    state, out = jax.lax.scan(body, state, tuple(xs))
    return _join(out)[:, :n], state


def _block(state, q, k, v, cum):
    """One chunk. q, k [B,C,H,F], v [B,C,H,Dv], cum [B|1,C,H]: summed log-decays of the chunk."""
    c = q.shape[1]
    seen = np.tril(np.ones((c, c), bool))
    logits = jnp.einsum("bthf,bshf->bhts", q, k)
    if cum is None:
        weights = jnp.where(seen, logits, 0)
    else:
        by_head = jnp.moveaxis(cum, 2, 1)
        between = by_head[..., :, None] - by_head[..., None, :]
        weights = logits * jnp.exp(jnp.where(seen, between, -jnp.inf))
        q = q * jnp.exp(cum)[..., None]
        k = k * jnp.exp(cum[:, -1:] - cum)[..., None]
    out = jnp.einsum("bhts,bshe->bthe", weights, v) + jnp.einsum("bthf,bhfe->bthe", q, state)
    if cum is not None:
        state = state * jnp.exp(cum[:, -1])[..., None, None]
    return state + jnp.einsum("bshf,bshe->bhfe", k, v), out


def _channel_block(state, x):
    """One small block with a decay per channel: the pairwise weights [B,t,s,H,F] exist only here."""
    q, k, v, d = x
    c = q.shape[1]
    cum = jnp.cumsum(d, axis=1)
    seen = np.tril(np.ones((c, c), bool))[:, :, None, None]
    between = jnp.exp(jnp.where(seen, cum[:, :, None] - cum[:, None, :], -jnp.inf))
    weights = jnp.sum(q[:, :, None] * k[:, None, :] * between, axis=-1)
    out = jnp.einsum("btsh,bshe->bthe", weights, v) + jnp.einsum("bthf,bhfe->bthe", q * jnp.exp(cum), state)
    state = state * jnp.exp(cum[:, -1])[..., None]
    return state + jnp.einsum("bshf,bshe->bhfe", k * jnp.exp(cum[:, -1:] - cum), v), out


# --- shapes ------------------------------------------------------------------------------------------


def _pieces(x, pieces, size):
    """[B, N, ...] -> [pieces, B, size, ...], zeros behind the end."""
    x = jnp.pad(x, [(0, 0), (0, pieces * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], pieces, size, *x.shape[2:]), 1, 0)


def _join(x):
    """[pieces, B, size, ...] -> [B, pieces * size, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _spread(x, heads, axis=2):
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)


def _expand_to(x, ndim):
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _accumulator(*arrays):
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))


def _floor(log_decay):
    # exp of the floor is exactly 0, so results do not change; sums of it stay finite (-inf - -inf is NaN)
    return jnp.maximum(log_decay, -120.0 if log_decay.dtype == jnp.float32 else -800.0)


def _initial(state, q, v, dtype):
    if state is not None:
        return state.astype(dtype)
    return jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype)


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
