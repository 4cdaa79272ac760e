"""VMTC and CMAI: less redundancy in the image, so that instructions are followed ("Enhancing Instruction-Following Capability
of Visual-Language Models by Reducing Image Redundancy").

``vmtc``, on the tower's output: the K patches of largest [CLS] attention stay; the others are clustered by k-means on their
features, and each cluster becomes one token, the mean of its members, in the place of the first of them.

``cmai``, in the language model. With A_tt [T, T] and A_ti [T, N] the heads' mean attention that the text's rows give to text
and to image in layer l,

    F = A_tt A_ti,

what the words that a word reads look at. In the next layer, of each text row the pairs with the lowest F (a share rho of the
image, or all below the row's mean) get no attention at all; a row keeps at least one image token. Rows decoded later do as
the last row of the prompt does. T x N bits are handed from layer to layer.

The abstract leaves open: centres at even strides, Euclidean distance or cosine, rho = 0.5, layers from the third one, head
means, and what decoded rows do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core import statistics
from jaxattn.core.labels import is_vision
from jaxattn.core.reduce import check_budget, choose, count_of, evidence_rows, reduce_merge, rows_left, valid_rows
from jaxattn.core.select import forbid, rank_of
from jaxattn.core.slots import compact, kmeans, merge_tokens
from jaxattn.core.types import Array, Call, Ctx, Meta, Need, Part, State, contract, expect, operand
from jaxattn.registry import register

BITS = 24  # pairs that one float32 holds exactly
HIDDEN = -1e30


# ----------------------------------------------------------------------------------------------------------------- VMTC
def vmtc_condense(x: Array, scores: Array, keep, clusters: int, rows: int, *, steps: int = 10, metric: str = "cosine",
                  valid: Array | None = None):
    """Primary rows as they are, the others as means of clusters.

    Args:
      x: [B, N, C], clustered by these features.  scores: [B, N].  keep: int32, primary rows; keep + clusters <= ``rows``.
      clusters: condensed rows.  steps, metric: of ``slots.kmeans``.  valid: bool [B, N].
    Returns: (rows [B, rows, C] in the order of their first members, slot int32 [B, N], index int32 [B, rows], valid bool
      [B, rows]).
    """  # fmt: skip
    b, n = scores.shape
    valid = jnp.ones((b, n), bool) if valid is None else valid
    primary = choose(scores, keep, valid)
    rest = valid & ~primary
    cluster = kmeans(x, rest, clusters, steps, metric=metric)
    at = jnp.arange(n)
    first = jax.vmap(lambda c: jnp.full(clusters + 1, n).at[c].min(at))(jnp.where(rest, cluster, clusters))
    leader = jnp.where(rest, jnp.take_along_axis(first, jnp.maximum(cluster, 0), axis=1), at)
    stays = primary | (rest & (leader == at))
    index, live = compact(stays, rows)
    place = jnp.cumsum(stays, -1) - 1
    slot = jnp.where(valid, jnp.take_along_axis(place, leader, axis=-1), -1).astype(jnp.int32)
    return merge_tokens(x, slot, rows), slot, index, live


@contract
class _VMTC:
    keep: int = operand("budget")
    clusters: int = 16
    layer: int = -2
    steps: int = 10
    metric: str = "cosine"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, "keep", self.positions)
        expect("clusters", self.clusters, "at least 1", self.clusters >= 1)
        expect("steps", self.steps, "0 or more", self.steps >= 0)

    def needs(self):
        return (Need("cls", what="received", at=f"vision.{self.layer}", rows="cls", over_heads="mean"),)

    def count(self, n: int) -> int:
        """Rows that are left of ``n``, without the empty ones of the budget's bucket."""
        return min(n, self.keep + self.clusters)

    def rows(self, n):
        return rows_left(self.keep, n, "keep", self.clusters)

    def apply(self, params, state, tokens, evidence, ctx):
        n, scores = tokens.x.shape[1], evidence_rows(evidence, "cls", tokens)
        x, slot, index, live = vmtc_condense(
            tokens.x, scores, count_of(params, n - self.clusters), self.clusters, self.rows(n), steps=self.steps,
            metric=self.metric, valid=valid_rows(tokens),
        )  # fmt: skip
        return reduce_merge(tokens, x, slot, index, live, positions=self.positions), state, {"scores": scores}


@register("tokens")
def vmtc(keep: int, clusters: int = 16, layer: int = -2, steps: int = 10, metric: str = "cosine", positions: str = "original"):
    """Keep ``keep`` image tokens by [CLS] attention and condense the others to ``clusters``. For the site "vision".

    Args:
      layer: of the tower, whose [CLS] row counts.  steps: of k-means, from centres at even strides.
      metric: of the features, "cosine" or "l2".  positions: rotary positions "original" or "fresh".
    """
    return _VMTC(keep, clusters, layer, steps, metric, positions)


# ----------------------------------------------------------------------------------------------------------------- CMAI
def cmai_focus(text: Array, image: Array) -> Array:
    """F [..., T, N] from what text rows give to text [..., T, T] and to image [..., T, N]."""
    return jnp.einsum("...ts,...sn->...tn", text, image, preferred_element_type=jnp.float32)


def cmai_inhibited(focus: Array, image: Array, rho, rule: str = "share") -> Array:
    """bool [..., T, N]: pairs that get no attention.

    Args:
      focus: [..., T, N].  image: bool, broadcastable to it; other keys are never inhibited.
      rule: "share", of each row the floor(rho n) image keys of lowest focus; "mean", those below the row's mean. The
        largest always stays, ties go to the lowest index.
    """
    expect("rule", repr(rule), "'share' or 'mean'", rule in ("share", "mean"))
    image = jnp.broadcast_to(image, focus.shape)
    n = image.sum(-1, keepdims=True)
    rank = rank_of(forbid(focus, ~image))
    if rule == "share":
        low = rank >= n - jnp.floor(rho * n).astype(n.dtype)
    else:
        low = focus < jnp.where(image, focus, 0).sum(-1, keepdims=True) / jnp.maximum(n, 1)
    return low & image & (rank > 0)


def pack(pairs: Array) -> Array:
    """float32 [B, M, ceil(T / 24)] whose numbers hold the bits of ``pairs`` bool [B, T, M], row t at bit t % 24."""
    b, t, m = pairs.shape
    bits = jnp.pad(pairs, [(0, 0), (0, -t % BITS), (0, 0)]).reshape(b, -1, BITS, m).astype(jnp.float32)
    return jnp.einsum("bwim,i->bmw", bits, 2.0 ** jnp.arange(BITS), precision="highest")


@contract
class _Inhibit:
    """Takes the logits of inhibited pairs away: by the bits of ``words`` key rows in a prompt, by one flag per key later."""

    words: int
    inner: object = None

    def fields(self):
        return frozenset() if self.inner is None else self.inner.fields()

    def __call__(self, logits, q, k, row, key):
        if self.inner is not None:
            logits = self.inner(logits, q, k, row, key)
        if not self.words:
            return jnp.where(key["cmai"] > 0.5, HIDDEN, logits)
        word, bit = (row[f"cmai.{x}"].astype(jnp.int32) for x in ("word", "bit"))
        hidden = 0
        for w in range(self.words):
            hidden += ((key[f"cmai.{w}"].astype(jnp.int32) >> bit) & 1) * (word == w).astype(jnp.int32)
        return jnp.where(hidden > 0, HIDDEN, logits)


def _text(groups: tuple) -> tuple[int, int]:
    return next(((a, b) for name, a, b in groups if name == "text"), (0, 0))


@contract
class _CMAI:
    rho: float = operand("scalar")
    layers: tuple | None = operand("layers")
    rule: str = "share"
    first: int = 0

    def check(self):
        expect("rho", self.rho, "a share in [0, 1]", not isinstance(self.rho, float) or 0 <= self.rho <= 1)
        expect("rule", repr(self.rule), "'share' or 'mean'", self.rule in ("share", "mean"))

    def _on(self, params: dict, layer) -> Array:
        layers = jnp.asarray(params["layers"])
        at = jnp.minimum(layer, layers.shape[0] - 1)
        return layers[at] & (layer >= self.first) & (layer < layers.shape[0])

    def blank(self, batch: int, rows: int, groups: tuple) -> Array:
        start, stop = _text(groups)
        return jnp.zeros((batch, rows, -(-(stop - start) // BITS)), jnp.float32)

    def observe(self, params: dict, state: State, call: Call, part: Part, ctx: Ctx) -> State:
        if ctx.phase not in ("train", "prefill"):
            return state
        (start, stop), b = _text(ctx.groups), call.q.shape[0]

        def look():
            seen = jax.lax.stop_gradient(call)
            index = jnp.broadcast_to(jnp.arange(start, stop), (b, stop - start))
            given = statistics.rows(seen, index, jax.lax.stop_gradient(part.lse))[0].mean(1)  # [B, T, M]
            image = jnp.broadcast_to(is_vision(call.k_meta), (b, call.k.shape[1]))[:, None]
            focus = cmai_focus(given[:, :, start:stop], jnp.where(image, given, 0))
            return pack(cmai_inhibited(focus, image, params["rho"], self.rule))

        return state.replace(shared=jax.lax.cond(self._on(params, ctx.layer + 1), look, lambda: jnp.zeros_like(state.shared)))

    def side(self, params: dict, state: State, meta: Meta, ctx: Ctx) -> dict:
        """Which keys rows after the prompt do not see: those of its last row."""
        if ctx.phase not in ("train", "prefill"):
            return {"cmai": jnp.zeros((*ctx.hidden.shape[:2], 1), jnp.float32)}
        start, stop = _text(ctx.groups)
        order = jnp.where(meta.valid, jnp.asarray(meta.pos), -1)[:, start:stop]
        last = jnp.broadcast_to(jnp.argmax(order, -1), state.shared.shape[:1])
        word = jax.vmap(lambda words, t: words[:, t // BITS])(state.shared, last).astype(jnp.int32)
        return {"cmai": ((word >> (last % BITS)[:, None]) & 1).astype(jnp.float32)[..., None]}

    def call(self, params: dict, state: State, call: Call, ctx: Ctx) -> Call:
        if ctx.phase not in ("train", "prefill"):
            return call.replace(score_mod=_Inhibit(0, call.score_mod))
        start, stop = _text(ctx.groups)
        t = jnp.arange(call.q.shape[1]) - start
        mine = (t >= 0) & (t < stop - start)
        rows = {"cmai.word": jnp.where(mine, t // BITS, -1), "cmai.bit": jnp.where(mine, t % BITS, 0)}
        row = call.row | {name: x.astype(jnp.float32)[None, :, None] for name, x in rows.items()}
        words = state.shared.shape[-1]
        key = {name: x for name, x in call.key.items() if name != "cmai"}
        key |= {f"cmai.{w}": state.shared[:, :, w : w + 1] for w in range(words)}
        return call.replace(row=row, key=key, score_mod=_Inhibit(words, call.score_mod) if words else call.score_mod)


@register("steering")
def cmai(rho: float = 0.5, layers: tuple[int, ...] | None = None, rule: str = "share"):
    """Cross-modal attention inhibition: text rows do not read image tokens that their words do not look at.

    Args:
      rho: share of the image tokens that each text row loses; 0 changes nothing.
      layers: layers whose attention is inhibited, each by the focus of the layer above it; None: all from the third one.
      rule: "share", or "mean" (pairs below the row's mean focus, whatever rho).
    rho and layers are operands. Behind a cut of rows the first layer is not inhibited.
    """
    return _CMAI(float(rho), layers, rule, 2 if layers is None else 1)


__all__ = ["cmai", "cmai_focus", "cmai_inhibited", "pack", "vmtc", "vmtc_condense"]
