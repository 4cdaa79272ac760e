"""A vision transformer with CLS and register tokens: what DeiT, CLIP, SigLIP and DINOv2 towers differ in is the
configuration's. Rows: CLS, registers, then patches in raster order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn.core.attend import attend
from jaxattn.core.types import Array, Meta, contract, data, expect
from jaxattn.nn import layers
from jaxattn.nn.block import BlockConfig, Projections, make_stack, project
from models import stack
from models.bind import Bound, Program, bind_stack, subset


@contract
class ViTConfig:
    """Static shape of a vision tower.

    patch, stem: pixels per token step and side of the window that a token sees (stem > patch: overlapping windows,
      zero padded by (stem - patch) / 2).  stem_hidden: width of a ReLU layer in the stem, 0 for one linear map.
    cls, registers: special rows in front.  pre_norm: a norm before the first layer (CLIP).  post_norm: after the last.
    classes: outputs of the classifier on CLS (or on the mean of patches), 0 for none.
    special_positions: how many special rows, from the front, have learned positions of their own.  crop: pixels behind the
      last whole patch are not seen (a convolution without padding).
    pool: "" (CLS, or the mean of patches) | "cls_mean" (the classifier reads CLS and the mean, DINOv2) | "probe" (attention
      of one learned query, then a feed-forward: SigLIP) | "tanh" (a dense map of CLS and tanh, no classifier: ViT).
    frames: copies of a still that the stem reads (a video tower).  positions: learned ones; without them pictures come in any
      size, as ``pictures.Pictures`` of rows, ``image`` is (0, 0) and the layers turn queries and keys by row and column.
    merge: side of the block of patches that becomes one token behind the tower.  window: patches per side of the windows that
      layers without full attention see; the layer's ``block.window`` is then the label "window".
    distilled: a second classifier on the row behind CLS, logits are the mean of both (DeiT).
    """

    image: tuple
    channels: int
    patch: int
    layers: int
    block: BlockConfig
    stem: int = 0
    stem_hidden: int = 0
    stem_bias: bool = True
    cls: bool = True
    registers: int = 0
    pre_norm: bool = False
    post_norm: bool = True
    classes: int = 0
    pos_scale: float = 0.02
    special_positions: int = 0
    crop: bool = False
    pool: str = ""
    distilled: bool = False
    frames: int = 1
    positions: bool = True
    merge: int = 1
    window: int = 0

    def check(self):
        if not self.positions:
            expect("image", self.image, "(0, 0) for a tower of pictures of any size", tuple(self.image) == (0, 0))
            expect("window", self.window, f"whole blocks of {self.merge} patches", self.window % self.merge == 0)
            return
        whole = self.crop or not any(s % self.patch for s in self.image)
        expect("image", self.image, f"(height, width) in multiples of the patch, {self.patch}",
               len(self.image) == 2 and min(self.image) >= self.patch and whole)  # fmt: skip
        expect("special_positions", self.special_positions, f"at most the {self.special} special rows",
               0 <= self.special_positions <= self.special)  # fmt: skip
        expect("pool", self.pool, "'', 'cls_mean' (with cls), 'probe' or 'tanh' (with cls, without classes)",
               self.pool in ("", "probe") or (self.cls and self.pool == "cls_mean")
               or (self.cls and self.pool == "tanh" and not self.classes))  # fmt: skip
        expect("distilled", self.distilled, "a tower with cls and a row behind it", not self.distilled or self.special > 1)
        expect("stem", self.stem, f"0 or at least the patch, {self.patch}, of the same parity",
               self.stem == 0 or (self.stem >= self.patch and (self.stem - self.patch) % 2 == 0))  # fmt: skip

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def special(self) -> int:
        return int(self.cls) + self.registers


def config(image: int | tuple, patch: int, layers: int, dim: int, heads: int, *, channels: int = 3, hidden: int | None = None,
           norm: str = "layer", activation: str = "gelu", bias: bool = True, layer_scale: bool = False, eps: float = 1e-6,
           **vit) -> ViTConfig:  # fmt: skip
    """A ViTConfig from the usual sizes; ``vit`` takes every other field of ViTConfig."""
    image = (image, image) if isinstance(image, int) else tuple(image)
    block = BlockConfig(dim, heads, heads, dim // heads, hidden or 4 * dim, norm=norm, activation=activation, gated=False,
                        qkv_bias=bias, out_bias=bias, mlp_bias=bias, causal=False, eps=eps,
                        layer_scale=layer_scale)  # fmt: skip
    return ViTConfig(image, channels, patch, layers, block, **vit)


def sincos_2d(h: int, w: int, dim: int, base: float = 10000.0) -> np.ndarray:
    """[h * w, dim] fixed 2-D sine-cosine positions: half the channels by row, half by column."""
    quarter = dim // 4
    freqs = base ** -(np.arange(quarter) / quarter)

    def axis(n):
        angle = np.arange(n)[:, None] * freqs
        return np.concatenate([np.sin(angle), np.cos(angle)], -1)

    rows, cols = np.repeat(axis(h), w, 0), np.tile(axis(w), (h, 1))
    table = np.concatenate([rows, cols], -1)
    return np.pad(table, [(0, 0), (0, dim - table.shape[1])]).astype(np.float32)


class ViT(nnx.Module):
    """Parameters: patch (stem), cls, registers, pos, layers, norms, and the classifier where there is one."""

    def __init__(self, c: ViTConfig, *, rngs: nnx.Rngs):
        self.config = c
        dim = c.block.dim
        seen = (c.stem or c.patch) ** 2 * c.channels * c.frames
        if c.stem_hidden:
            self.stem = layers.Dense(seen, c.stem_hidden, bias=c.stem_bias, rngs=rngs)
        self.patch = layers.Dense(c.stem_hidden or seen, dim, bias=c.stem_bias, rngs=rngs)
        if c.positions:
            self.pos = nnx.Param(jnp.asarray(sincos_2d(*c.grid, dim)) * c.pos_scale)
        if c.special:
            self.special = nnx.Param(jax.random.normal(rngs.params(), (c.special, dim)) * 0.02)
        if c.special_positions:
            self.special_pos = nnx.Param(jnp.zeros((c.special_positions, dim)))
        if c.pre_norm:
            self.pre_norm = layers.Norm(dim, kind=c.block.norm)
        self.layers = make_stack(c.block, c.layers, rngs)
        if c.post_norm:
            self.norm = layers.Norm(dim, kind=c.block.norm)
        if c.pool == "probe":
            self.probe = Probe(c, rngs=rngs)
        if c.pool == "tanh":
            self.pooler = layers.Dense(dim, dim, bias=True, rngs=rngs)
        if c.classes:
            seen = 2 * dim if c.pool == "cls_mean" else dim
            self.classifier = layers.Dense(seen, c.classes, bias=True, rngs=rngs)
            if c.distilled:
                self.distilled = layers.Dense(dim, c.classes, bias=True, rngs=rngs)


class Probe(nnx.Module):
    """Attention pooling: a learned query over all rows, a norm and a feed-forward."""

    def __init__(self, c: ViTConfig, *, rngs: nnx.Rngs):
        b = c.block
        self.query = nnx.Param(jax.random.normal(rngs.params(), (1, b.dim)) * 0.02)
        self.attn = Projections(b, out_scale=1.0, rngs=rngs)
        self.norm = layers.Norm(b.dim, kind=b.norm)
        self.mlp = layers.MLP(b.dim, b.hidden, gated=b.gated, bias=b.mlp_bias, out_scale=1.0, rngs=rngs)


@data
class ViTOut:
    """rows: Streams with groups "special" and "vision"; pooled [B, C] (normalised CLS, or mean patch); logits or None."""

    streams: stack.Streams
    pooled: Array | None
    logits: Array | None
    stack: stack.StackOut


def bind(c: ViTConfig, params, *, attention=None, reduce=None, steering=None, remat=False, trained=None, key=None) -> Bound:
    """Bind sockets to a tower; ``reduce`` maps "vision.6" to the transform before layer 6,
    "vision" to one with a schedule of its own."""
    cuts = {}
    for site, record in (reduce or {}).items():
        expect("reduce", site, "'vision' or 'vision.<layer>' in a vision tower", site == "vision" or site.startswith("vision."))
        cuts[site[7:]] = record
    program, operands, fresh = bind_stack(c.block, c.layers, "vision", attention=attention, reduce=cuts, steering=steering,
                                          remat=remat, trained=trained, key=key, rows=c.patches)  # fmt: skip
    arrays = {"operands": {"vision": operands}, "trained": {"vision": fresh}}
    return Bound(Program(c, (("vision", program),)), arrays, params)


def patchify(c: ViTConfig, image: Array) -> Array:
    """[B, H, W, channels] -> [B, patches, window * window * channels], windows (row, column, channel) in raster order."""
    expect("image", "an array", "Pictures, for a tower of pictures of any size", c.positions)
    expect("image", f"shape {image.shape}", f"[batch, {c.image[0]}, {c.image[1]}, {c.channels}]",
           image.ndim == 4 and image.shape[1:] == (*c.image, c.channels))  # fmt: skip
    window = c.stem or c.patch
    margin = (window - c.patch) // 2
    image = jnp.pad(image, [(0, 0), (margin, margin), (margin, margin), (0, 0)])
    h, w = c.grid
    rows = np.arange(h)[:, None] * c.patch + np.arange(window)  # [h, window]
    cols = np.arange(w)[:, None] * c.patch + np.arange(window)
    x = image[:, rows][:, :, :, cols]  # [B, h, window, w, window, channels]
    return jnp.moveaxis(x, 3, 2).reshape(image.shape[0], h * w, -1)


def patch_meta(c: ViTConfig) -> Meta:
    """Meta of the patches: raster positions with row and column labels (and kind 1, vision)."""
    h, w = c.grid
    rows, cols = np.divmod(np.arange(h * w, dtype=np.int32), w)
    return Meta.of(h * w, row=rows[None], col=cols[None].astype(np.int32), kind=np.ones((1, h * w), np.int32))


def stem(params: dict, c: ViTConfig, image: Array, dtype=None) -> Array:
    x = patchify(c, image)
    x = x if dtype is None else x.astype(dtype)
    if "stem" in params:
        x = jax.nn.relu(layers.dense(params["stem"], x))
    return layers.dense(params["patch"], x) + params["pos"].astype(x.dtype)


def embed_rows(params: dict, c: ViTConfig, pixels: Array, meta: Meta, dtype=None) -> stack.Streams:
    """Streams of a tower without positions: patches [B, P, patch * patch * channels] and what is known about them."""
    expect("image", f"patches of {pixels.shape[-1]} numbers", f"{c.patch * c.patch * c.channels}, (row, column, channel)",
           pixels.shape[-1] == c.patch * c.patch * c.channels)  # fmt: skip
    x = jnp.tile(pixels if dtype is None else pixels.astype(dtype), c.frames)
    return stack.streams_of({"vision": (layers.dense(params["patch"], x), meta)})


def embed(params: dict, c: ViTConfig, image: Array, dtype=None) -> stack.Streams:
    """Streams of a tower's input rows."""
    x = stem(params, c, image, dtype)
    groups = {}
    if c.special:
        special = params["special"]
        if c.special_positions:
            special = special.at[: c.special_positions].add(params["special_pos"])
        special = jnp.broadcast_to(special.astype(x.dtype), (x.shape[0], c.special, x.shape[2]))
        groups["special"] = (special, Meta.of(c.special))
    groups["vision"] = (x, patch_meta(c))
    streams = stack.streams_of(groups)
    if c.pre_norm:
        streams = streams.replace(x=layers.norm(params["pre_norm"], streams.x, c.block.eps))
    return streams


def forward(bound: Bound, image: Array, *, phase: str = "train", dtype=None, layers_to_run: int | None = None, **run) -> ViTOut:
    """Images [B, H, W, channels] in [0, 1] to rows. ``layers_to_run``: stop early, without norm and classifier (the
    select layer of a vision-language model)."""
    program, arrays, params = bound
    c: ViTConfig = program.config
    out = stack.run(params, program.stack("vision"), subset(arrays, "vision"), embed(params, c, image, dtype), phase=phase,
                    stop=layers_to_run, **run)  # fmt: skip
    if layers_to_run is not None and layers_to_run < c.layers:
        return ViTOut(out.streams, None, None, out)
    return finish(params, c, out)


def finish(params: dict, c: ViTConfig, out: stack.StackOut) -> ViTOut:
    streams = out.streams
    if c.post_norm:
        streams = streams.replace(x=layers.norm(params["norm"], streams.x, c.block.eps))
    rows = streams.tokens("vision")
    if c.pool == "probe":
        pooled = probe(params["probe"], c, streams)
    else:
        pooled = streams.x[:, 0] if c.cls else _mean(rows)
        pooled = jnp.tanh(layers.dense(params["pooler"], pooled)) if c.pool == "tanh" else pooled
    if not c.classes:
        return ViTOut(streams, pooled, None, out)
    seen = jnp.concatenate([pooled, _mean(rows).astype(pooled.dtype)], -1) if c.pool == "cls_mean" else pooled
    logits = layers.dense(params["classifier"], seen).astype(jnp.float32)
    if c.distilled:
        logits = (logits + layers.dense(params["distilled"], streams.x[:, 1]).astype(jnp.float32)) / 2
    return ViTOut(streams, pooled, logits, out)


def _mean(rows) -> Array:
    weight = rows.meta.valid[..., None].astype(jnp.float32)
    return (rows.x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


def probe(p: dict, c: ViTConfig, streams: stack.Streams) -> Array:
    """[B, C]: what the learned query reads from all rows."""
    b, x = c.block, streams.x
    query = jnp.broadcast_to(p["query"].astype(x.dtype), (x.shape[0], 1, b.dim))
    q = layers.dense(p["attn"]["q"], query).reshape(x.shape[0], 1, b.heads, b.head_dim)
    _, k, v = project(p["attn"], b, x)
    out = attend(q, k, v, k_meta=streams.meta).out
    y = layers.dense(p["attn"]["o"], out.reshape(x.shape[0], 1, -1).astype(x.dtype))
    return (y + layers.mlp(p["mlp"], layers.norm(p["norm"], y, b.eps), b.activation))[:, 0]


def init(c: ViTConfig, seed: int = 0) -> dict:
    """Fresh parameters as a pure dict."""
    return jax.jit(lambda key: layers.pure(ViT(c, rngs=nnx.Rngs(params=key))))(jax.random.key(seed))
