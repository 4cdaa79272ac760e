"""ZeroTuning: one number on the initial token.

"ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training".

The probability of the first token is multiplied by gamma and the row renormalised, in chosen layers and heads and for
every query. That is exactly a bias of log(gamma) on its logit, which is how it runs here: with a_0 the first token's
probability, the others become a_j / (1 + (gamma - 1) a_0), so gamma > 1 flattens their differences and gamma < 1
sharpens them, the more the larger a_0. Ratios between the other keys do not change.

Which heads, and which gamma, is found on validation data: ``zerotuning_search``. The fraction of heads kept is not
certain from the paper; ``top_frac`` is an argument.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.attend import take_heads
from jaxattn.core.types import Array, Call, Ctx, State, contract, expect, operand
from jaxattn.registry import register
from jaxattn.steering.classes import per_key, per_query_head

_LEAST = 1e-30  # gamma 0 in a logarithm: the key is masked wherever there is another one


@contract
class _ZeroTuning:
    gamma: object = operand("heads")  # a table: a number and a table share programs
    on_heads: tuple | None = operand("heads")  # not "heads": that is a socket's method
    layers: tuple | None = operand("layers")
    key: int = 0

    def call(self, params: dict, state: State, call: Call, ctx: Ctx) -> Call:
        gamma, heads, on = (jnp.asarray(params[name])[ctx.layer] for name in ("gamma", "on_heads", "layers"))
        bias = jnp.where(on, heads * jnp.log(jnp.maximum(gamma, _LEAST)), 0.0)  # [H]
        g = call.k.shape[2]

        def tilt(meta, key, heads):
            mine = bias[None, None] if heads is None else take_heads(bias[None, None], heads, g)
            tilted = jnp.where(per_query_head(per_key(jnp.asarray(meta.pos) == self.key), mine.shape[-1]), mine, 0.0)
            if "bias" in key:
                tilted = tilted + per_query_head(key["bias"], mine.shape[-1])
            return {**key, "bias": tilted}

        past = tuple(v.replace(key=tilt(v.meta, v.key, v.heads)) for v in call.past)
        return call.replace(key=tilt(call.k_meta, call.key, None), past=past)


@register("steering")
def zerotuning(gamma, *, heads=None, layers=None, key=0) -> _ZeroTuning:
    """ZeroTuning: scale the attention to the initial token by gamma and renormalise, at no cost (Unlocking the Initial
    Token's Power to Enhance Large Language Models Without Training).

    Args:
      gamma: factor, at least 0; 1 changes nothing, 0 hides the token. A number, [H] or [L, H].
      heads: query heads it acts on: None for all, head numbers (the same in every layer), or a 0/1 table [H] or [L, H].
      layers: layer numbers, None for all.  key: position (``meta.pos``) of the token that is scaled.
    All but ``key`` are operands: changing them compiles nothing. Raises ValueError for a negative gamma.
    """
    values = np.asarray(gamma, np.float32)
    expect("gamma", values.min(initial=0.0), "factors of at least 0", bool((values >= 0).all()))
    return _ZeroTuning(values if values.ndim else float(values), heads, layers, key)


def prediction_entropy(logits: Array, weights: Array | None = None) -> Array:
    """Mean entropy in nats of softmax(logits) [..., V]; the criterion that needs no labels.

    weights: [...] of the predictions (0 leaves one out), default all alike."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_p = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0), -1)
    weights = jnp.ones_like(entropy) if weights is None else jnp.broadcast_to(weights, entropy.shape)
    return jnp.sum(entropy * weights) / jnp.maximum(weights.sum(), 1e-9)


def zerotuning_search(evaluate, heads: int, layers: int, grid, *, mode="supervised", top_frac=0.4, probe=2.0) -> dict:
    """Find the heads and the gamma of ZeroTuning on validation data.

    Every head number is tuned alone, in all layers, with the factor ``probe``: those that improve are up-effective,
    those that lose are down-effective. Of the more numerous type the ``top_frac`` with the largest effect is kept (at
    least one), and gamma is the best of ``grid`` on those heads. 1 is always tried: the result is no worse than none.

    Args:
      evaluate: (gamma table float32 [L, H]) -> number; the table is an array operand, so nothing recompiles.
      heads, layers: H and L.  grid: factors to try.
      mode: "supervised", the number is to be maximised (accuracy), or "unsupervised", it is to be minimised (see
        ``prediction_entropy``).
    Returns: artifact of numpy arrays: heads bool [H], gamma float32 [], up bool [] (dominant type), effect float32 [H],
      metric float32 [] and base float32 [] (found, and untouched). ``zerotuning(artifact["gamma"],
      heads=artifact["heads"])`` is the method.
    """
    expect("mode", repr(mode), "'supervised' or 'unsupervised'", mode in ("supervised", "unsupervised"))
    expect("top_frac", top_frac, "a fraction in (0, 1]", 0 < top_frac <= 1)
    expect("probe", probe, "a factor above 1", probe > 1)
    sign = 1.0 if mode == "supervised" else -1.0

    def score(gamma, chosen):
        table = np.ones((layers, heads), np.float32)
        table[:, chosen] = gamma
        return sign * float(evaluate(table))

    base = score(1.0, [])
    effect = np.array([score(probe, [h]) - base for h in range(heads)], np.float32)
    up = (effect > 0).sum() >= (effect < 0).sum()
    size = effect if up else -effect
    moved = np.flatnonzero(size > 0)
    keep = max(1, round(top_frac * len(moved)))
    best_heads = np.sort(moved[np.argsort(-size[moved], kind="stable")[:keep]])
    found = [(base, 1.0)]
    if len(best_heads):
        found += [(score(float(g), best_heads), float(g)) for g in grid if float(g) != 1.0]
    metric, gamma = max(found, key=lambda pair: pair[0])
    table = np.zeros(heads, bool)
    table[best_heads] = True
    return {
        "heads": table, "gamma": np.float32(gamma), "up": np.bool_(up), "effect": sign * effect,
        "metric": np.float32(sign * metric), "base": np.float32(sign * base),
    }  # fmt: skip


__all__ = ["prediction_entropy", "zerotuning", "zerotuning_search"]
