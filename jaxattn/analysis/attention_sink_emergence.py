"""Where attention sinks are: the sink metric and the norms that go with them.

"When Attention Sink Emerges in Language Models: An Empirical View".

The importance of key k (from 1) in a layer and head is the attention it receives, averaged over the queries that can
see it, alpha_k = 1 / (T - k + 1) sum_{i >= k} A_{ik}; the sink metric is the share of samples, layers and heads in
which alpha_k exceeds eps, in percent. The paper takes eps = 0.3 and T = 64 tokens without padding, natural, random or
repeated. Only sums over queries are needed, so the maps are never built: the sums are evidence that any bound model
gives. Sinks go with keys of small norm and hidden states of large norm: ``norm_profile``.

The operations that replace softmax in the paper, and its key biases, are attentions (``jaxattn.attention``). For the
metric of an unnormalised one, sum W / (sum W + 1e-8) over its rows.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.types import Array, Need, contract, expect
from jaxattn.registry import register


def importance(received: Array, valid: Array | None = None) -> Array:
    """alpha [S, L, H, T]: mean attention to each key over the queries at or after it.

    Args:
      received: [S, L, H, T], sums over the queries of causal attention.  valid: bool [S, T], False at padding.
    """
    expect("received", f"shape {received.shape}", "[samples, layers, heads, tokens]", received.ndim == 4)
    received = received.astype(jnp.promote_types(received.dtype, jnp.float32))
    live = jnp.ones((1, received.shape[-1]), bool) if valid is None else valid
    queries = jnp.cumsum(live[:, ::-1], axis=-1)[:, ::-1]  # available to key k, itself included
    return jnp.where(live[:, None, None], received / jnp.maximum(queries, 1)[:, None, None], 0.0)


def sink_rate(received: Array, *, eps=0.3, k: int | None = 1, valid: Array | None = None) -> Array:
    """Sink metric in percent: how often alpha_k > eps over samples, layers and heads.

    Args:
      received: [S, L, H, T], see ``importance``.  k: which key, from 1; None for all, giving [T].
      valid: bool [S, T]; padded samples do not count where they have no token.
    """
    t = received.shape[-1]
    expect("k", k, f"None or 1 to {t}", k is None or 1 <= k <= t)
    above = (importance(received, valid) > eps).mean((1, 2))  # [S, T]
    counts = jnp.ones_like(above) if valid is None else jnp.broadcast_to(valid, above.shape).astype(above.dtype)
    rate = 100.0 * (above * counts).sum(0) / jnp.maximum(counts.sum(0), 1.0)
    return rate if k is None else rate[k - 1]


def norm_profile(x: Array) -> Array:
    """[L, T] mean L2 norm per layer and position of rows [S, L, T, C], or of heads [S, L, T, H, D]."""
    expect("x", f"shape {x.shape}", "[S, L, T, C] or [S, L, T, H, D]", x.ndim in (4, 5))
    norms = jnp.linalg.norm(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=-1)
    return norms.mean((0, *range(3, norms.ndim)))


@contract
class _AttentionSinkEmergence:
    layers: tuple
    site: str = "llm"
    eps: float = 0.3
    norms: bool = False

    def _name(self, what: str, layer: int) -> str:
        return f"attention_sink_emergence.{what}.{layer}"

    def needs(self) -> tuple[Need, ...]:
        found = []
        for layer in self.layers:
            at = f"{self.site}.{layer}"
            found.append(Need(self._name("received", layer), "received", at, "all", over_heads=None, total=True))
            if self.norms:
                found += [Need(self._name(what, layer), what, at) for what in ("hidden", "keys")]
        return tuple(found)

    def reduce(self, evidence: dict[str, Array], valid: Array | None = None) -> dict[str, Array]:
        """Evidence of a forward pass to the figures of the paper.

        Returns: sink_rate [T] in percent;  importance [S, L, H, T];  with ``norms``, hidden_norm and key_norm [L, T].
        """

        def stacked(what):
            names = [self._name(what, layer) for layer in self.layers]
            missing = [name for name in names if name not in evidence]
            expect("evidence", f"none of {missing}", "the answers to this record's needs", not missing)
            return jnp.stack([evidence[name] for name in names], 1)

        received = stacked("received")
        found = {
            "sink_rate": sink_rate(received, eps=self.eps, k=None, valid=valid),
            "importance": importance(received, valid),
        }
        if self.norms:
            found |= {"hidden_norm": norm_profile(stacked("hidden")), "key_norm": norm_profile(stacked("keys"))}
        return found


@register("analysis")
def attention_sink_emergence(layers, *, site="llm", eps=0.3, norms=False) -> _AttentionSinkEmergence:
    """Attention sinks of a model (When Attention Sink Emerges in Language Models: An Empirical View).

    Bind the record beside the steering methods: it edits nothing, its needs are answered by the forward pass, and
    ``reduce(evidence)`` turns the answers into sink rates, importances and norms.

    Args:
      layers: how many layers the model has, or the numbers of those to look at.  site: the stack, "llm" or "vision".
      eps: importance above which a key is a sink.  norms: also the norms of hidden states and keys.
    """
    layers = tuple(range(layers)) if isinstance(layers, int) else tuple(layers)
    expect("layers", layers, "at least one layer", len(layers) > 0)
    return _AttentionSinkEmergence(layers, site, float(eps), norms)


__all__ = ["attention_sink_emergence", "importance", "norm_profile", "sink_rate"]
