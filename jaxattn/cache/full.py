"""The exact cache: every key is kept, in the order in which it came."""

from __future__ import annotations

from jaxattn.core import cache
from jaxattn.core.types import Spec, State, contract
from jaxattn.registry import register


@register("cache")
def full() -> Full:
    """Every row of the prompt and of the generated text: attention over it is exact. The default policy.

    Its capacity is ``spec.length`` rows; a step writes one row and reads the others where they lie."""
    return Full()


@contract
class Full:
    rotated = True

    def init_state(self, spec: Spec) -> State:
        return State(cache.empty(spec, spec.length))

    def view(self, params, state, q, k, meta, ctx):
        return (cache.view_of(state.layer),), state.shared

    def pending(self, params, state, k, v, meta, side, evidence, ctx):
        return cache.grow(state.layer, cache.rows_of(k, v, meta, side), ctx.phase)

    def commit(self, params, state, pending) -> State:
        return state.replace(layer=cache.commit(state.layer, pending))
