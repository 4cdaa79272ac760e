"""FocusUI's two stages of training: the scorer alone, then everything with a little of its loss.

loss = task * (answers) + scorer * KL(softmax(label) || softmax(scores)), the label of a token 2 share - 1 with ``share`` the
part of its patch inside a target's box. The published labels add half the rarity of the plain region a patch lies in
(``tokens.fused_label``, from pixels): that is for screenshots, and prepared with the data, as ``batch["label"]`` [B, N].
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxattn.core.losses import divergence
from jaxattn.core.types import Array, State, contract, expect
from jaxattn.registry import register


def target_share(box: Array, grid: int, patch: int) -> Array:
    """float32 [B, grid * grid]: the largest share of each patch of ``patch`` pixels inside one of the boxes int [B, C, 4]
    (top, left, bottom, right in pixels; negative: none)."""
    start = jnp.arange(grid) * patch

    def overlap(low, high):
        inside = jnp.minimum(start + patch, high[..., None]) - jnp.maximum(start, low[..., None])
        return jnp.clip(inside, 0, patch).astype(jnp.float32) / patch

    tall, wide = overlap(box[..., 0], box[..., 2]), overlap(box[..., 1], box[..., 3])
    share = tall[..., :, None] * wide[..., None, :]
    share = jnp.where((box[..., 0] >= 0)[..., None, None], share, 0.0)
    return share.max(1).reshape(len(box), grid * grid)


@contract
class _Grounding:
    scorer: float = 1.0
    task: float = 0.0

    def check(self):
        for name in ("scorer", "task"):
            expect(name, getattr(self, name), "at least 0", getattr(self, name) >= 0)

    @property
    def rates(self) -> dict:
        return {"model": 0.0 if self.task == 0 else 1.0}

    def loss(self, params: dict, state: State, forward, batch: dict, key) -> tuple[Array, dict]:
        out = forward(batch)
        told = next((x for x in out.aux["sites"].values() if "scores" in x), None)
        expect("outcome.aux['sites']", sorted(out.aux["sites"]) or "nothing", "a site with scores", told is not None)
        scores = told["scores"]
        if "label" in batch:
            label = batch["label"]
        else:
            expect("batch", sorted(batch), "boxes of the targets ('box') or labels of the patches ('label')", "box" in batch)
            grid = math.isqrt(scores.shape[1])
            label = 2 * target_share(batch["box"], grid, batch["image"].shape[1] // grid) - 1
        error = divergence(scores, label)
        inside = label > 0
        kept = (told["kept"] & inside).sum() / jnp.maximum(inside.sum(), 1)
        loss = self.scorer * error + self.task * out.loss
        return loss, {**out.metrics, "scorer": error, "target_kept": kept, "kept": told["kept"].mean(dtype=jnp.float32)}


@register("objective")
def focusui(scorer: float = 1.0, task: float = 0.0):
    """Train a model with ``tokens.focusui``. scorer, task: weights of the scorer's and of the task's loss. Without the task's
    the model is frozen (the first stage); published for the second: scorer 0.1, task 1."""
    return _Grounding(scorer, task)


__all__ = ["focusui", "target_share"]
