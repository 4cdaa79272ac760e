"""ToDRE: diverse tokens before the language model, none at all once the text stops reading them ("ToDRE: Visual Token
Pruning via Diversity and Task Awareness for Efficient Large Vision-Language Models").

``todre``, after the projector: the first pick is the token the tower's [CLS] attends to most; then, k - 1 times, the
token least like those picked, by the sum of its cosines to them ("sum", second version of the paper) or by the largest
of them ("max", the first version's k-center).

``todre_exit``, after layer 7/8 L of the language model: with A averaged over heads and V, T the image and the text rows,

    a_tv = sum_{i in T, j in V} A_ij / sum_{i in T, j} A_ij,     a_vt = sum_{i in V, j in T} A_ij / sum_{i in V, j} A_ij

an image whose a_tv and a_vt are both below tau leaves the layers that follow, in decoding too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.reduce import (
    check_budget,
    count_of,
    dispose,
    evidence_rows,
    label,
    picked,
    reduce_mask,
    rows_left,
    valid_rows,
)
from jaxattn.core.select import diverse
from jaxattn.core.types import Array, Need, contract, expect, operand
from jaxattn.registry import register


def todre_picks(vision: Array, pivot, k: int, *, combine: str = "sum", valid: Array | None = None) -> Array:
    """int32 [k]: picks in their order, ``pivot`` (int32) first. vision [N, D] projector output, valid bool [N]."""
    forbidden = None if valid is None else ~valid
    return diverse(vision, k, first=pivot, combine=combine, forbidden=forbidden)


def todre_select(vision: Array, attention_cls: Array, k: int, *, combine: str = "sum") -> Array:
    """int32 [B, k] ascending: the tokens that ToDRE keeps.

    vision: [B, N, D].  attention_cls: [B, N], the heads' mean [CLS] row of the tower's last layer, CLS column left out.
    """
    ok = attention_cls.shape == vision.shape[:2]
    expect("attention_cls", f"shape {attention_cls.shape}", f"{vision.shape[:2]}", ok)
    pick = jax.vmap(lambda z, s: todre_picks(z, jnp.argmax(s), k, combine=combine))
    return jnp.sort(pick(vision, attention_cls), axis=-1)


def group_ratios(attention: Array, vision: Array, text: Array) -> tuple[Array, Array]:
    """(a_tv, a_vt) [B] from a map [B, S, S] averaged over heads; vision, text: bool [B, S] rows of each group."""
    def ratio(rows, columns):
        mine = attention * rows[:, :, None]
        total = mine.sum((1, 2))
        return jnp.where(total > 0, (mine * columns[:, None]).sum((1, 2)) / jnp.where(total > 0, total, 1), 0)

    return ratio(text, vision), ratio(vision, text)


@contract
class _ToDRE:
    keep: int = operand("budget")
    combine: str = "sum"
    pivot: str = "cls"
    layer: int = -1
    thumbnail: int | None = None
    seed: int = operand("int", 0)
    mode: str = "keep"
    positions: str = "original"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)
        expect("combine", repr(self.combine), "'sum' or 'max'", self.combine in ("sum", "max"))
        expect("pivot", repr(self.pivot), "'cls' or 'random'", self.pivot in ("cls", "random"))

    def needs(self):
        if self.pivot == "random":
            return ()
        return (Need("cls", what="received", at=f"vision.{self.layer}", rows="cls"),)

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        (b, n), valid = tokens.x.shape[:2], valid_rows(tokens)
        if self.pivot == "cls":
            scores = evidence_rows(evidence, "cls", tokens)
        else:
            key = jax.random.key(params["seed"])
            scores = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (n,)))(jnp.arange(b))
        free = valid
        if self.thumbnail is not None:
            free = valid & (label(tokens, "crop") == self.thumbnail)
            free = jnp.where(free.any(-1, keepdims=True), free, valid)
        pivot = jnp.argmax(jnp.where(free, scores, -jnp.inf), axis=-1)
        count, k = count_of(params, n), min(rows_left(self.keep, n, "keep"), n)
        x = jax.lax.stop_gradient(tokens.x)
        picks = jax.vmap(lambda z, p, ok: todre_picks(z, p, k, combine=self.combine, valid=ok))(x, pivot, valid)
        return dispose(tokens, picked(picks, count, valid), self.rows(n), self.mode, self.positions), state, {"pivot": pivot}


@register("tokens")
def todre(keep: int, combine: str = "sum", pivot: str = "cls", layer: int = -1, thumbnail: int | None = None,
          seed: int = 0, mode: str = "keep", positions: str = "original"):
    """Keep ``keep`` image tokens that differ from each other. For the site "project"; ``todre_exit`` is the second stage.

    Args:
      keep: image tokens per image (all crops or frames together).  combine: "sum" or "max" of the cosines to the picks.
      pivot: "cls", or "random" (by ``seed``) for towers without a class token.  layer: of the tower, for the pivot.
      thumbnail: the crop (label "crop") that the pivot must come from; None: any row, the best over frames for videos.
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    """  # fmt: skip
    return _ToDRE(keep, combine, pivot, layer, thumbnail, seed, mode, positions)


@contract
class _ExitCut:
    tau: float = operand("scalar", 0.1)

    def needs(self):
        return (Need("between", what="between", at="last"),)

    def rows(self, n):
        return n

    def apply(self, params, state, tokens, evidence, ctx):
        expect("evidence", sorted(evidence) or "none", "the entry 'between'", "between" in evidence)
        mass = evidence["between"]
        ok = mass.ndim == 3 and mass.shape[1] >= 2
        expect("evidence['between']", f"shape {tuple(mass.shape)}", "[B, groups, groups], image rows first, text next", ok)
        stay = (mass[:, 1, 0] >= params["tau"]) | (mass[:, 0, 1] >= params["tau"])
        out = reduce_mask(tokens, jnp.broadcast_to(stay[:, None], tokens.x.shape[:2]))
        return out, state, {"a_tv": mass[:, 1, 0], "a_vt": mass[:, 0, 1]}


@contract
class _Exit:
    tau: float = operand("scalar", 0.1)
    layer: int | None = None

    def check(self):
        expect("tau", self.tau, "0 or more", self.tau >= 0)

    def sites(self, layers):
        layer = min(7 * layers // 8, layers - 2) if self.layer is None else self.layer
        expect("layer", layer, f"a layer below the last of {layers}", 0 <= layer < layers - 1)
        return (layer + 1,)

    def schedule(self, layers):
        return tuple((site, _ExitCut(self.tau)) for site in self.sites(layers))


@register("tokens")
def todre_exit(tau: float = 0.1, layer: int | None = None):
    """Remove all image tokens behind layer ``layer`` where neither text reads image nor image reads text (site "llm").

    Args:
      tau: both shares of attention must be below it; 0 never removes, above 1 always.
      layer: 0-based layer whose attention decides; None: int(7 L / 8), or the last but one of a shallow model.
    Each image of a batch decides for itself, so rows are masked, not gathered.
    """
    return _Exit(tau, layer)
