"""Focus-DETR, "Less is More: Focus Attention for Efficient DETR": a detector whose encoder works on the tokens that a
foreground selector finds.

A top-down selector scores the cells of all maps, coarse maps lifting fine ones by learned factors; layer i of the encoder
updates the ``cascade[i]`` share of the best tokens and leaves the others where they were, to the bit. Inside a layer the
``fine`` tokens of largest class score times foreground score attend to each other; all focused tokens then read the whole
feature maps by deformable attention. Published: 4 maps, width 256, 6 + 6 layers, 900 queries, rho 0.5, 300 fine tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn.core.attend import attend
from jaxattn.core.deformable import deformable_read
from jaxattn.core.select import gather_tokens, scatter_tokens, top_k
from jaxattn.core.types import Array, Meta, contract, data, expect
from jaxattn.nn import layers
from models.detection import boxes
from models.vision.vit import sincos_2d


@contract
class FocusDETRConfig:
    """Static shape of the detector.

    image: (height, width), multiples of the coarsest stride.  levels: maps, of strides ``stride``, 2 stride, ...
    ranges: ((low, high), ...) pixels from a cell's centre to the farthest side of a box it stands for.
    rho: share of the valid tokens that may be focused.  cascade: share of those that each encoder layer updates.
    fine: tokens of the dual attention.  points: deformable points per head and map.
    """

    image: tuple
    classes: int
    ranges: tuple
    channels: int = 3
    stride: int = 4
    dim: int = 256
    heads: int = 8
    points: int = 4
    hidden: int = 1024
    rho: float = 0.5
    cascade: tuple = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)
    fine: int = 300
    decoder_layers: int = 6
    queries: int = 900

    def check(self):
        coarsest = self.stride * 2 ** (self.levels - 1)
        expect("image", self.image, f"(height, width) in multiples of {coarsest}", not any(s % coarsest for s in self.image))
        expect("stride", self.stride, "a power of two", self.stride & (self.stride - 1) == 0 and self.stride > 1)
        expect("rho", self.rho, "in (0, 1]", 0 < self.rho <= 1)
        ok = len(self.cascade) > 0 and all(0 < s <= 1 for s in self.cascade)
        expect("cascade", self.cascade, "a share in (0, 1] for each encoder layer", ok)
        expect("queries", self.queries, f"at most the {self.tokens} tokens", self.queries <= self.tokens)
        expect("dim", self.dim, "a multiple of twice the heads", self.dim % (2 * self.heads) == 0)

    @property
    def levels(self) -> int:
        return len(self.ranges)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.stride * 2**i for i in range(self.levels))

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.image[0] // s, self.image[1] // s) for s in self.strides)

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.shapes)

    @property
    def capacity(self) -> int:
        """Most tokens that may be focused: int(rho S) + 1, at most S."""
        return min(int(self.tokens * self.rho + 1e-4) + 1, self.tokens)

    def rows(self, layer: int) -> int:
        """Most tokens that an encoder layer updates."""
        return max(1, int(self.cascade[layer] * self.capacity + 1e-4))


@data
class FocusDETROut:
    """scores [B, S] of the foreground, padding at the least score; focus int32 [B, F], the tokens in order of score, and
    count int32 [B] of them in use; memory [B, S, C]; seen: per encoder layer (index int32 [B, K], -1 for rows not in use,
    class logits [B, K, classes]); predictions: ((logits [B, N, classes], boxes [B, N, 4], centre and size in shares), ...),
    the encoder's proposals first."""

    scores: Array
    focus: Array
    count: Array
    memory: Array
    seen: tuple
    predictions: tuple


# ----------------------------------------------------------------------------------------------------------- parameters
class _MLP(nnx.Module):
    def __init__(self, *sizes: int, rngs: nnx.Rngs):
        for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
            setattr(self, f"dense{i}", layers.Dense(a, b, bias=True, scale=2**0.5, rngs=rngs))


class _Deformable(nnx.Module):
    def __init__(self, c: FocusDETRConfig, rngs: nnx.Rngs):
        n = c.heads * c.levels * c.points
        self.value, self.out = (layers.Dense(c.dim, c.dim, bias=True, rngs=rngs) for _ in range(2))
        self.offset = layers.Dense(c.dim, 2 * n, bias=True, scale=0.0, rngs=rngs)
        self.weight = layers.Dense(c.dim, n, bias=True, scale=0.0, rngs=rngs)
        # Heads look in different directions at first, one step farther with each point.
        angle = 2 * np.pi * np.arange(c.heads) / c.heads
        way = np.stack([np.cos(angle), np.sin(angle)], -1)
        way = (way / np.abs(way).max(-1, keepdims=True))[:, None, None] * np.arange(1, c.points + 1)[:, None]
        way = np.broadcast_to(way, (c.heads, c.levels, c.points, 2)).reshape(-1)
        self.offset.bias = nnx.Param(jnp.asarray(way, jnp.float32))


class _SelfAttention(nnx.Module):
    def __init__(self, c: FocusDETRConfig, rngs: nnx.Rngs):
        self.q, self.k, self.v, self.o = (layers.Dense(c.dim, c.dim, bias=True, rngs=rngs) for _ in range(4))
        self.norm = layers.Norm(c.dim, kind="layer")


class _Layer(nnx.Module):
    """Self-attention (of all queries, or of the fine tokens), deformable attention, feed-forward; a norm behind each."""

    def __init__(self, c: FocusDETRConfig, rngs: nnx.Rngs):
        self.self = _SelfAttention(c, rngs)
        self.cross = _Deformable(c, rngs)
        self.norm1, self.norm2 = (layers.Norm(c.dim, kind="layer") for _ in range(2))
        self.mlp = layers.MLP(c.dim, c.hidden, gated=False, bias=True, out_scale=1.0, rngs=rngs)
        self.classes = _head(c, rngs)


def _head(c: FocusDETRConfig, rngs: nnx.Rngs) -> layers.Dense:
    """Class logits that begin at a probability of one in a hundred."""
    head = layers.Dense(c.dim, c.classes, bias=True, rngs=rngs)
    head.bias = nnx.Param(jnp.full(c.classes, -np.log(99.0)))
    return head


class FocusDETR(nnx.Module):
    """Parameters: stem and level convolutions, the selector, encoder and decoder layers, heads."""

    def __init__(self, c: FocusDETRConfig, *, rngs: nnx.Rngs):
        conv = lambda a, b: nnx.Param(jax.random.normal(rngs.params(), (3, 3, a, b)) * (2 / (9 * a)) ** 0.5)  # noqa: E731
        halvings = c.stride.bit_length() - 1
        widths = [c.channels, *(max(8, c.dim >> (halvings - 1 - i)) for i in range(halvings))]
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            setattr(self, f"stem{i}", conv(a, b))
            setattr(self, f"stem_norm{i}", layers.Norm(b, kind="layer"))
        for i in range(1, c.levels):
            setattr(self, f"down{i}", conv(c.dim, c.dim))
            setattr(self, f"down_norm{i}", layers.Norm(c.dim, kind="layer"))
        self.level = nnx.Param(jax.random.normal(rngs.params(), (c.levels, c.dim)) * 0.02)
        self.enter, self.enter_norm = layers.Dense(c.dim, c.dim, bias=True, rngs=rngs), layers.Norm(c.dim, kind="layer")
        self.score_norm = layers.Norm(c.dim, kind="layer")
        self.score_in = layers.Dense(c.dim, c.dim, bias=True, rngs=rngs)
        self.score = _MLP(c.dim, c.dim // 2, c.dim // 4, 1, rngs=rngs)
        self.alpha = nnx.Param(jax.random.uniform(rngs.params(), (c.levels - 1,), minval=-0.3, maxval=0.3))
        for i in range(len(c.cascade)):
            setattr(self, f"encoder{i}", _Layer(c, rngs))
        self.proposal = _head(c, rngs)
        self.proposal_box = _MLP(c.dim, c.dim, 4, rngs=rngs)
        self.query = nnx.Param(jax.random.normal(rngs.params(), (c.queries, c.dim)) * 0.02)
        self.place = _MLP(4, c.dim, c.dim, rngs=rngs)
        for i in range(c.decoder_layers):
            setattr(self, f"decoder{i}", _Layer(c, rngs))
            setattr(self, f"box{i}", _MLP(c.dim, c.dim, 4, rngs=rngs))


def init(c: FocusDETRConfig, seed: int = 0) -> dict:
    """Fresh parameters as a pure dict."""
    return jax.jit(lambda key: layers.pure(FocusDETR(c, rngs=nnx.Rngs(params=key))))(jax.random.key(seed))


def _mlp(p: dict, x: Array) -> Array:
    for i in range(len(p)):
        x = layers.dense(p[f"dense{i}"], x)
        x = jax.nn.gelu(x, approximate=False) if i < len(p) - 1 else x
    return x


def _norm(p: dict, x: Array) -> Array:
    return layers.norm(p, x, 1e-5)


# ------------------------------------------------------------------------------------------------------------- the maps
def features(c: FocusDETRConfig, p: dict, image: Array) -> tuple[Array, Array]:
    """(rows [B, S, C] of all maps, fine first; positions [S, C]) of images [B, H, W, channels]."""

    def halve(x, kernel, norm):
        x = jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(_norm(norm, x))

    expect("image", f"shape {image.shape}", f"[batch, {c.image[0]}, {c.image[1]}, {c.channels}]",
           image.ndim == 4 and image.shape[1:] == (*c.image, c.channels))  # fmt: skip
    x, maps, place = image, [], []
    for i in range(c.stride.bit_length() - 1):
        x = halve(x, p[f"stem{i}"], p[f"stem_norm{i}"])
    for i, shape in enumerate(c.shapes):
        x = halve(x, p[f"down{i}"], p[f"down_norm{i}"]) if i else x
        maps.append(x.reshape(x.shape[0], -1, c.dim))
        place.append(jnp.asarray(sincos_2d(*shape, c.dim), x.dtype) + p["level"][i].astype(x.dtype))
    return jnp.concatenate(maps, 1), jnp.concatenate(place, 0)


def cells_valid(c: FocusDETRConfig, size: Array | None, batch: int) -> Array:
    """bool [B, S]: cells whose centre is inside the picture, of ``size`` int [B, 2] (height, width); None: all."""
    if size is None:
        return jnp.ones((batch, c.tokens), bool)
    at = boxes.centres(c.shapes, c.strides)
    return (at[:, 0] < size[:, 1:]) & (at[:, 1] < size[:, :1])


# --------------------------------------------------------------------------------------------------------- the selector
def upsample(x: Array, shape: tuple[int, int]) -> Array:
    """[B, h, w] -> [B, *shape], bilinear with corners on corners."""

    def axis(n, m):
        at = np.linspace(0, n - 1, m)
        low = np.minimum(at.astype(int), max(n - 2, 0))
        table = np.zeros((m, n), np.float32)
        np.add.at(table, (np.arange(m), low), 1 - (at - low))
        np.add.at(table, (np.arange(m), np.minimum(low + 1, n - 1)), at - low)
        return table

    rows, columns = axis(x.shape[1], shape[0]), axis(x.shape[2], shape[1])
    return jnp.einsum("ph,bhw,qw->bpq", rows, x, columns)


def predict_mask(p: dict, m: Array) -> Array:
    """[B, n] scores of one map's rows [B, n, C]: half of the channels of each cell, half of their mean over the map."""
    z = jax.nn.gelu(layers.dense(p["score_in"], _norm(p["score_norm"], m)), approximate=False)
    own, shared = jnp.split(z, 2, axis=-1)
    shared = jnp.broadcast_to(shared.mean(1, keepdims=True), shared.shape)
    return _mlp(p["score"], jnp.concatenate([own, shared], -1))[..., 0]


def foreground(c: FocusDETRConfig, p: dict, x: Array, place: Array, valid: Array) -> Array:
    """float32 [B, S] scores of all cells, top-down: the upsampled scores of the coarser map multiply the finer one's rows by
    1 + alpha times themselves. Padding gets its picture's least score."""
    m = jnp.where(valid[..., None], _norm(p["enter_norm"], layers.dense(p["enter"], x + place)), 0)
    ends = np.cumsum([h * w for h, w in c.shapes])[:-1]
    parts, above = [None] * c.levels, None
    for i, rows in reversed(list(enumerate(jnp.split(m, ends, axis=1)))):
        if above is not None:
            up = upsample(above.reshape(-1, *c.shapes[i + 1]), c.shapes[i]).reshape(rows.shape[:2])
            rows = rows + p["alpha"][i].astype(rows.dtype) * rows * up[..., None]
        parts[i] = above = predict_mask(p, rows)
    scores = jnp.concatenate(parts, 1).astype(jnp.float32)
    least = jnp.where(valid, scores, jnp.inf).min(1, keepdims=True)
    return jnp.where(valid, scores, least)


# ---------------------------------------------------------------------------------------------------------- the encoder
def self_attend(p: dict, heads: int, x: Array, place: Array, valid: Array | None = None) -> Array:
    """Rows [B, N, C] behind self-attention (positions on queries and keys) and its norm."""
    split = lambda y: y.reshape(*y.shape[:2], heads, -1)  # noqa: E731
    q, k = (split(layers.dense(p[name], x + place)) for name in "qk")
    meta = None if valid is None else Meta.of(x.shape[1], valid=valid, pos=np.arange(x.shape[1], dtype=np.int32)[None])
    out = attend(q, k, split(layers.dense(p["v"], x)), k_meta=meta).out
    return _norm(p["norm"], x + layers.dense(p["o"], out.reshape(x.shape)))


def deformable(c: FocusDETRConfig, p: dict, x: Array, values: Array, reference: Array, size: Array | None = None) -> Array:
    """What queries x [B, Q, C] (with positions) read of values [B, S, C] around reference [B, Q, 2] in shares.

    size: [B, Q, 2] in shares, of boxes whose halves the offsets are fractions of; None: offsets are in cells."""
    b, q, _ = x.shape
    v = layers.dense(p["value"], values).reshape(b, -1, c.heads, c.dim // c.heads)
    offset = layers.dense(p["offset"], x).reshape(b, q, c.heads, c.levels, c.points, 2)
    weight = layers.dense(p["weight"], x).reshape(b, q, c.heads, c.levels * c.points)
    weight = jax.nn.softmax(weight.astype(jnp.float32), -1).reshape(offset.shape[:-1])
    if size is None:
        step = 1 / np.array([[w, h] for h, w in c.shapes], np.float32)[:, None]
    else:
        step = size[:, :, None, None, None] * (0.5 / c.points)
    at = reference[:, :, None, None, None] + offset.astype(jnp.float32) * step
    return layers.dense(p["out"], deformable_read(v, c.shapes, at, weight).reshape(x.shape))


def dual_attention(c: FocusDETRConfig, p: dict, x: Array, place: Array, score: Array, live: Array) -> tuple[Array, Array]:
    """(rows x [B, K, C] of which at most ``fine`` are changed, class logits [B, K, classes]).

    The tokens of largest max-class logit times foreground score attend to each other. live: bool [B, K]."""
    logits = layers.dense(p["classes"], x)
    rank = jnp.where(live, logits.astype(jnp.float32).max(-1) * score, -jnp.inf)
    _, index = top_k(jax.lax.stop_gradient(rank), min(c.fine, x.shape[1]))
    chosen = gather_tokens(live, index)
    rows = self_attend(p["self"], c.heads, gather_tokens(x, index), gather_tokens(place, index), chosen)
    return scatter_tokens(x, jnp.where(chosen, index, x.shape[1]), rows), logits


def encoder_layer(c: FocusDETRConfig, p: dict, out: Array, values: Array, place: Array, score: Array, index: Array,
                  live: Array) -> tuple[Array, Array]:  # fmt: skip
    """(out [B, S, C] with the focused rows updated, class logits [B, K, classes]).

    values: [B, S, C], what is read, the same for all layers.  index: int32 [B, K] of the rows, live bool [B, K]."""
    x, mine = gather_tokens(out, index), gather_tokens(jnp.broadcast_to(place, out.shape), index)
    x, logits = dual_attention(c, p, x, mine, gather_tokens(score, index), live)
    at = jnp.asarray(boxes.centres(c.shapes, c.strides) / np.array(c.image[::-1], np.float32))
    x = _norm(p["norm1"], x + deformable(c, p["cross"], x + mine, values, at[index]))
    x = _norm(p["norm2"], x + layers.mlp(p["mlp"], x, "relu"))
    return scatter_tokens(out, jnp.where(live, index, out.shape[1]), x), logits


# ------------------------------------------------------------------------------------------------------------ the model
def forward(c: FocusDETRConfig, p: dict, image: Array, *, size: Array | None = None,
            scores: Array | None = None) -> FocusDETROut:  # fmt: skip
    """Detect (Focus-DETR, Less is More: Focus Attention for Efficient DETR).

    Args: image: [B, H, W, channels].  size: int [B, 2], (height, width) of the pictures inside it; None: all of it.
      scores: [B, S] to rank by in place of the selector's (to compare with).
    """
    x, place = features(c, p, image)
    valid = cells_valid(c, size, len(image))
    x = jnp.where(valid[..., None], x, 0)
    found = foreground(c, p, x, place, valid)
    rank = found if scores is None else jnp.where(valid, scores, scores.min(-1, keepdims=True))
    rank = jnp.where(valid, jax.lax.stop_gradient(rank), -jnp.inf)
    count = jnp.minimum((valid.sum(1) * c.rho + 1e-4).astype(jnp.int32) + 1, valid.sum(1))
    _, focus = top_k(rank, c.capacity)
    out, seen = x, []
    for i, share in enumerate(c.cascade):
        index = focus[:, : c.rows(i)]
        most = jnp.maximum((share * count.max() + 1e-4).astype(jnp.int32), 1)
        live = jnp.arange(index.shape[1]) < jnp.minimum(count, most)[:, None]
        out, logits = encoder_layer(c, p[f"encoder{i}"], out, x, place, found, index, live)
        seen.append((jnp.where(live, index, -1), logits))
    return FocusDETROut(found, focus, count, out, tuple(seen), _decode(c, p, out, place, valid))


def _decode(c: FocusDETRConfig, p: dict, memory: Array, place: Array, valid: Array) -> tuple:
    """((class logits, boxes), ...) of the encoder's best cells and of each decoder layer behind them."""
    b = memory.shape[0]
    at = boxes.centres(c.shapes, c.strides) / np.array(c.image[::-1], np.float32)
    reach = np.repeat([2 * s for s in c.strides], [h * w for h, w in c.shapes])[:, None] / np.array(c.image[::-1])
    grid = jnp.asarray(np.concatenate([at, reach], -1), jnp.float32)  # a box of two cells' side around each
    logits = layers.dense(p["proposal"], memory)
    best = jnp.where(valid, jax.lax.stop_gradient(logits).astype(jnp.float32).max(-1), -jnp.inf)
    _, index = top_k(best, c.queries)
    rows = gather_tokens(memory, index)
    box = _moved(grid[index], _mlp(p["proposal_box"], rows))
    found = [(gather_tokens(logits, index).astype(jnp.float32), box)]
    memory, x = memory + place, jnp.broadcast_to(p["query"].astype(memory.dtype), (b, *p["query"].shape))
    for i in range(c.decoder_layers):
        layer, box = p[f"decoder{i}"], jax.lax.stop_gradient(box)
        where = _mlp(p["place"], box.astype(x.dtype))
        x = self_attend(layer["self"], c.heads, x, where)
        x = _norm(layer["norm1"], x + deformable(c, layer["cross"], x + where, memory, box[..., :2], box[..., 2:]))
        x = _norm(layer["norm2"], x + layers.mlp(layer["mlp"], x, "relu"))
        box = _moved(box, _mlp(p[f"box{i}"], x))
        found.append((layers.dense(layer["classes"], x).astype(jnp.float32), box))
    return tuple(found)


def _moved(box: Array, by: Array) -> Array:
    """Boxes in shares after a step in logits."""
    box = jnp.clip(box, 1e-4, 1 - 1e-4)
    return jax.nn.sigmoid(jnp.log(box) - jnp.log1p(-box) + by.astype(jnp.float32))


# ------------------------------------------------------------------------------------------------------------- training
def loss(c: FocusDETRConfig, out: FocusDETROut, box: Array, classes: Array) -> tuple[Array, dict[str, Array]]:
    """(loss, parts): focal losses of the selector and of the encoder's class scores by cells that stand for boxes, set losses
    of every prediction. box: [B, K, 4] (x0, y0, x1, y1) in pixels; classes: int [B, K], -1 for padding."""
    cells = boxes.cell_classes(box, classes, c.shapes, c.strides, c.ranges)
    inside = cells >= 0
    select = boxes.focal(out.scores, inside.astype(jnp.float32), inside.sum())
    within = jnp.zeros(())
    for index, logits in out.seen:
        label = jax.nn.one_hot(jnp.take_along_axis(cells, jnp.maximum(index, 0), axis=1), c.classes)
        live = (index >= 0)[..., None]
        within += boxes.focal(jnp.where(live, logits.astype(jnp.float32), -30.0), label * live, (label * live).sum())
    scale = jnp.asarray(c.image[::-1] * 2, jnp.float32)
    truth = jnp.concatenate([(box[..., :2] + box[..., 2:]) / 2, box[..., 2:] - box[..., :2]], -1) / scale
    parts = [boxes.set_loss(logits, found, truth, classes) for logits, found in out.predictions]
    total = select + within / len(out.seen) + sum(parts)
    return total, {"selector": select, "proposals": parts[0], "detection": parts[-1]}


__all__ = ["FocusDETRConfig", "FocusDETROut", "dual_attention", "encoder_layer", "foreground", "forward", "init", "loss"]
