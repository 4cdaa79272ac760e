"""The training of AS-ViT's thresholds: a budget of multiplications, and the dense model's answers to keep.

loss = task + weight * GFLOPs |mean share - ratio| + distill * KL(teacher || student) of the answers
       + distill * KL(teacher || student) of the last rows of the tokens that are left, over their channels
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.losses import divergence
from jaxattn.core.types import Array, State, contract, expect
from jaxattn.registry import register


def flops_share(aux: dict) -> Array:
    """[B]: multiplications that the cuts of a stack left, as a share of the dense model's; aux: {cut: {"saved": [B]}}."""
    saved = [told["saved"] for told in aux.values() if "saved" in told]
    expect("outcome.aux['vision']", sorted(aux) or "nothing", "cuts that tell what they save", bool(saved))
    return 1 - sum(saved)


@contract
class _Budget:
    ratio: float = 0.65
    weight: float = 2.0
    gflops: float = 4.6
    distill: float = 0.5

    teacher = True
    rates = {"model": 0.01}

    def check(self):
        expect("ratio", self.ratio, "a share in (0, 1]", 0 < self.ratio <= 1)
        for name in ("weight", "gflops", "distill"):
            expect(name, getattr(self, name), "at least 0", getattr(self, name) >= 0)

    def loss(self, params: dict, state: State, forward, batch: dict, key) -> tuple[Array, dict]:
        out, dense = forward(batch), state.shared
        share = flops_share(out.aux["vision"]).mean()
        budget = self.gflops * jnp.abs(share - self.ratio)
        answers = divergence(out.logits, dense.logits, out.weight)
        loss = out.loss + self.weight * budget + self.distill * answers
        metrics = {**out.metrics, "flops": share, "distilled": answers}
        mine, theirs = (x.rows["head"].tokens("vision") if "head" in x.rows else None for x in (out, dense))
        if mine is not None and mine.x.shape == theirs.x.shape:
            kept = mine.meta.valid if mine.meta.weight is None else mine.meta.weight > 0.5
            metrics["rows"] = divergence(mine.x, theirs.x, kept)
            loss = loss + self.distill * metrics["rows"]
        return loss, metrics


@register("objective")
def as_vit(ratio: float = 0.65, weight: float = 2.0, gflops: float = 4.6, distill: float = 0.5):
    """Train a model with ``tokens.as_vit`` to ``ratio`` of the dense model's multiplications.

    Args:
      ratio: share of the layers' multiplications to reach, on average over the images.
      weight: of the budget, per GFLOP.  gflops: what the dense model counts as (published: DeiT-S).
      distill: weight of the divergences from the dense model.
    The model learns at 0.01 of the thresholds' rate.
    """
    return _Budget(ratio, weight, gflops, distill)


__all__ = ["as_vit", "flops_share"]
