"""TidalDecode: a few layers choose the tokens, the layers after them read only those.

"TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention" (arXiv:2410.05076).

The tokens with the largest logits hardly change from layer to layer. So each step the selection layers attend to the
whole cache and rank its tokens by q.k, and every later layer reads the ``budget`` best of the last selection layer.
Layers before the first selection layer, and the prompt, are dense. No sinks or recent tokens are added: a query sees
itself only if it was chosen. Nothing is evicted. The released sets belong to query heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core import cache, statistics
from jaxattn.core.select import keep_top
from jaxattn.core.types import Call, Selection, Spec, State, contract, expect, operand
from jaxattn.registry import register


@register("cache")
def tidaldecode(budget=256, select=(2, 13), *, per="q", reduce="max") -> TidalDecode:
    """Position-persistent sparse decoding.

    Args:
      budget: tokens a layer reads; another number of the same bucket compiles nothing.
      select: the layers that choose (numbers from the end may be negative); changing them compiles nothing. The authors
        take layer 2 and one re-selection layer found on a needle task (9 or 13 of 32).
      per: "q", a set per query head, as released; "kv", one per kv head, its query heads' logits reduced by ``reduce``,
        "max" or "sum".
    """
    return TidalDecode(budget, select, per, reduce)


@contract
class TidalDecode:
    budget: int = operand("budget", 256)
    select: tuple = operand("layers", (2, 13))
    per: str = "q"
    reduce: str = "max"

    rotated = True

    def check(self):
        expect("per", self.per, "'q' or 'kv'", self.per in ("q", "kv"))
        expect("reduce", self.reduce, "'max' or 'sum'", self.reduce in ("max", "sum"))
        expect("budget", self.budget, "at least 1", not isinstance(self.budget, int) or self.budget >= 1)

    def init_state(self, spec: Spec) -> State:
        b, heads = spec.batch, spec.heads if self.per == "q" else spec.kv_heads
        chosen = {
            "index": jnp.zeros((b, heads, 1, min(int(self.budget), spec.length + 1)), jnp.int32),
            "count": jnp.zeros((b, heads, 1), jnp.int32),
            "own": jnp.ones((b, 1, heads), bool),
            "made": jnp.zeros((), bool),
        }
        return State(cache.empty(spec, spec.length), chosen)

    def view(self, params, state, q, k, meta, ctx):
        slots, last = state.layer, state.shared
        everything = cache.view_of(slots)
        if ctx.phase != "decode":
            return (everything,), last
        selects = params["select"][ctx.layer]
        chosen = jax.lax.cond(selects, lambda: self._choose(params, everything, q, k, meta, last), lambda: last)
        dense = selects | ~chosen["made"]
        # Both ways of reading in one program: the keys that a layer does not want form empty lists, which cost nothing.
        hidden = everything.replace(meta=everything.meta.replace(valid=everything.meta.valid & dense))
        where = Selection(chosen["index"], jnp.where(dense, 0, chosen["count"]), unit=1, tile=1, distinct=True)
        own = jnp.repeat(chosen["own"], q.shape[2] // chosen["own"].shape[2], axis=2) | dense
        return (hidden, everything.replace(where=where, own=own)), chosen

    def _choose(self, params, view, q, k, meta, last: dict) -> dict:
        """Rank the cached rows and the new one by their logits."""
        call = Call(q, k, k, meta, meta, past=(view,))
        own, (past,) = statistics.row_logits(call, jnp.zeros((q.shape[0], 1), jnp.int32))
        logits = jnp.concatenate([past, own], -1)[:, :, 0]  # [B, H, W + 1]
        if self.per == "kv":
            seen = cache.per_kv_head(logits, k.shape[2], "max") > -jnp.inf
            logits = jnp.where(seen, cache.per_kv_head(logits, k.shape[2], self.reduce), -jnp.inf)
        w = logits.shape[-1] - 1
        index, valid = keep_top(logits, last["index"].shape[-1], count=params["budget"])
        itself = valid & (index == w)  # the highest index, hence the last of the list
        count = (valid & ~itself).sum(-1, dtype=jnp.int32)
        return {"index": jnp.where(itself, 0, index)[:, :, None], "count": count[..., None],
                "own": itself.any(-1)[:, None], "made": jnp.ones((), bool)}  # fmt: skip

    def pending(self, params, state, k, v, meta, side, evidence, ctx):
        return cache.grow(state.layer, cache.rows_of(k, v, meta, side), ctx.phase)

    def commit(self, params, state, pending) -> State:
        shared = {**state.shared, "made": jnp.zeros((), bool)}  # a selection does not outlive its step
        return State(cache.commit(state.layer, pending), shared)
