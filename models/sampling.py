"""Samplers: from logits to the next token. Temperatures and thresholds are operands: tuning them compiles nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.select import top_k as largest
from jaxattn.core.select import top_p as nucleus
from jaxattn.core.types import State, contract, expect, operand


@contract
class Greedy:
    """The most likely token; ties to the lowest id."""

    def step(self, params, state, value, hidden, ctx):
        token = jnp.argmax(value, -1).astype(jnp.int32)
        return token, state, jnp.zeros(token.shape, bool)


@contract
class Sample:
    """Categorical sampling after temperature, top-k and top-p, in this order."""

    temperature: float = operand("scalar", 1.0)
    top_k: int | None = None
    top_p: float | None = operand("scalar", None)

    def check(self):
        # Inside a program operands have no values yet; only real ones are checked.
        if isinstance(self.temperature, float):
            expect("temperature", self.temperature, "above 0 (use greedy() for the limit)", self.temperature > 0)
        if isinstance(self.top_p, float):
            expect("top_p", self.top_p, "in (0, 1]", 0 < self.top_p <= 1)
        expect("top_k", self.top_k, "at least 1, or None", self.top_k is None or self.top_k >= 1)

    def step(self, params, state, value, hidden, ctx):
        logits = value.astype(jnp.float32) / params["temperature"]
        if self.top_k is not None:
            floor = largest(logits, min(self.top_k, logits.shape[-1]))[0][..., -1:]
            logits = jnp.where(logits >= floor, logits, -jnp.inf)
        if self.top_p is not None:
            logits = jnp.where(nucleus(jax.nn.softmax(logits, -1), params["top_p"]), logits, -jnp.inf)
        token = jax.random.categorical(ctx.key, logits, -1).astype(jnp.int32)
        return token, state, jnp.zeros(token.shape, bool)


def greedy() -> Greedy:
    return Greedy()


def sample(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Sample:
    """Temperature, then the ``top_k`` most likely tokens, then the smallest set that covers ``top_p``."""
    return Sample(float(temperature), top_k, None if top_p is None else float(top_p))


def fresh(_sampler) -> State:
    return State()
