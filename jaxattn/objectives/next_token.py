"""Next-token cross-entropy: the objective of every decoder, and the base of the others."""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.token_stats import stats_of
from jaxattn.core.types import Array, State, contract, expect
from jaxattn.registry import register


def cross_entropy(outputs, batch: dict, *, chunk: int | None = None, z_loss: float = 0.0) -> tuple[Array, dict]:
    """Mean negative log-probability of the targets that count.

    Args:
      outputs: object with logits [B, T, V], or ``LazyLogits``.
      batch: targets int32 [B, T], loss_mask [B, T] (weights; absent: all 1).
      chunk: tokens per row whose logits exist at once.  z_loss: weight of the mean squared log-sum-exp.
    Returns: (loss, metrics): nll and accuracy (means over the weights), weight (their sum), z_loss where asked for.
    """
    want = ("logp", "correct", *(("lse",) if z_loss else ()))
    found = stats_of(outputs, batch["targets"], chunk=chunk, want=want)
    weights = jnp.asarray(batch.get("loss_mask", 1.0), found["logp"].dtype)
    weights = jnp.broadcast_to(weights, found["logp"].shape)
    total = weights.sum()
    # A target that does not count may have any logits, -inf too: it must not reach the sum.
    mean = lambda x: jnp.sum(jnp.where(weights > 0, x, 0.0) * weights) / jnp.maximum(total, 1e-9)  # noqa: E731
    loss = nll = -mean(found["logp"])
    metrics = {"nll": nll, "accuracy": mean(found["correct"]), "weight": total}
    if z_loss:
        metrics["z_loss"] = mean(found["lse"] ** 2)
        loss = nll + z_loss * metrics["z_loss"]
    return loss, metrics


@contract
class _NextToken:
    chunk: int | None = None
    z_loss: float = 0.0

    def check(self):
        expect("chunk", self.chunk, "None or at least 1", self.chunk is None or self.chunk >= 1)
        expect("z_loss", self.z_loss, "at least 0", self.z_loss >= 0)

    def loss(self, params: dict, state: State, forward, batch: dict, key) -> tuple[Array, dict]:
        return cross_entropy(forward(batch), batch, chunk=self.chunk, z_loss=self.z_loss)


@register("objective")
def next_token(*, chunk=None, z_loss=0.0) -> _NextToken:
    """Next-token prediction on layout records (tokens, targets, loss_mask, segment, position; all [B, T]).

    Args:
      chunk: tokens of a row whose float32 logits exist at once, None for all: memory against one more pass of the head.
      z_loss: weight of mean(lse^2), which keeps logits from drifting (1e-4 is usual); 0 for none.
    """
    return _NextToken(chunk, float(z_loss))


__all__ = ["cross_entropy", "next_token"]
