"""Two towers in one space, an image's and a text's: CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.core.types import Array, contract, expect
from jaxattn.nn import layers
from models.bind import Bound, Program, subset
from models.language import encoder
from models.vision import vit


@contract
class DualConfig:
    """Static shape of a two-tower model.

    out: width that the image's pooled row is projected to, 0 for none; the text's ``out`` (or width) must be the same.
    sigmoid: every pair is a yes-or-no question of its own, and logits have a learned bias (SigLIP).
    """

    vision: vit.ViTConfig
    text: encoder.EncoderConfig
    out: int = 0
    sigmoid: bool = False

    def check(self):
        image = self.out or self.vision.block.dim
        text = self.text.out or self.text.block.dim
        expect("out", f"{image} of the image, {text} of the text", "one width", image == text)
        expect("text.pool", self.text.pool, "a pooled row", bool(self.text.pool))


class Dual(nnx.Module):
    """Parameters: vision, text, scale (log of the temperature's inverse); projection, bias where there are."""

    def __init__(self, c: DualConfig, *, rngs: nnx.Rngs):
        self.vision = vit.ViT(c.vision, rngs=rngs)
        self.text = encoder.Encoder(c.text, rngs=rngs)
        self.scale = nnx.Param(jnp.log(jnp.full(() if not c.sigmoid else 1, 10.0 if c.sigmoid else 1 / 0.07)))
        if c.out:
            self.projection = layers.Dense(c.vision.block.dim, c.out, rngs=rngs)
        if c.sigmoid:
            self.bias = nnx.Param(jnp.full(1, -10.0))


def bind(c: DualConfig, params, *, attention=None, reduce=None, steering=None, text_attention=None, remat=False, trained=None,
         key=None) -> Bound:  # fmt: skip
    """Bind sockets: attention and steering act in the vision tower, ``text_attention`` in the text tower; ``reduce`` maps
    "vision.6" or "text.6" to the transform before layer 6."""
    cuts = {"vision": {}, "text": {}}
    for site, record in (reduce or {}).items():
        expect("reduce", site, "vision, vision.<layer>, text or text.<layer>", site.partition(".")[0] in cuts)
        cuts[site.partition(".")[0]][site] = record
    trained = trained or {}
    image = vit.bind(c.vision, None, attention=attention, reduce=cuts["vision"], steering=steering, remat=remat,
                     trained=trained.get("vision"), key=key)  # fmt: skip
    text = encoder.bind(c.text, None, attention=text_attention, reduce=cuts["text"], remat=remat, trained=trained.get("text"),
                        key=key)  # fmt: skip
    arrays = {side: image.arrays[side] | text.arrays[side] for side in ("operands", "trained")}
    return Bound(Program(c, image.program.stacks + text.program.stacks), arrays, params)


def tower(bound: Bound, site: str) -> Bound:
    """One tower of the model, "vision" or "text", as a model of its own with the same sockets."""
    program, arrays, params = bound
    config = program.config.vision if site == "vision" else program.config.text
    mine = {side: {site: x} for side, x in subset(arrays, site).items()}
    return Bound(Program(config, ((site, program.stack(site)),)), mine, params[site])


def image_features(bound: Bound, image: Array, **run) -> Array:
    """[B, out] of images [B, H, W, channels], not normalised."""
    pooled = vit.forward(tower(bound, "vision"), image, **run).pooled
    return layers.dense(bound.params["projection"], pooled) if bound.program.config.out else pooled


def text_features(bound: Bound, tokens: Array, **run) -> Array:
    """[B, out] of texts int32 [B, N], not normalised."""
    return encoder.forward(tower(bound, "text"), tokens, **run).pooled


def similarity(bound: Bound, image: Array, text: Array) -> Array:
    """Logits [images, texts] of features [images, out] and [texts, out]."""
    image, text = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (image, text))
    image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
    logits = image @ text.T * jnp.exp(bound.params["scale"].astype(image.dtype))
    return logits + bound.params["bias"].astype(image.dtype) if bound.program.config.sigmoid else logits


def init(c: DualConfig, seed: int = 0) -> dict:
    """Fresh parameters as a pure dict."""
    return jax.jit(lambda key: layers.pure(Dual(c, rngs=nnx.Rngs(params=key))))(jax.random.key(seed))


__all__ = ["Dual", "DualConfig", "bind", "image_features", "init", "similarity", "text_features", "tower"]
