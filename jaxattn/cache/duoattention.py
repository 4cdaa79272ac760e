"""DuoAttention, deployed: retrieval heads keep everything, streaming heads sinks and recent tokens.

"DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads" (arXiv:2410.10819).

Gates per layer and kv head, trained by ``jaxattn.objectives.duoattention``, say how much a head needs the whole text.
The heads below the ``sparsity`` quantile stream: keys stay rotated at their true positions, rows between the sinks and
the window leave after they were attended once. So a prompt given at once is dense for all heads, a streaming head sees
a later chunk whole beside its sinks and window, and a decoding query sees ``recent`` tokens besides itself (one more
than the mask of training), as in the released code.

The released code permutes weights so that retrieval heads come first, with different shapes in each layer. Here the
permutation is an array and all layers have as many full slots as the layer with most retrieval heads; the streaming
heads that use spare full slots are masked to what they would have kept.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxattn.cache.streamingllm import keep_ends
from jaxattn.core import cache
from jaxattn.core.types import Const, Spec, State, View, contract, expect, operand
from jaxattn.registry import register


def retrieval_heads(gates, sparsity: float, *, seed: int | None = 0) -> np.ndarray:
    """bool [L, G]: the gates at or above their ``sparsity`` quantile, over all layers together.

    Args:
      gates: [L, G], higher for heads that retrieve.  sparsity: share of heads that stream; 0 none, 1 all.
      seed: of the noise below 1e-6 that breaks ties, so that equal gates do not all fall on one side; None for none.
    """
    gates = np.asarray(gates, np.float64)
    expect("gates", f"shape {gates.shape}", "[layers, kv heads]", gates.ndim == 2)
    expect("sparsity", sparsity, "between 0 and 1", 0 <= sparsity <= 1)
    if sparsity in (0, 1):
        return np.full(gates.shape, sparsity == 0)
    noise = 0.0 if seed is None else np.random.default_rng(seed).uniform(0, 1e-6, gates.shape)
    return gates + noise >= np.quantile(gates + noise, sparsity)


@register("cache")
def duoattention(gates, sparsity=0.5, sink=64, recent=256, *, seed=0) -> DuoAttention:
    """Retrieval heads with a full cache, streaming heads with ``sink + recent`` rows.

    Args:
      gates: [L, G], trained gates, binarised by ``retrieval_heads``; or bool [L, G], the retrieval heads themselves.
        Other heads with the same largest number per layer compile nothing.
      sparsity: share of kv heads that stream, of the whole model.  sink, recent: rows of a streaming head.
      seed: of the noise that breaks ties between gates.
    """
    gates = gates.numpy() if isinstance(gates, Const) else np.asarray(gates)
    heads = gates if gates.dtype == bool else retrieval_heads(gates, sparsity, seed=seed)
    expect("gates", f"shape {heads.shape}", "[layers, kv heads]", heads.ndim == 2)
    order = np.argsort(~heads, axis=1, kind="stable").astype(np.int32)
    counts = heads.sum(1).astype(np.int32)
    return DuoAttention(order, counts, int(counts.max()), bool((counts < counts.max()).any()), sink, recent)


@contract
class DuoAttention:
    """order: int32 [L, G], kv heads with the retrieval heads first.  counts: int32 [L], how many those are."""

    order: tuple = operand("array")
    counts: tuple = operand("array")
    full: int = 0
    uneven: bool = False
    sink: int = 64
    recent: int = operand("budget", 256)

    rotated = True

    def check(self):
        expect("sink", self.sink, "at least 0", self.sink >= 0)
        expect("recent", self.recent, "at least 1", not isinstance(self.recent, int) or self.recent >= 1)

    def init_state(self, spec: Spec) -> State:
        streaming = spec.kv_heads - self.full
        expect("gates", f"{self.full} retrieval heads", f"at most the {spec.kv_heads} kv heads", streaming >= 0)
        stores = {}
        if self.full:
            stores["full"] = cache.empty(spec.replace(kv_heads=self.full), spec.length, stats={"rank": jnp.int32})
        if streaming:
            width = min(self.sink + int(self.recent), spec.length)
            stores["stream"] = cache.empty(spec.replace(kv_heads=streaming), width, stats={"rank": jnp.int32})
        return State(stores)

    def _heads(self, params, ctx) -> dict:
        order = params["order"][ctx.layer]
        return {"full": order[: self.full], "stream": order[self.full :]}

    def view(self, params, state, q, k, meta, ctx) -> tuple[tuple[View, ...], object]:
        heads, views = self._heads(params, ctx), []
        for name, slots in state.layer.items():
            valid = None
            if name == "full" and self.uneven:
                rank, last = slots.stats["rank"], cache.count(slots)[..., None] - params["recent"]
                retrieves = (jnp.arange(self.full) < params["counts"][ctx.layer])[:, None]
                valid = slots.meta.valid & (retrieves | (rank < self.sink) | (rank >= last))
            views.append(cache.view_of(slots, valid=valid, heads=heads[name]))
        return tuple(views), state.shared

    def pending(self, params, state, k, v, meta, side, evidence, ctx) -> dict:
        heads, found, g = self._heads(params, ctx), {}, k.shape[2]
        for name, slots in state.layer.items():
            mine = heads[name]
            of = lambda x, mine=mine: jnp.take(x, mine, axis=2)  # noqa: E731
            new = (of(k), of(v), meta, {n: _side_of(x, mine, g) for n, x in side.items()})
            if name == "stream":
                found[name] = keep_ends(slots, *new, ctx.phase, start=self.sink, recent=params["recent"])
            else:
                rank = cache.next_ranks(slots, meta)[:, None]
                found[name] = cache.grow(slots, cache.rows_of(*new, rank=rank), ctx.phase)
        return found

    def commit(self, params, state, pending) -> State:
        return state.replace(layer={name: cache.commit(slots, pending[name]) for name, slots in state.layer.items()})


def _side_of(x, heads, kv_heads: int):
    """Side rows [B, N, 1|G|H] of some kv heads."""
    if x.shape[2] == 1:
        return x
    return jnp.take(x.reshape(*x.shape[:2], kv_heads, -1), heads, axis=2).reshape(*x.shape[:2], -1)
