"""Reductions of an attention map that is never built.

Nearly every attention-based score in the field is w^T softmax(q k^T) for some row weights w, and nearly every
diagnostic a row or a column reduction of the same map. Each is one streaming pass over the tiles that ``attend``
itself reads, from the rows' log mass, so a Call with cached Views, grouped heads, masks, Selections, biases, token
sizes and score_mod is measured exactly as it is attended. All of them are differentiable, in memory linear in length.

Letters as in ``types``; probabilities are over the union of own keys, past Views and the sink. Rows that see nothing
or whose Meta is not valid contribute 0.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxattn.core.attend import attend_keys, attend_lowered, lower, merge, put_heads, take_heads, view_call
from jaxattn.core.mask import field_of
from jaxattn.core.select import gather_meta, gather_tokens
from jaxattn.core.types import Array, Call, Meta, Part, Selection, View, contract, expect
from pallas_kernels.flash import reference
from pallas_kernels.profile import column_sums as kernel_column_sums
from pallas_kernels.profile import diagonals, mean_logits

# ---------------------------------------------------------------------------------------------- one set of keys


@contract
class _Tempered:
    """A score_mod whose logits come and go divided by a temperature."""

    inner: object
    temperature: float

    def fields(self):
        return self.inner.fields()

    def __call__(self, logits, q, k, row, key):
        return self.inner(logits * self.temperature, q, k, row, key) / self.temperature


def _lower(call: Call, temperature: float = 1.0, **more):
    """Operands and options of the own keys, every term of the logits divided by ``temperature``."""
    operands, options = lower(call, **more)
    if temperature == 1.0:
        return operands, options
    for name in ("key_bias", "bias", "log_weight"):
        if name in operands:
            operands[name] = operands[name] / temperature
    mod = None if options.score_mod is None else _Tempered(options.score_mod, temperature)
    return operands, dataclasses.replace(options, scale=options.scale / temperature, score_mod=mod)


def _plain(call: Call) -> Call:
    """The Call reduced to what its probabilities depend on."""
    softmax = call.normalizer == "softmax"
    expect("call.normalizer", call.normalizer, "'softmax': there are no probabilities otherwise", softmax)
    key = lambda rows: {name: x for name, x in rows.items() if name != "group"}  # noqa: E731
    past = tuple(view.replace(key=key(view.key)) for view in call.past)
    return call.replace(gain=None, gain_args={}, out_gate=None, key=key(call.key), past=past)


def _own(call: Call) -> Array | None:
    """bool, broadcastable to [B, N, H]: rows that see the own keys (None: all)."""
    own = None
    for view in call.past:
        if view.own is not None:
            own = view.own if own is None else own & view.own
    return own


def _parts(call: Call) -> list[tuple[Call, View | None]]:
    """The own keys and each View as Calls of their own."""
    return [(call.replace(past=()), None)] + [(view_call(call, view), view) for view in call.past]


def _take(x, call: Call, view: View | None):
    """Rows [B, N, H] for the heads that a View covers."""
    return x if view is None or view.heads is None else take_heads(x, view.heads, call.k.shape[2])


def _put(x, call: Call, view: View | None, fill=0.0):
    """Rows of the heads that a View covers, over all heads."""
    return x if view is None or view.heads is None else put_heads(x, view.heads, call, fill)


def _row_sums(call: Call, one) -> Array:
    """Sum over the own keys and the Views of ``one(sub_call, view) -> [B, N, H', ...]``, hidden own rows left out."""
    total, own = None, _own(call)
    for sub, view in _parts(call):
        x = _put(one(sub, view), call, view)
        if view is None and own is not None:
            x = jnp.where(own.reshape(*own.shape, *[1] * (x.ndim - 3)), x, 0.0)
        total = x if total is None else total + x
    return total


# ------------------------------------------------------------------------------------------------------------ log mass


def log_mass(call: Call, temperature: float = 1.0) -> Array:
    """[B, N, H] log of the rows' mass at a temperature that divides every logit (and the sink's)."""
    call, own = _plain(call), _own(call)
    parts = []
    for sub, view in _parts(call):
        sub = sub.replace(v=jnp.zeros((*sub.v.shape[:3], 1), sub.v.dtype))
        out, lse = attend_lowered(*_lower(sub, temperature, turned=True), sub.where is not None)
        lse = _put(lse, call, view, -jnp.inf)
        if view is None and own is not None:
            lse = jnp.where(own, lse, -jnp.inf)
        parts.append(Part(jnp.zeros((*lse.shape, 0), out.dtype), lse))
    lse = merge(*parts).lse
    if call.sink_logit is not None:
        lse = jnp.logaddexp(lse, jnp.broadcast_to(call.sink_logit / temperature, lse.shape).astype(lse.dtype))
    return lse


# --------------------------------------------------------------------------------------------------------- column sums


def received(call: Call, lse: Array | None, weights: Array, *, temperature: float = 1.0):
    """Attention received by each key: sum_i weights_i p_ij.

    Args:
      call: the attention, exactly as attended.
      lse: [B, N, H], its final log mass (own keys, Views and sink), or None to compute it. With another temperature it
        must be ``log_mass(call, temperature)``.
      weights: float [B|1, N] or [B|1, N, H|1] of the query rows. Few rows with weight: ``rows_call`` first.
      temperature: divides the logits.
    Keys with a ``weight`` receive it of their share; what rows give to themselves beyond it is not told.
    Returns: (own [B, H, M], one [B, H', M_view] per View, over the query heads that the View covers).
    """
    call = _plain(call)
    b, n, h, _ = call.q.shape
    if lse is None:
        lse = log_mass(call, temperature)
    expect("lse", f"shape {lse.shape}", f"{(b, n, h)}", lse.shape == (b, n, h))
    weights = _weights(call, weights)
    found, own = [], _own(call)
    for sub, view in _parts(call):
        w = _take(weights, call, view)
        if view is None and own is not None:
            w = jnp.where(own, w, 0.0)
        found.append(kernel_column_sums(*_lower(sub, temperature), _take(lse, call, view), w))
    if call.k_meta.weight is not None:
        found[0] = found[0] * jnp.asarray(call.k_meta.weight, found[0].dtype)[:, None]
    return found[0], tuple(found[1:])


def _weights(call: Call, weights) -> Array:
    """[B, N, H] weights of the valid rows."""
    b, n, h, _ = call.q.shape
    acc = jnp.promote_types(call.q.dtype, jnp.float32)
    w = jnp.asarray(weights)
    shape = w.shape
    w = w[..., None] if w.ndim == 2 else w
    ok = w.ndim == 3 and w.shape[0] in (1, b) and w.shape[1] == n and w.shape[2] in (1, h)
    expect("weights", f"shape {shape}", f"[1|{b}, {n}] or [1|{b}, {n}, 1|{h}]", ok)
    return jnp.broadcast_to(jnp.where(jnp.asarray(call.q_meta.valid)[..., None], w, 0).astype(acc), (b, n, h))


def iterated(call: Call, d0: Array, steps: int, temperature: float = 1.0) -> Array:
    """[B, H, N]: d <- d P, ``steps`` times from ``d0`` [B|1, N] or [B|1, N, H|1], over the own keys alone.

    Rows and keys must be the same tokens in the same order. With d0 = 1/N it is PageRank on the attention map, as in
    AIM (adaptive inference of multi-modal LLMs)."""
    call = _plain(call).replace(past=(), sink_logit=None)
    n, m = call.q.shape[1], call.k.shape[1]
    expect("call", f"{n} rows", f"as many as the {m} keys", n == m)
    lse, lowered = log_mass(call, temperature), _lower(call, temperature)
    valid = jnp.asarray(call.q_meta.valid)[..., None]

    def step(d, _):
        d = jnp.moveaxis(kernel_column_sums(*lowered, lse, d), 1, 2)
        return jnp.where(valid, d, 0.0), None

    d, _ = jax.lax.scan(step, _weights(call, d0), None, length=steps)
    return jnp.moveaxis(d, 2, 1)


# ------------------------------------------------------------------------------------------------------------ row sums


def entropy(call: Call, lse: Array) -> Array:
    """[B, N, H] entropy of each row's probabilities in nats: lse - E[logit]. A sink counts as one more outcome."""
    call = _plain(call)
    mean = _row_sums(call, lambda sub, view: mean_logits(*_lower(sub), _take(lse, call, view)))
    some = jnp.isfinite(lse)
    if call.sink_logit is not None:
        sink = jnp.broadcast_to(call.sink_logit, lse.shape).astype(lse.dtype)
        mean = mean + jnp.where(some & (sink > -jnp.inf), jnp.exp(sink - jnp.where(some, lse, 0.0)) * sink, 0.0)
    return jnp.where(some, jnp.where(some, lse, 0.0) - mean, 0.0)


def _expect_columns(call: Call, lse: Array, columns) -> Array:
    """[B, N, H, C]: sum_j p_ij x_j for per-key columns ``columns(meta) -> [B|1, (G,) M, C]``, through the values."""
    acc = jnp.promote_types(call.q.dtype, jnp.float32)

    def one(sub, view):
        x = columns(sub.k_meta).astype(acc)
        x = x[:, :, None] if x.ndim == 3 else jnp.moveaxis(x, 1, 2)
        part = attend_keys(sub.replace(v=jnp.broadcast_to(x, (*sub.k.shape[:3], x.shape[-1]))))
        total = _take(lse, call, view)
        some = jnp.isfinite(total) & jnp.isfinite(part.lse)
        share = jnp.where(some, jnp.exp(jnp.where(some, part.lse, 0.0) - jnp.where(some, total, 0.0)), 0.0)
        return part.out * share[..., None]

    return _row_sums(call, one)


def distance(call: Call, lse: Array) -> Array:
    """[B, N, H] mean of q.pos - k.pos under each row's probabilities (mass on a sink counts as distance 0)."""

    def digits(pos):
        # Balanced base-256 digits: exact as values even where products of float32 round to bfloat16 or tf32, and
        # small distances between small positions, of either sign, do not come from large terms.
        pos = jnp.asarray(pos)
        low = ((pos + 128) & 255) - 128
        rest = (pos - low) >> 8
        mid = ((rest + 128) & 255) - 128
        return low, mid, (rest - mid) >> 8

    def columns(meta: Meta):
        return jnp.stack([jnp.ones_like(meta.pos), *digits(meta.pos)], -1)

    call = _plain(call)
    mass, *key = jnp.moveaxis(_expect_columns(call, lse, columns), -1, 0)
    row, weights = digits(call.q_meta.pos), (1.0, 256.0, 65536.0)
    return sum(w * (mass * r[..., None].astype(mass.dtype) - c) for w, r, c in zip(weights, row, key, strict=True))


def masses(call: Call, label_name: str, n_classes: int, lse: Array) -> Array:
    """[B, N, H, C]: probability on the keys whose label ``label_name`` is c in [0, C); other labels count nowhere."""
    classes = jnp.arange(n_classes)
    return _expect_columns(_plain(call), lse, lambda m: jnp.asarray(field_of(m, label_name))[..., None] == classes)


# ------------------------------------------------------------------------------------------------------------ few rows


def rows_call(call: Call, index: Array) -> Call:
    """The Call of the query rows ``index`` int32 [B, R] alone: Meta, side rows, bias, gates, Selections with them."""
    b, n = call.q.shape[:2]
    expect("index", f"shape {index.shape}", f"[{b}, R]", index.ndim == 2 and index.shape[0] == b)

    def take(x, axis=1):
        x = jnp.moveaxis(x, axis, 1)
        if x.shape[1] == 1 and n > 1:
            return jnp.moveaxis(x, 1, axis)  # shared by all rows
        return jnp.moveaxis(gather_tokens(jnp.broadcast_to(x, (index.shape[0], *x.shape[1:])), index), 1, axis)

    def select(where: Selection | None):
        if where is None:
            return None

        def tiles(x):
            x = jnp.moveaxis(jnp.broadcast_to(x, (index.shape[0], *x.shape[1:])), 2, 1)
            return jnp.moveaxis(gather_tokens(x, index // where.tile), 1, 2)

        return dataclasses.replace(jax.tree.map(tiles, where), tile=1)

    optional = lambda x, axis=1: None if x is None else take(x, axis)  # noqa: E731
    sink = call.sink_logit
    past = tuple(v.replace(where=select(v.where), own=optional(v.own)) for v in call.past)
    return call.replace(
        q=take(call.q), q_meta=gather_meta(call.q_meta, index), row={k: take(x) for k, x in call.row.items()},
        bias=optional(call.bias, 2), where=select(call.where), past=past, out_gate=optional(call.out_gate),
        sink_logit=sink if sink is None or sink.ndim < 3 else take(sink),
    )  # fmt: skip


def row_logits(call: Call, index: Array):
    """Logits of the query rows ``index`` int32 [B, R], scaled and biased as attended, -inf where a key is not seen.

    Returns: (own [B, H, R, M], one [B, H', R, M_view] per View). R x M is what is asked for; keep R small."""
    call = rows_call(_plain(call), index)
    found, own = [], _own(call)
    for sub, view in _parts(call):
        if sub.where is None:  # all keys in one unit: the mask alone decides
            one = jnp.ones((1, 1, 1), jnp.int32)
            sub = sub.replace(where=Selection(one[..., None] * 0, one, unit=sub.k.shape[1], tile=sub.q.shape[1]))
        s, seen = reference.logits(*_lower(sub))
        if view is None and own is not None:
            seen = seen & jnp.moveaxis(own, 2, 1)[..., None]
        found.append(jnp.where(seen, s, -jnp.inf))
    return found[0], tuple(found[1:])


def rows(call: Call, index: Array, lse: Array | None = None):
    """Probabilities of the query rows ``index`` int32 [B, R]: (own [B, H, R, M], one [B, H', R, M_view] per View).

    ``lse``: [B, N, H] of the whole call, if it is already known. Rows that see nothing are 0."""
    call = _plain(call)
    lse = log_mass(rows_call(call, index)) if lse is None else gather_tokens(lse, index)
    own, past = row_logits(call, index)
    views = [None, *call.past]
    found = []
    for s, view in zip((own, *past), views, strict=True):
        total = jnp.moveaxis(_take(lse, call, view), 2, 1)[..., None]
        some = (s > -jnp.inf) & jnp.isfinite(total)
        found.append(jnp.where(some, jnp.exp(jnp.where(some, s, 0.0) - jnp.where(some, total, 0.0)), 0.0))
    return found[0], tuple(found[1:])


# ---------------------------------------------------------------------------------------------------------- transition


def transition(x_in: Array, x_out: Array, valid: Array | None = None) -> Array:
    """How far a sub-block moves each row: |x_out| / |x_in| * softmax_rows(1 - cos(x_in, x_out)).

    Args:
      x_in, x_out: [B, N, C], the sub-block's normalised input and its output before the residual sum.
      valid: bool [B|1, N]; other rows stay out of the softmax and get 0.
    Returns: [B, N], at least float32 (the token transition value of TransPrune, of one sub-block).
    """
    expect("x_out", f"shape {x_out.shape}", f"the shape of x_in, {x_in.shape}", x_out.shape == x_in.shape)
    a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (x_in, x_out))
    aa, bb, ab = jnp.sum(a * a, -1), jnp.sum(b * b, -1), jnp.sum(a * b, -1)
    some = (aa > 0) & (bb > 0)
    ratio = jnp.sqrt(jnp.where(some, bb / jnp.where(some, aa, 1.0), 1.0))
    cos = jnp.where(some, ab * jax.lax.rsqrt(jnp.where(some, aa, 1.0)) * jax.lax.rsqrt(jnp.where(some, bb, 1.0)), 0.0)
    valid = jnp.ones(x_in.shape[:2], bool) if valid is None else jnp.broadcast_to(valid, x_in.shape[:2])
    turned = jax.nn.softmax(1 - cos, axis=-1, where=valid)
    return jnp.where(valid & some, ratio * turned, 0.0)


# ------------------------------------------------------------------------------------------------------------- profile


def profile(q: Array, k: Array, last: int, *, scale: float | None = None, implementation: str | None = None):
    """Vertical and slash mass of the last queries under causal attention (FlexPrefill, arXiv 2502.20766).

    Args:
      q: [B, N, H, D].  k: [B, M, G, D]; the last query sits at the last key.  last: how many queries, at most N.
      scale: multiplies q.k, default D ** -0.5.
    Returns:
      vertical [B, H, M]: mean over the rows of each key's probability.  slash [B, H, M]: sum of each diagonal
      divided by ``last``; index M - 1 is the main diagonal, M - 1 - s the keys s back. Both sum to 1.
    """
    n, m = q.shape[1], k.shape[1]
    expect("last", last, f"between 1 and the {n} queries", 1 <= last <= n)
    expect("k", f"{m} keys", f"at least the {last} last queries", m >= last)
    q, scale = q[:, n - last :], q.shape[-1] ** -0.5 if scale is None else scale
    vertical, slash = diagonals(q, k, scale=scale, implementation=implementation)
    return vertical / last, slash / last


__all__ = [
    "distance", "entropy", "iterated", "log_mass", "masses", "profile", "received", "row_logits", "rows", "rows_call",
    "transition",
]  # fmt: skip
