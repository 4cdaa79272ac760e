"""Functions on attention logits that a layer has of its own: a Call's ``score_mod``."""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.types import contract, expect


@contract
class soft_cap:
    """cap * tanh(logits / cap): logits stay inside (-cap, cap) (Gemma 2, arXiv:2408.00118)."""

    cap: float

    def check(self):
        expect("cap", self.cap, "above 0", self.cap > 0)

    def fields(self):
        return frozenset()

    def __call__(self, logits, q, k, row, key):
        return self.cap * jnp.tanh(logits / self.cap)
