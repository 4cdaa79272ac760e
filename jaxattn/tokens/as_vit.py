"""AS-ViT: image tokens leave a vision transformer where their attention from CLS falls below a trained threshold
("Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting Self-Attention").

A layer scores its tokens by s_j = sum_h a_hj g_hj, a_hj the CLS row of its attention and g_hj = |o_hj| / sum_h |o_hj| the
share of head h in the token's output. A cut keeps s_j > theta, one trained scalar per cut.

In training (phase "train", mode "mask") no token leaves: its decision, 1 or 0 with the gradient of
sigmoid((s - theta) / tau), becomes the row's ``Meta.weight``: other rows attend to it with that weight and it always
attends to itself, so that the loss says what each token would have been worth (``policy_attention_reference`` is the
formula; its eps is left out, since a row's own key is mass enough). A decision replaces the one before; a token that no row
sees scores 0, so it stays away. Otherwise what falls below leaves: ``valid`` is cleared, or with a ``capacity`` rows are
gathered.

``jaxattn.objectives.as_vit`` trains thresholds and model to a budget of multiplications.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.reduce import check_budget, choose, dispose, evidence_rows, follow_rows, valid_rows
from jaxattn.core.types import Array, Need, State, contract, expect
from jaxattn.registry import register
from jaxattn.tokens.staged import stage_sites

SCORES = ("last", "sum", "ema")
DECAY = 0.99
FIRST = 2  # the first layer that scores, where scores of layers are joined


def as_vit_scores(cls_attention: Array, head_out: Array) -> Array:
    """s [B, N] of the tokens: CLS row of each head ``cls_attention`` [B, H, N], weighed with the heads' shares in the norm of
    the tokens' outputs ``head_out`` [B, N, H, Dv] (before the output projection)."""
    square = jnp.sum(jnp.square(head_out.astype(jnp.promote_types(head_out.dtype, jnp.float32))), -1)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    share = norm / (norm.sum(-1, keepdims=True) + 1e-8)
    return jnp.einsum("bhn,bnh->bn", cls_attention, share)


def policy_attention_reference(q: Array, k: Array, v: Array, policy: Array, eps: float = 1e-6) -> tuple[Array, Array]:
    """The published attention, plainly: (out [B, N, H, D], probabilities [B, H, N, N]); small N only.

    exp(logit - row's maximum) of token j counts policy_j times, for j itself once, and eps joins the mass, spread evenly.
    q, k, v: [B, N, H, D].  policy: [B, N].  ``attend`` with ``Meta.weight`` is this with eps = 0."""
    n = q.shape[1]
    logits = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    e = jnp.exp(logits - logits.max(-1, keepdims=True))
    e = e * jnp.where(jnp.eye(n, dtype=bool), 1.0, policy[:, None, None])
    p = (e + eps / n) / (e.sum(-1, keepdims=True) + eps)
    return jnp.einsum("bhij,bjhd->bihd", p, v), p


def straight_through(scores: Array, threshold: Array, tau: float = 1e-4) -> Array:
    """1 where the score is above the threshold, else 0, with the gradient of sigmoid((scores - threshold) / tau)."""
    soft = jax.nn.sigmoid((scores - threshold) / tau)
    return (soft > 0.5).astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))


def layer_flops(n: Array | float, dim: int, mlp_ratio: float = 4.0) -> Array | float:
    """Multiplications of a layer of width ``dim`` for n tokens: projections, two products of attention, feed-forward."""
    return (4 + 2 * mlp_ratio) * dim**2 * n + 2 * dim * n**2


@contract
class _ASViTCut:
    layers: tuple  # those whose scores it reads, since the cut before
    threshold: float
    score: str = "last"
    tau: float = 1e-4
    capacity: int | None = None
    even: bool = False

    carries = "as_vit"

    def init(self, key, spec) -> dict:
        """threshold: scalar."""
        return {"threshold": jnp.float32(self.threshold)}

    def needs(self):
        return tuple(need for i in self.layers for need in (
            Need(f"cls.{i}", what="received", at=f"vision.{i}", rows="cls", over_heads=None, through=True),
            Need(f"heads.{i}", what="head_out", at=f"vision.{i}", through=True)))  # fmt: skip

    def rows(self, n):
        return n if self.capacity is None else min(self.capacity, n)

    def joined(self, found: list[Array], before: Array | None) -> Array:
        """[B, N]: the layers' scores as one, on top of those that the cut before read."""
        if self.score == "last":
            return found[-1]
        total = before
        for s in found:
            step = s if self.score == "sum" else (1 - DECAY) * s
            total = s if total is None else (total if self.score == "sum" else DECAY * total) + step
        return total

    def apply(self, params, state, tokens, evidence, ctx):
        n, valid, meta = tokens.x.shape[1], valid_rows(tokens), tokens.meta
        found = [as_vit_scores(evidence_rows(evidence, f"cls.{i}", tokens, heads=True), evidence[f"heads.{i}"])
                 for i in self.layers]  # fmt: skip
        scores = jnp.where(valid, self.joined(found, None if isinstance(state.shared, tuple) else state.shared), 0.0)
        before = valid.astype(scores.dtype) if meta.weight is None else meta.weight
        if ctx.phase == "train" and self.capacity is None:
            policy = jnp.where(valid, straight_through(scores, params["threshold"], self.tau), 0.0)
            out, carried = tokens.replace(meta=meta.replace(weight=policy)), scores
        else:
            keep, mode = (scores > params["threshold"]) & valid, "mask" if self.capacity is None else "keep"
            if self.even:
                keep = choose(scores, jnp.broadcast_to(keep.sum() // len(keep), len(keep)), valid)
            if self.capacity is not None:
                keep = choose(scores, self.rows(n), keep)
            policy, out = keep.astype(scores.dtype), dispose(tokens, keep, self.rows(n), mode)
            carried = follow_rows(scores, keep, self.rows(n), mode)
        special = n if ctx.hidden is None else ctx.hidden.shape[1]
        return out, State(shared=carried), {"scores": scores, "policy": policy,
                                            "saved": _saved(before, policy, special - n, tokens, ctx)}  # fmt: skip


def _saved(before: Array, after: Array, special: int, tokens, ctx) -> Array:
    """[B]: the share of all layers' multiplications that the layers from here on are spared by this cut."""
    n0 = tokens.x.shape[1] if tokens.slot is None else tokens.slot.shape[1]
    old, new = (layer_flops(x.sum(-1) + special, ctx.spec.dim) for x in (before, after))
    return (1 - ctx.layer / ctx.spec.layers) * (old - new) / layer_flops(n0 + special, ctx.spec.dim)


@contract
class _ASViT:
    layers: tuple | None = None
    thresholds: tuple | None = None
    score: str = "last"
    tau: float = 1e-4
    capacity: tuple | None = None
    even: bool = False

    place = "vision"

    def check(self):
        expect("score", repr(self.score), f"one of {SCORES}", self.score in SCORES)
        expect("tau", self.tau, "above 0", self.tau > 0)
        cuts = 3 if self.layers is None else len(self.layers)
        for name, value in (("thresholds", self.thresholds), ("capacity", self.capacity)):
            expect(name, value, f"one per cut, {cuts}", value is None or len(value) == cuts)
        expect("thresholds", None, "as many as layers, unless there are 3", self.thresholds is not None or cuts == 3)
        for rows in self.capacity or ():
            check_budget(rows)

    def sites(self, layers):
        return stage_sites(self.layers, (4, 7, 10), 12, layers)

    def schedule(self, layers):
        given = (0.004, 0.012, 0.02) if self.score == "sum" else (0.001, 0.002, 0.003)
        thresholds = given if self.thresholds is None else self.thresholds
        capacity = (None,) * len(thresholds) if self.capacity is None else self.capacity
        cuts, last = [], min(FIRST, self.sites(layers)[0] - 1)
        for site, threshold, rows in zip(self.sites(layers), thresholds, capacity, strict=True):
            read = (site - 1,) if self.score == "last" else tuple(range(last, site))
            cuts.append((site, _ASViTCut(read, threshold, self.score, self.tau, rows, self.even)))
            last = site
        return tuple(cuts)


@register("tokens")
def as_vit(layers: tuple[int, ...] | None = None, thresholds: tuple[float, ...] | None = None, score: str = "last",
           tau: float = 1e-4, capacity: tuple[int, ...] | None = None, even: bool = False):
    """Drop image tokens inside a vision tower with CLS where their score falls below trained thresholds (site "vision").

    Args:
      layers: numbers of layers done when the cuts happen; None: the published 4, 7 and 10 of 12, scaled to the depth.
      thresholds: where training begins; None: the published ones, for 196 tokens (scores of N tokens are about 1 / N).
      score: "last" (of the layer just done), "sum" or "ema" (0.99) over the layers since the third.
      tau: temperature of the decision's gradient.
      capacity: rows that each cut leaves room for, which shortens the arrays (those of lowest score beyond it leave); None:
        rows stay and are hidden, which training needs.
      even: every image keeps as many tokens as the batch does on average, as the authors measure speed.
    """  # fmt: skip
    return _ASViT(layers, thresholds, score, tau, capacity, even)


__all__ = ["as_vit", "as_vit_scores", "layer_flops", "policy_attention_reference", "straight_through"]
