"""DyVTE, trained: routers learn behind which layer an answer stands without image tokens ("Accelerating Multimodal Large
Language Models via Dynamic Visual-Token Exit and the Empirical Findings").

A step draws one layer for all (``tokens.dyvte``), reads the batch without images behind it, and compares with the model that
reads them throughout:

    label = (more than 99 % of the answer's tokens predicted alike)  and  (loss without < 1.03 loss with)

is what that layer's router has to say (cross-entropy). Nothing else is trained.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.types import Array, State, contract, expect
from jaxattn.registry import register


def exit_label(whole: Array, without: Array, targets: Array, weight: Array, *, agree: float = 0.99,
               slack: float = 1.03) -> Array:  # fmt: skip
    """bool [B]: whether a sample needs no image any more.

    Args:
      whole, without: logits [B, T, V] of the model that reads the image throughout, and of the one that stopped.
      targets: int32 [B, T].  weight: [B, T], above 0 at rows that predict the answer.
      agree: share of the answer's rows whose predictions must be alike, to be exceeded.  slack: factor on the loss.
    """
    live = (weight > 0).astype(jnp.float32)
    count = jnp.maximum(live.sum(-1), 1.0)

    def loss(logits):
        logp = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * live).sum(-1) / count

    alike = ((whole.argmax(-1) == without.argmax(-1)) * live).sum(-1) / count
    return (alike > agree) & (loss(without) < slack * loss(whole))


def router_loss(logits: Array, label: Array, weight: Array) -> Array:
    """Cross-entropy of router logits [B, 2] and labels bool [B], mean over the samples of weight [B]."""
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), label.astype(jnp.int32)[:, None], -1)[:, 0]
    return -(logp * weight).sum() / jnp.maximum(weight.sum(), 1.0)


@contract
class _Objective:
    agree: float = 0.99
    slack: float = 1.03

    teacher = True
    rates = {"model": 0.0}

    def loss(self, params: dict, state: State, forward, batch: dict, key) -> tuple[Array, dict]:
        out, whole = forward(batch), state.shared
        gates = [told for told in out.aux["llm"].values() if "drawn" in told]
        expect("tokens", "none with routers", "dyvte at the site 'llm'", bool(gates))
        label = exit_label(whole.logits, out.logits, batch["targets"], out.weight, agree=self.agree, slack=self.slack)
        label = jax.lax.stop_gradient(label)
        loss, right, left, layers = 0.0, 0.0, 0.0, 0.0
        for told in gates:  # in training the drawn layer counts, else the one where an image left
            counts = jnp.where(told["drawn"], jnp.ones_like(label), told["left"]).astype(jnp.float32)
            share = counts.mean()
            loss += share * router_loss(told["logits"], label, counts)
            right += (((told["logits"][:, 1] > told["logits"][:, 0]) == label) * counts).mean()
            left, layers = left + share, layers + share * (told["layer"] + 1)
        depth = layers + (1 - left) * (gates[-1]["layer"] + 2)  # who never left was read by all layers
        return loss, {**out.metrics, "router": right, "label": label.mean(dtype=jnp.float32), "exits": left, "layers": depth}


@register("objective")
def dyvte(agree: float = 0.99, slack: float = 1.03) -> _Objective:
    """What DyVTE's routers learn (Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit): whether the
    answer stands without image tokens behind a drawn layer (``exit_label``). The model is not changed.

    The metrics: "router", share of right decisions; "label", of samples that could leave; "exits", of those that did;
    "layers", the mean number of layers that read image tokens.
    """
    return _Objective(agree, slack)
