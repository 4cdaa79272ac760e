"""One-dimensional sparse attention."""

from jaxattn.sparse.dynamic_mask_attention import dynamic_mask_attention
from jaxattn.sparse.flexprefill import flexprefill, flexprefill_blocks
from jaxattn.sparse.landmark_attention import (
    insert_landmarks,
    jumping_positions,
    landmark_attention,
    landmark_loss_mask,
    landmark_reference,
)  # fmt: skip

__all__ = [
    "dynamic_mask_attention", "flexprefill", "flexprefill_blocks", "insert_landmarks", "jumping_positions",
    "landmark_attention", "landmark_loss_mask", "landmark_reference",
]  # fmt: skip
