"""What each token's prediction says: log-probability, log-sum-exp, entropy, whether it was right; by chunks.

The logits of a long sequence over a large vocabulary are often the largest array of a training step. With ``chunk``
they are widened to float32 a few tokens at a time, forward and backward (each chunk is computed again for its
gradient); with ``head`` the model hands over hidden rows instead, and the logits never exist at once at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.core.types import Array, expect

KINDS = ("logp", "lse", "entropy", "correct")


class LazyLogits(NamedTuple):
    """Predictions whose logits are made where they are read: ``head(hidden [..., C]) -> logits [..., V]``."""

    hidden: Array
    head: Callable[[Array], Array]


def token_stats(rows: Array, targets: Array, *, head=None, chunk: int | None = None, want=("logp",)) -> dict:
    """Statistics [B, T] of each prediction, at least float32.

    Args:
      rows: logits [B, T, V], or with ``head`` hidden rows [B, T, C].  targets: int32 [B, T].
      head: hidden [B, t, C] -> logits [B, t, V].  chunk: tokens of a row at a time; None for all.
      want: of "logp" (of the target), "lse", "entropy" (nats), "correct" (the target has the largest logit; 0 or 1).
    """
    expect("want", want, f"names of {KINDS}", bool(want) and all(name in KINDS for name in want))
    expect("targets", f"shape {targets.shape}", f"{rows.shape[:2]}, one per row", targets.shape == rows.shape[:2])
    expect("chunk", chunk, "None or at least 1", chunk is None or chunk >= 1)
    n = rows.shape[1]
    if chunk is None or chunk >= n:
        return _stats(rows, targets, head, want)

    def chunks(x):  # [B, T, ...] -> [T / chunk, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, -n % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    one = jax.checkpoint(lambda pair: _stats(*pair, head, want))
    found = jax.lax.map(one, (chunks(rows), chunks(targets)))
    return {name: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :n] for name, x in found.items()}


def stats_of(outputs, targets: Array, *, chunk: int | None = None, want=("logp",)) -> dict[str, Array]:
    """``token_stats`` of a forward pass: an object with ``logits`` [B, T, V], or ``LazyLogits``."""
    if isinstance(outputs, LazyLogits):
        return token_stats(outputs.hidden, targets, head=outputs.head, chunk=chunk, want=want)
    logits = getattr(outputs, "logits", None)
    expect("forward", type(outputs).__name__, "an object with logits [B, T, V], or LazyLogits", logits is not None)
    return token_stats(logits, targets, chunk=chunk, want=want)


def _stats(rows, targets, head, want):
    logits = rows if head is None else head(rows)
    z = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    lse = jax.nn.logsumexp(z, -1)
    chosen = jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
    found = {"lse": lse, "logp": chosen - lse}
    if "correct" in want:
        found["correct"] = (jnp.argmax(z, -1) == targets).astype(z.dtype)
    if "entropy" in want:
        p = jnp.exp(z - lse[..., None])
        found["entropy"] = lse - jnp.sum(jnp.where(p > 0, p * z, 0.0), -1)
    return {name: found[name] for name in want}


__all__ = ["LazyLogits", "stats_of", "token_stats"]
