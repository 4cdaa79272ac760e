"""MEAP: next-token prediction with some inputs masked.

"Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More".

Pre-training: n = max(1, int(ratio T)) positions of 0..T-2, the same in every row, have their *input* replaced by a
mask token; targets are the original next tokens at all positions. Attention stays causal, nothing else changes, and
there are no masks at inference. At a masked position t the model predicts x_{t+1} without seeing x_t.

Fine-tuning: every sample counts twice. Once as it is; and, where its response is longer than ``threshold`` tokens, as a
copy in which max(1, int(ratio len)) response tokens are masked in the input and the loss is on those tokens alone, each
predicted from the position before it. The end-of-sequence token closes a response: it is neither masked nor counted
among its tokens.

The released pre-training repeats 51 patterns (seeded by 50 + step mod 51), shared by all micro-batches of a step; here
positions follow the step's key, and ``patterns`` = 51 brings the recurrence back. Micro-batches of an accumulated step
have keys, hence patterns, of their own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.types import Array, State, contract, expect
from jaxattn.objectives.next_token import cross_entropy
from jaxattn.registry import register


def _share(ratio, n):
    """ratio n, to be rounded down; a little more, since float32 may have rounded the ratio down."""
    return ratio * n + 1e-3


def mask_positions(key, t: int, n: int) -> Array:
    """int32 [n] distinct positions of 0..t-2, uniform: the last input is never masked."""
    expect("n", n, f"at most the {t - 1} positions before the last", 0 <= n <= t - 1)
    return jax.random.permutation(key, t - 1)[:n]


def corrupt(key, tokens: Array, mask_id: int, n: int) -> Array:
    """tokens [B, T] with the same ``n`` positions of every row replaced by ``mask_id``."""
    return jnp.asarray(tokens).at[:, mask_positions(key, tokens.shape[1], n)].set(mask_id)


def corrupt_responses(key, batch: dict, mask_id: int, ratio: float, threshold: int) -> dict:
    """The masked copy of a fine-tuning batch: tokens with response tokens masked, loss_mask 1 on those alone.

    Responses are the runs of targets that count; a run's last target is its end of sequence. Token t + 1 is the target
    of position t. Counts are per packed document (``segment``, when there), as if each lay in a row of its own.
    """
    tokens, counts = jnp.asarray(batch["tokens"]), jnp.asarray(batch["loss_mask"]) > 0
    b, t = tokens.shape
    segment = jnp.asarray(batch.get("segment", jnp.zeros((b, t), jnp.int32)))
    goes_on = counts[:, 1:] & (segment[:, 1:] == segment[:, :-1])
    inner = counts & jnp.pad(goes_on, ((0, 0), (0, 1)))  # targets inside a run: all but its end of sequence
    draw = jax.random.uniform(key, (b, t))

    def choose(inner, segment, draw):  # one row [T]; sorted by document, then by draw: ranks without a T x T table
        group = jnp.where(inner, segment, jnp.iinfo(jnp.int32).max)
        order = jnp.lexsort((draw, group))
        place = jnp.argsort(order)
        first = jnp.searchsorted(group[order], group, side="left")
        length = jnp.searchsorted(group[order], group, side="right") - first
        n = jnp.maximum(_share(ratio, length).astype(jnp.int32), 1)
        return inner & (length > threshold) & (place - first < n)

    chosen = jax.vmap(choose)(inner, segment, draw)
    hidden = jnp.pad(chosen[:, :-1], ((0, 0), (1, 0)))  # the input that carries a target lies one position later
    loss_mask = chosen.astype(batch["loss_mask"].dtype)
    return {**batch, "tokens": jnp.where(hidden, mask_id, tokens), "loss_mask": loss_mask}


@contract
class _MEAP:
    mask_id: int
    ratio: float
    form: str = "pretrain"
    threshold: int = 50
    patterns: int | None = None
    chunk: int | None = None
    z_loss: float = 0.0

    def check(self):
        expect("mask_id", self.mask_id, "the id of a token, at least 0", self.mask_id >= 0)
        expect("ratio", self.ratio, "a fraction in [0, 1)", 0 <= self.ratio < 1)
        expect("form", repr(self.form), "'pretrain' or 'sft'", self.form in ("pretrain", "sft"))
        expect("patterns", self.patterns, "None or at least 1", self.patterns is None or self.patterns >= 1)

    def batch(self, batch: dict, key) -> dict:
        """What the model is trained on: corrupted inputs, or for "sft" the batch and its masked copy, 2B rows."""
        if self.ratio == 0:
            return batch
        if self.form == "pretrain":
            t = batch["tokens"].shape[1]
            n = min(max(1, int(_share(self.ratio, t))), t - 1)
            if self.patterns is not None:
                key = jax.random.key(jax.random.randint(key, (), 0, self.patterns))
            return {**batch, "tokens": corrupt(key, batch["tokens"], self.mask_id, n)}
        copy = corrupt_responses(key, batch, self.mask_id, self.ratio, self.threshold)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), dict(batch), copy)

    def loss(self, params: dict, state: State, forward, batch: dict, key) -> tuple[Array, dict]:
        batch = self.batch(batch, key)
        return cross_entropy(forward(batch), batch, chunk=self.chunk, z_loss=self.z_loss)


@register("objective")
def meap(mask_id, *, ratio=None, form="pretrain", threshold=50, patterns=None, chunk=None, z_loss=0.0) -> _MEAP:
    """MEAP (Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More).

    Args:
      mask_id: id of the mask token, which never is a target.
      ratio: fraction of inputs masked; default 0.15 in pre-training, 0.1 of a response in fine-tuning. 0 masks none.
      form: "pretrain" (same positions in all rows) or "sft" (batch doubled by a copy with masked responses).
      threshold: responses of at most this many tokens have no masked copy.  patterns: None, or how many recur.
      chunk, z_loss: of ``next_token``.
    """
    default = {"pretrain": 0.15}.get(form, 0.1)
    ratio = default if ratio is None else float(ratio)
    return _MEAP(mask_id, ratio, form, threshold, patterns, chunk, float(z_loss))


__all__ = ["corrupt", "corrupt_responses", "mask_positions", "meap"]
