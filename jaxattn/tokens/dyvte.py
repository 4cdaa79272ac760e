"""DyVTE: all image tokens leave the language model at the layer where the text has read them, which a small router sees on
the text alone ("Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings").

Behind layer l, with h the hidden rows of the prompt's text behind the image and h_S the last of them,

    f = [mean_{i < S} h_i, h_S],    z = gelu(f W_1) W_2,    exit at the first layer where z_1 > z_0

Text keeps its rotary positions; caches of later layers hold no image token. How routers learn: ``objectives.dyvte``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.labels import KIND_TEXT, KIND_VISION, kind
from jaxattn.core.reduce import reduce_keep, reduce_mask
from jaxattn.core.types import Array, Meta, Need, Spec, contract, expect, operand
from jaxattn.registry import register

ANSWER = "answer"  # label of text rows: 1 where a row belongs to the answer, which a router does not read


# ------------------------------------------------------------------------------------------------------------ the router
@contract
class prompt_rows:
    """Weights [B, N] of the rows a router reads: the last row of the prompt, or the mean of those between image and it."""

    last: bool = False

    def __call__(self, meta: Meta, evidence: dict) -> Array:
        pos, of = jnp.asarray(meta.pos), jnp.asarray(kind(meta))
        image = jnp.where(of == KIND_VISION, pos, -1).max(-1, keepdims=True)
        ours = (of == KIND_TEXT) & meta.valid & (pos > image)
        if ANSWER in meta.labels:
            ours &= meta.labels[ANSWER] == 0
        place = jnp.where(ours, pos, -1)
        last = ours & (place == place.max(-1, keepdims=True))
        weight = (last if self.last else ours & ~last).astype(jnp.float32)
        return weight / jnp.maximum(weight.sum(-1, keepdims=True), 1.0)


def init_router(key, dim: int, hidden: int) -> dict:
    """w1 [2 dim, hidden], w2 [hidden, 2]: Xavier uniform, no biases."""
    def xavier(key, n, m):
        bound = (6 / (n + m)) ** 0.5
        return jax.random.uniform(key, (n, m), minval=-bound, maxval=bound)

    a, b = jax.random.split(key)
    return {"w1": xavier(a, 2 * dim, hidden), "w2": xavier(b, hidden, 2)}


def dyvte_router(params: dict, text: Array, last: Array) -> Array:
    """Logits float32 [B, 2] (stay, exit) of text [B, C], the mean row, and last [B, C]."""
    x = jax.lax.stop_gradient(jnp.concatenate([text, last], -1)).astype(jnp.float32)
    return jax.nn.gelu(x @ params["w1"], approximate=False) @ params["w2"]


# -------------------------------------------------------------------------------------------------------------- the exit
@contract
class _Exit:
    """The cut behind layer ``layer``. Whole blocks leave or stay, so that a host may split the program here: ``exits``."""

    layer: int
    among: tuple
    hidden: int
    margin: float = operand("scalar", 0.0)

    exits = True

    def needs(self):
        return tuple(Need(f"dyvte.{name}", "hidden_mean", "next", prompt_rows(name == "last")) for name in ("text", "last"))

    def init(self, key, spec: Spec) -> dict:
        return init_router(jax.random.fold_in(key, self.layer), spec.dim, self.hidden)

    def rows(self, n):
        return n

    def apply(self, params, state, tokens, evidence, ctx):
        z = dyvte_router(params, evidence["dyvte.text"], evidence["dyvte.last"])
        wants = z[:, 1] - z[:, 0] > params["margin"]
        drawn = jnp.zeros((), bool)
        if ctx.phase == "train":  # one layer of a step, the same for all: it is tried, whatever routers say
            expect("key", None, "a PRNG key: training draws the layer of a step", ctx.key is not None)
            drawn = jax.random.randint(ctx.key, (), 0, len(self.among)) == self.among.index(self.layer)
            wants = jnp.broadcast_to(drawn, wants.shape)
        here = jnp.broadcast_to(tokens.meta.valid, tokens.x.shape[:2]).any(-1)
        out = reduce_mask(tokens, jnp.broadcast_to(~wants[:, None], tokens.x.shape[:2]))
        return out, state, {"logits": z, "drawn": drawn, "left": wants & here, "layer": jnp.int32(self.layer)}


@contract
class _Forced:
    """The cut behind a layer that is known: the image tokens leave the arrays, too (one row, not valid, is left)."""

    mode: str

    def rows(self, n):
        return n if self.mode == "mask" else 1

    def apply(self, params, state, tokens, evidence, ctx):
        b, n = tokens.x.shape[:2]
        if self.mode == "mask":
            return reduce_mask(tokens, jnp.zeros((b, n), bool)), state, {}
        return reduce_keep(tokens, jnp.zeros((b, 1), jnp.int32), jnp.zeros((b, 1), bool)), state, {}


@contract
class _DyVTE:
    layers: tuple | None = None
    hidden: int = 2048
    margin: float = operand("scalar", 0.0)

    def check(self):
        expect("hidden", self.hidden, "at least 1", self.hidden >= 1)
        mine = (0,) if self.layers is None else self.layers
        ok = len(mine) > 0 and all(a < b for a, b in zip(mine, mine[1:], strict=False))
        expect("layers", mine, "ascending numbers of layers", ok)

    def sites(self, layers):
        return tuple(layer + 1 for layer in self._layers(layers))

    def _layers(self, layers):
        mine = tuple(range(layers - 1)) if self.layers is None else self.layers
        expect("layers", mine, f"layers below the last of {layers}", bool(mine) and 0 <= mine[0] and mine[-1] < layers - 1)
        return mine

    def schedule(self, layers):
        mine = self._layers(layers)
        return tuple((layer + 1, _Exit(layer, mine, self.hidden, self.margin)) for layer in mine)


@contract
class _Exits:
    layer: int
    mode: str = "keep"

    def check(self):
        expect("mode", repr(self.mode), "'keep' or 'mask'", self.mode in ("keep", "mask"))
        expect("layer", self.layer, "at least 0", self.layer >= 0)

    def schedule(self, layers):
        expect("layer", self.layer, f"one of the {layers} layers", self.layer < layers)
        return ((self.layer + 1, _Forced(self.mode)),) if self.layer + 1 < layers else ()


@register("tokens")
def dyvte(layers: tuple[int, ...] | None = None, hidden: int = 2048, margin: float = 0.0):
    """Remove all image tokens behind the first layer whose router says so, image by image. For the site "llm".

    Args:
      layers: 0-based layers with a router, ascending; None: all but the last. Fewer of them are buckets: fewer programs where
        the host splits (``models.generate.prefill_exits``).
      hidden: width of the routers.  margin: exit where z_1 - z_0 exceeds it (published: 0); inf never exits.
    Each image decides for itself, so rows are masked, not gathered. Routers are trained by the objective of the same name.
    """
    return _DyVTE(layers, hidden, margin)


@register("tokens")
def visual_exit(layer: int = 0, mode: str = "keep"):
    """Remove all image tokens behind layer ``layer`` (0-based; the last one: none leaves), for the site "llm": the constant
    that DyVTE (Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit) is measured against.

    mode: "keep", the arrays of later layers are shorter, or "mask"."""
    return _Exits(layer, mode)
