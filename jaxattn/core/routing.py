"""One router for experts, heads and tokens: logits in, dense weights, chosen indices and raw statistics out.

What the logits come from (a linear layer, query norms) and what the weights multiply (experts, heads, rows)
is the caller's. Losses choose among the statistics: conventions differ only in constants.
"""

import jax
import jax.numpy as jnp

from jaxattn.core.select import top_k


def router(
    logits, k=None, *, norm="softmax", renorm=True, scale=1.0, mix=None, hard=False, key=None, valid=None
):
    """Routes every row to k of E choices.

    Args:
        logits: [..., E], computed in float32.
        k: choices per row; None weighs all of them (soft routing).
        norm: "softmax" over the choices, or "sigmoid" of each.
        renorm: divide the chosen probabilities by their sum (the weights of a row then sum to scale).
        scale: factor on the weights, e.g. k for Mixture-of-Head (arXiv:2410.11842).
        mix: [..., N, N] row-stochastic graph over the rows of logits [..., N, E]: probabilities become mix @
            p before the choice (similarity- or attention-aware routing). None is the identity.
        hard: weights are exactly 0 or scale in the forward pass, and have the gradient of scale * p
            (straight-through). With k=None the choice is the best one (softmax) or every p > 1/2 (sigmoid).
        key: adds Gumbel noise (logistic noise for "sigmoid") to the logits: with `hard`, the Gumbel
            straight-through estimator (arXiv:1611.01144).
        valid: bool [...], rows that count in the statistics and route at all; others get weights 0. None is
            all.

    Returns:
        weights [..., E] in the dtype of logits, zero where not chosen;
        index int32 [..., k], best first, ties to the lowest (k = E in plain soft routing);
        aux, float32 means over valid rows: P [E] probability, f [E] share of rows that chose e (sums to k), z
            squared log-sum-exp of the logits, entropy of p in nats.
    """
    e = logits.shape[-1]
    if norm not in ("softmax", "sigmoid"):
        raise ValueError(f"norm: expected 'softmax' or 'sigmoid', got {norm!r}")
    if k is not None and not 1 <= k <= e:
        raise ValueError(f"k: expected between 1 and {e} choices, got {k}")
    raw = logits.astype(jnp.result_type(jnp.float32, logits.dtype))
    count = jnp.broadcast_to(jnp.asarray(True if valid is None else valid), raw.shape[:-1])
    noisy = raw = jnp.where(count[..., None], raw, 0)  # whatever padding holds, NaN included, stays out
    if key is not None:
        noise = jax.random.gumbel if norm == "softmax" else jax.random.logistic
        noisy = raw + noise(key, raw.shape, raw.dtype)
    p = jax.nn.softmax(noisy, axis=-1) if norm == "softmax" else jax.nn.sigmoid(noisy)
    if mix is not None:
        if logits.ndim < 2 or mix.shape[-2:] != (logits.shape[-2],) * 2:
            raise ValueError(f"mix: expected [..., N, N] for logits {logits.shape}, got {mix.shape}")
        p = mix.astype(p.dtype) @ p
    _, index = top_k(p, k or (1 if hard and norm == "softmax" else e))
    if k is None and hard and norm == "sigmoid":
        chosen = p > 0.5
    else:
        chosen = jnp.any(index[..., None] == jnp.arange(e), axis=-2)
    chosen = chosen & count[..., None]
    aux = _statistics(raw, p, chosen, count, norm)
    if hard:
        weights = jnp.where(count[..., None], p, 0)
        weights = jax.lax.stop_gradient(chosen - weights) + weights
    else:
        weights = jnp.where(chosen, p, 0)
        if renorm:
            total = jnp.sum(weights, axis=-1, keepdims=True)
            weights = weights / jnp.maximum(total, jnp.finfo(p.dtype).tiny)
    return (weights * scale).astype(logits.dtype), index, aux


def _statistics(raw, p, chosen, count, norm):
    def mean(x):
        x = x.reshape(count.size, -1)
        w = count.reshape(-1, 1).astype(x.dtype)
        return jnp.sum(jnp.where(w > 0, x, 0), axis=0) / jnp.maximum(jnp.sum(w), 1)

    entropy = jnp.sum(jax.scipy.special.entr(p), axis=-1)
    if norm == "sigmoid":
        entropy = entropy + jnp.sum(jax.scipy.special.entr(1 - p), axis=-1)
    z = jax.nn.logsumexp(raw, axis=-1) ** 2
    return {"P": mean(p), "f": mean(chosen.astype(p.dtype)), "z": mean(z)[0], "entropy": mean(entropy)[0]}


def balance_loss(aux, kind="switch"):
    """Load-balancing loss from the statistics of `router`; the gradient flows through P, f is a count.

    kind: "switch": E * sum(P f) / sum(f), uniform routing gives 1 (arXiv:2101.03961);
        "moh": E^2 * mean(P f), uniform routing gives k (Mixture-of-Head, and the usual form for top-k
        experts).
    """
    p, f = aux["P"], jax.lax.stop_gradient(aux["f"])
    loss = p.shape[-1] * jnp.sum(p * f, axis=-1)
    if kind == "moh":
        return loss
    if kind == "switch":
        return loss / jnp.maximum(jnp.sum(f, axis=-1), jnp.finfo(p.dtype).tiny)
    raise ValueError(f"kind: expected 'switch' or 'moh', got {kind!r}")


def flip_rate(index_a, index_b):
    """Share of rows whose set of choices differs between two routings; both [..., k]."""
    return jnp.mean(jnp.any(jnp.sort(index_a, axis=-1) != jnp.sort(index_b, axis=-1), axis=-1))
