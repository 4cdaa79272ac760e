"""StreamingLLM: the first tokens and the last ones, numbered by their place in the cache.

"Efficient Streaming Language Models with Attention Sinks" (arXiv:2309.17453).

A window alone breaks a language model when its first tokens leave: they carry much attention, whatever they say
(attention sinks). Keeping four of them and the ``recent`` last tokens keeps the model stable without end. Keys are
stored before rotation and rotated on read at their rank in the cache, so no position ever exceeds its size and the
positions of the text do not matter. A step attends to the whole cache and itself; the eviction follows.

The paper's two variants of pre-training need nothing here: a learnable sink token is a token put before every sample
(then ``start=1``), and the zero sink (softmax-off-by-one) is a Call with ``sink_logit=0``.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core import cache
from jaxattn.core.types import Meta, Spec, State, contract, expect, operand
from jaxattn.registry import register


@register("cache")
def streamingllm(start=4, recent=512) -> StreamingLLM:
    """Keep the ``start`` first and the ``recent`` last rows; rows of padding count nowhere.

    Args:
      start: sinks that are never evicted.
      recent: rows of the window; another number of the same bucket compiles nothing.
    """
    return StreamingLLM(start, recent)


def keep_ends(slots: cache.Slots, k, v, meta: Meta, side: dict, phase: str, *, start: int, recent):
    """Pending record of a layer that keeps the first ``start`` and the last ``recent`` rows, evicting after the step.

    slots: of the layer, with the stat "rank".  k, v: [B, N, G, D] as they are stored.  recent: may be traced."""
    if phase == "decode":
        rank = jnp.concatenate([slots.stats["rank"], cache.count(slots)[..., None]], -1)  # the new row comes last
        score = jnp.where(rank < start, jnp.inf, rank)
        return cache.swap(slots, cache.rows_of(k, v, meta, side), score, start + recent)
    rows = cache.rows_of(k, v, meta, side, rank=cache.next_ranks(slots, meta)[:, None])
    rows = rows if phase == "prefill" else cache.join(slots, rows)
    score = jnp.where(rows.stats["rank"] < start, jnp.inf, rows.stats["rank"])
    return cache.Whole(cache.compact(rows, score, slots.width, start + recent))


@contract
class StreamingLLM:
    start: int = 4
    recent: int = operand("budget", 512)

    rotated = False

    def check(self):
        expect("start", self.start, "at least 0", self.start >= 0)
        expect("recent", self.recent, "at least 1", not isinstance(self.recent, int) or self.recent >= 1)

    def init_state(self, spec: Spec) -> State:
        width = min(self.start + int(self.recent), spec.length)
        return State(cache.empty(spec, width, stats={"rank": jnp.int32}))

    def positions(self, params, state, meta: Meta, ctx) -> Meta:
        return meta.replace(rope=jnp.maximum(cache.next_ranks(state.layer, meta), 0))

    def view(self, params, state, q, k, meta, ctx):
        return (cache.view_of(state.layer, rope=state.layer.stats["rank"]),), state.shared

    def pending(self, params, state, k, v, meta, side, evidence, ctx):
        return keep_ends(state.layer, k, v, meta, side, ctx.phase, start=self.start, recent=params["recent"])

    def commit(self, params, state, pending) -> State:
        return state.replace(layer=cache.commit(state.layer, pending))


def evict_for_space(state: State, coming: int, *, start: int = 4, recent: int = 512) -> State:
    """The cache with room for ``coming`` rows (a chat turn and its answer), so that the turn sees one unbroken window:
    keeps the first ``start`` and the last ``recent - coming`` rows if more than ``start + recent`` would stand.

    ``state``: between steps, leaves [L, ...]."""
    expect("coming", coming, f"between 0 and recent, {recent}", 0 <= coming <= recent)
    rank, n = state.layer.stats["rank"], cache.count(state.layer)[..., None]
    gone = (n + coming > start + recent) & (rank >= start) & (rank < n - recent + coming)
    return state.replace(layer=cache.drop(state.layer, gone))


def evict_range(state: State, first: int, stop: int) -> State:
    """The cache without the rows whose rank in it is in [first, stop). ``state`` as in ``evict_for_space``."""
    expect("stop", stop, f"at least first, {first}", 0 <= first <= stop)
    rank = state.layer.stats["rank"]
    return state.replace(layer=cache.drop(state.layer, (rank >= first) & (rank < stop)))
