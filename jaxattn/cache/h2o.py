"""H2O: the tokens that have received the most attention so far, and the last ones.

"H_2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (arXiv:2306.14048).

Every slot accumulates a[g, j] += sum over queries of p[g, i, j], prompt and steps alike. After a step the cache keeps
the ``budget`` slots with the largest a among those that are not recent, and the ``recent`` last ones; scores leave and
stay with their rows. The greedy rule is near-optimal where attention is submodular (the paper's theorem).

Departures from the released code: scores belong to batch rows (there they are summed over the batch, so it must be 1),
and with grouped queries to kv heads (summed over their query heads; the released code has one kv head per query head).
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core import cache
from jaxattn.core.select import forbid, rank_of
from jaxattn.core.types import Meta, Need, Spec, State, contract, expect, operand
from jaxattn.registry import register

RECEIVED = Need("received", what="received", at="llm.*", rows="all", over_heads=None, total=True)


@register("cache")
def h2o(budget=256, recent=256, *, positions="true") -> H2O:
    """Heavy hitters and recent tokens; after the prompt one row leaves per step and the new one takes its slot.

    Args:
      budget: heavy hitters to keep; 0 leaves a sliding window.  recent: last rows to keep; 0 leaves the heavy hitters.
        Other numbers of the same buckets compile nothing.
      positions: "true" keeps rotated keys at their place in the text; "rank" rotates on read at the place in the cache
        (the released streaming variant).
    """
    expect("positions", positions, "'true' or 'rank'", positions in ("true", "rank"))
    return H2O(budget, recent, positions == "rank")


@register("cache")
def h2o_mask(budget=256, recent=256) -> H2OMask:
    """The authors' simulation of H2O for studies of accuracy: nothing is evicted, a mask hides what would be.

    Its rule differs from the real eviction in ways that are kept: a row just leaving the window is hidden for one step
    before it is a candidate, and a hidden row loses its score but may return. ``budget`` and ``recent`` are the
    released ratios times the length of the prompt."""
    return H2OMask(budget, recent)


def _check(record) -> None:
    for name in ("budget", "recent"):
        value = getattr(record, name)
        expect(name, value, "at least 0", not isinstance(value, int) or value >= 0)


def _acc(spec: Spec):
    return jnp.promote_types(jnp.dtype(spec.dtype), jnp.float32)


def _received(evidence: dict, kv_heads: int):
    """(own [B, G, N], past [B, G, W] or 0) column sums of this call's probabilities."""
    found = evidence["received"]
    past = cache.per_kv_head(found["past"][0], kv_heads) if found["past"] else 0.0
    return cache.per_kv_head(found["own"], kv_heads), past


@contract
class H2O:
    budget: int = operand("budget", 256)
    recent: int = operand("budget", 256)
    ranked: bool = False

    def check(self):
        _check(self)
        total = (self.budget or 0) + (self.recent or 0)
        expect("budget", self.budget, "at least one row in budget and recent together", total > 0)

    @property
    def rotated(self) -> bool:
        return not self.ranked

    def needs(self) -> tuple[Need, ...]:
        return (RECEIVED,)

    def init_state(self, spec: Spec) -> State:
        width = min(int(self.budget) + int(self.recent), spec.length)
        return State(cache.empty(spec, width, per_head=True, stats={"rank": jnp.int32, "acc": _acc(spec)}))

    def positions(self, params, state, meta: Meta, ctx) -> Meta:
        return meta.replace(rope=jnp.maximum(cache.next_ranks(state.layer, meta), 0)) if self.ranked else meta

    def view(self, params, state, q, k, meta, ctx):
        rope = state.layer.stats["rank"] if self.ranked else None
        return (cache.view_of(state.layer, rope=rope),), state.shared

    def pending(self, params, state, k, v, meta, side, evidence, ctx):
        slots, g = state.layer, k.shape[2]
        recent, limit = params["recent"], params["budget"] + params["recent"]
        own, past = _received(evidence, g)
        if ctx.phase == "decode":
            rows = cache.rows_of(k, v, meta, side, heads=g)
            last = cache.count(slots)[..., None]
            rank = jnp.concatenate([slots.stats["rank"], last], -1)
            acc = slots.stats["acc"] + past
            score = jnp.concatenate([acc, own], -1)
            score = jnp.where(rank < last + rows.meta.valid - recent, score, jnp.inf)
            return cache.swap(slots, rows, score, limit, acc=(acc, own[..., 0]))
        rank = jnp.broadcast_to(cache.next_ranks(slots, meta)[:, None], own.shape)
        rows = cache.rows_of(k, v, meta, side, heads=g, rank=rank, acc=own)
        if ctx.phase != "prefill":
            rows = cache.join(slots.replace(stats={**slots.stats, "acc": slots.stats["acc"] + past}), rows)
        n = cache.count(rows)[..., None]
        score = jnp.where(rows.stats["rank"] >= n - recent, jnp.inf, rows.stats["acc"])
        return cache.Whole(cache.compact(rows, score, slots.width, limit))

    def commit(self, params, state, pending) -> State:
        return state.replace(layer=cache.commit(state.layer, pending))


@contract
class H2OMask:
    budget: int = operand("int", 256)
    recent: int = operand("int", 256)

    rotated = True

    def check(self):
        _check(self)
        expect("recent", self.recent, "at least 1: the incoming token counts", self.recent != 0)

    def needs(self) -> tuple[Need, ...]:
        return (RECEIVED,)

    def init_state(self, spec: Spec) -> State:
        stats = {"rank": jnp.int32, "acc": _acc(spec), "seen": bool}
        return State(cache.empty(spec, spec.length, per_head=True, stats=stats))

    def view(self, params, state, q, k, meta, ctx):
        slots = state.layer
        return (cache.view_of(slots, valid=slots.meta.valid & slots.stats["seen"]),), state.shared

    def pending(self, params, state, k, v, meta, side, evidence, ctx):
        slots, g, recent = state.layer, k.shape[2], params["recent"]
        rows = cache.rows_of(k, v, meta, side, heads=g)
        own, past = _received(evidence, g)
        rank = cache.behind(slots.stats["rank"], cache.next_ranks(slots, meta)[:, None], slots.used)
        valid = cache.behind(slots.meta.valid, rows.meta.valid, slots.used)
        acc = cache.behind(slots.stats["acc"] + past, own, slots.used)
        n = valid.sum(-1, keepdims=True)
        heavy = valid & (rank < n - recent) & (rank_of(forbid(acc, ~valid | (rank >= n - recent))) < params["budget"])
        seen = (n <= params["budget"] + recent) | heavy | (rank >= n + 1 - recent)
        acc = jnp.where(seen | (rank >= n - recent), acc, 0.0).astype(slots.stats["acc"].dtype)
        return cache.grow(slots, rows, ctx.phase, rank=rank, acc=acc, seen=seen)

    def commit(self, params, state, pending) -> State:
        return state.replace(layer=cache.commit(state.layer, pending))
