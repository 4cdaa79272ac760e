"""Values of the labels that Meta carries, in one place.

``kind`` says what a row of a sequence is. Rows without the label are text, so a language model needs to set nothing and
a decoded token is text by default.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxattn.core.types import Array, Meta

KIND_TEXT = 0
KIND_VISION = 1  # a patch or a pooled visual token
KIND_NEWLINE = 2  # ends a line of patches (LLaVA-NeXT)


def kind(meta: Meta) -> Array:
    """int32, shaped as ``meta.pos``: the label "kind", text where it is not set."""
    if "kind" in meta.labels:
        return jnp.broadcast_to(meta.labels["kind"], jnp.broadcast_shapes(meta.labels["kind"].shape, meta.pos.shape))
    return np.full(meta.pos.shape, KIND_TEXT, np.int32)


def is_vision(meta: Meta) -> Array:
    """bool, shaped as ``meta.pos``: valid rows that carry image content."""
    return (kind(meta) == KIND_VISION) & meta.valid


__all__ = ["KIND_NEWLINE", "KIND_TEXT", "KIND_VISION", "is_vision", "kind"]
