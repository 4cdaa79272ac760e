"""TextMonkey: documents in high resolution, window by window ("TextMonkey: An OCR-Free Large Multimodal Model for
Understanding Document").

An image is cut into windows, each of the size that the tower was made for and encoded by it alone. In front of some of its
blocks the windows talk: their patches lie side by side again, as one map x, and

    y = (x + P) W_down,   y <- y + SWMSA(LN y),   x <- x + s W_2 gelu(W_1 LN y)

with attention in shifted windows (Swin) and W_2 = 0 at the start: no change until training says otherwise. Behind the tower
a cross-attention of learned queries reads each window, and ``jaxattn.tokens.textmonkey`` leaves ``keep`` of all their tokens.

As released, the shifted map is filled up to whole windows by rows of zeros that are keys like others, and the regions of the
mask are counted on the map so filled. Adapters of single windows (optional there) are left out.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn.core import mask as masks
from jaxattn.core.attend import attend
from jaxattn.core.types import Array, Ctx, Meta, Tokens, contract, expect
from jaxattn.nn import layers
from jaxattn.tokens import textmonkey
from models import stack
from models.bind import Bound, params_of
from models.language import llm
from models.multimodal import vlm
from models.vision import vit
from models.vision.positions import cubic_weights

forward = vlm.forward


# ------------------------------------------------------------------------------------------------------ shifted windows
def fit(grid: tuple[int, int], window: int, shift: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((height, width) of a window, (down, right) shift) on a map: no larger than it, and no shift where one window does."""
    size = tuple(min(n, window) for n in grid)
    return size, tuple(shift if n > w else 0 for n, w in zip(grid, size, strict=True))


def regions(grid: tuple[int, int], size: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
    """int32 [h, w] on a shifted map of whole windows: rows with different numbers were no neighbours before the shift."""
    rows, cols = (
        (np.arange(n) >= n - w).astype(np.int32) + (np.arange(n) >= n - s) if s else np.zeros(n, np.int32)
        for n, w, s in zip(grid, size, shift, strict=True)
    )
    return 3 * rows[:, None] + cols[None]


def relative_index(size: tuple[int, int]) -> np.ndarray:
    """int32 [area, area]: the entry of a table of (2 h - 1) (2 w - 1) biases for each pair of a window's places."""
    row, col = (a.ravel() for a in np.mgrid[: size[0], : size[1]])
    down, right = row[:, None] - row + size[0] - 1, col[:, None] - col + size[1] - 1
    return down * (2 * size[1] - 1) + right


def partition(x: Array, size: tuple[int, int]) -> Array:
    """[B, h, w, ...] of whole windows -> [B * windows, area, ...], window by window in raster order."""
    b, h, w, *rest = x.shape
    x = x.reshape(b, h // size[0], size[0], w // size[1], size[1], *rest)
    return jnp.moveaxis(x, 3, 2).reshape(-1, size[0] * size[1], *rest)


def together(x: Array, size: tuple[int, int], grid: tuple[int, int]) -> Array:
    """[B * windows, area, ...] -> [B, h, w, ...]: undoes ``partition``."""
    rest = x.shape[2:]
    x = x.reshape(-1, grid[0] // size[0], grid[1] // size[1], *size, *rest)
    return jnp.moveaxis(x, 3, 2).reshape(-1, *grid, *rest)


def shifted_attention(params: dict, x: Array, *, heads: int, window: int = 12, shift: int = 6) -> Array:
    """Attention of a map x [B, h, w, C] inside shifted windows, with learned biases of relative positions: [B, h, w, C].

    params: {"qkv", "proj": {kernel, bias}, "bias": [(2 a - 1) (2 b - 1), heads]}, (a, b) the window on this map (``fit``)."""
    b, h, w, c = x.shape
    size, moved = fit((h, w), window, shift)
    whole = tuple(-(-n // s) * s for n, s in zip((h, w), size, strict=True))
    x = jnp.roll(x, (-moved[0], -moved[1]), (1, 2))
    x = partition(jnp.pad(x, [(0, 0), (0, whole[0] - h), (0, whole[1] - w), (0, 0)]), size)
    area = x.shape[1]
    q, k, v = (y.reshape(*x.shape[:2], heads, c // heads) for y in jnp.split(layers.dense(params["qkv"], x), 3, axis=-1))
    region = partition(jnp.asarray(regions(whole, size, moved))[None], size)
    meta = Meta.of(area, region=jnp.tile(region, (b, 1)))
    bias = jnp.moveaxis(params["bias"][relative_index(size)], -1, 0)[None]
    out = attend(q, k, v, q_meta=meta, k_meta=meta, mask=masks.same("region"), bias=bias).out
    out = together(layers.dense(params["proj"], out.reshape(x.shape).astype(x.dtype)), size, whole)
    return jnp.roll(out[:, :h, :w], moved, (1, 2))


@contract
class CrossWindows:
    """Where windows talk: a TokenTransform of the tower's patches that changes rows and drops none. Its batch rows are
    windows, those of an image together in raster order. Its parameters are the model's: ``init_params``.

    grid: (h, w) patches of one window.  windows: (down, across) of an image.  hidden, heads: of the attention.
    window, shift: of the attention, in patches."""

    grid: tuple
    windows: tuple
    hidden: int
    heads: int
    window: int = 12
    shift: int = 6

    @property
    def whole(self) -> tuple[int, int]:
        return tuple(g * w for g, w in zip(self.grid, self.windows, strict=True))

    def init_params(self, key, dim: int) -> dict:
        keys = jax.random.split(key, 6)
        dense = lambda k, n, m, scale=None: {"kernel": jax.random.normal(k, (n, m)) * (n**-0.5 if scale is None else scale)}  # noqa: E731
        norm = lambda: {"scale": jnp.ones(self.hidden), "bias": jnp.zeros(self.hidden)}  # noqa: E731
        (a, b), wide = fit(self.whole, self.window, self.shift)[0], self.hidden
        return {
            "pos": 0.02 * jax.random.normal(keys[0], (math.prod(self.whole), dim)),
            "down": dense(keys[1], dim, wide), "norm1": norm(), "norm2": norm(),
            "qkv": dense(keys[2], wide, 3 * wide) | {"bias": jnp.zeros(3 * wide)},
            "proj": dense(keys[3], wide, wide) | {"bias": jnp.zeros(wide)},
            "bias": 0.02 * jax.random.normal(keys[4], ((2 * a - 1) * (2 * b - 1), self.heads)),
            "up": dense(keys[5], wide, 2 * wide), "last": {"kernel": jnp.zeros((2 * wide, dim))}, "gain": jnp.ones(()),
        }  # fmt: skip

    def rows(self, n):
        return n

    def apply(self, params, state, tokens, evidence, ctx):
        n, many = tokens.x.shape[1], math.prod(self.windows)
        expect("tokens", f"{len(tokens.x)} windows of {n} patches", f"a multiple of {many} windows of {math.prod(self.grid)}",
               n == math.prod(self.grid) and len(tokens.x) % many == 0)  # fmt: skip
        x = together(tokens.x.reshape(-1, *tokens.x.shape[1:]), self.grid, self.whole)
        y = layers.dense(params["down"], x + params["pos"].reshape(*self.whole, -1).astype(x.dtype))
        inside = {name: params[name] for name in ("qkv", "proj", "bias")}
        y = y + shifted_attention(inside, layers.norm(params["norm1"], y, 1e-5), heads=self.heads, window=self.window,
                                  shift=self.shift)  # fmt: skip
        y = jax.nn.gelu(layers.dense(params["up"], layers.norm(params["norm2"], y, 1e-5)), approximate=False)
        x = x + params["gain"].astype(x.dtype) * layers.dense(params["last"], y)
        return tokens.replace(x=partition(x, self.grid)), state, {}


# ------------------------------------------------------------------------------------------------------------ the model
@contract
class TextMonkeyConfig(vlm.VLMConfig):
    """Static shape of the model; what a VLMConfig says of projectors is not used.

    vision: the tower of one window.  windows: (down, across) of an image.  cross: (layer, width, heads) of the attentions
    between windows, each in front of its layer.  window, shift: of them, in patches.  queries: side of the square of learned
    queries that read a window, in ``pool_heads`` heads.  overview: the whole image, shrunk to one window, is read as well.
    """

    projector_hidden: int = 0
    select: int = -1
    windows: tuple = (2, 2)
    cross: tuple = ((2, 128, 4), (6, 256, 8), (24, 512, 16), (46, 1024, 32))
    window: int = 12
    shift: int = 6
    queries: int = 16
    pool_heads: int = 32
    overview: bool = False

    def check(self):
        vlm.VLMConfig.check(self)
        expect("pool_heads", self.pool_heads, f"a divisor of the width {self.llm.block.dim}",
               self.llm.block.dim % self.pool_heads == 0)  # fmt: skip
        ok = all(0 < layer < self.run_layers and width % heads == 0 for layer, width, heads in self.cross)
        expect("cross", self.cross, f"(layer, width, heads), layers from 1 to {self.run_layers - 1}, widths in whole heads", ok)

    @property
    def local(self) -> int:
        """Tokens of all windows."""
        return math.prod(self.windows) * self.queries**2

    @property
    def visual(self) -> int:
        return self.local + self.queries**2 * self.overview

    def crossings(self) -> dict[int, CrossWindows]:
        return {layer: CrossWindows(self.vision.grid, self.windows, width, heads, self.window, self.shift)
                for layer, width, heads in self.cross}  # fmt: skip

    def see(self, bound: Bound, image: Array, **run) -> vlm.Visual:
        return see(bound, image, **run)


class Resampler(nnx.Module):
    """Parameters of the cross-attention: query, kv, norms, q, k, v, o, post_norm, proj."""

    def __init__(self, c: TextMonkeyConfig, *, rngs: nnx.Rngs):
        wide, dim = c.vision.block.dim, c.llm.block.dim
        dense = lambda bias: layers.Dense(dim, dim, bias=bias, rngs=rngs)  # noqa: E731
        self.query = nnx.Param(jax.random.normal(rngs.params(), (c.queries**2, dim)) * 0.02)
        self.kv = layers.Dense(wide, dim, rngs=rngs)
        self.query_norm, self.kv_norm, self.post_norm = (layers.Norm(dim, kind="layer") for _ in range(3))
        self.q, self.k, self.v, self.o, self.proj = dense(True), dense(True), dense(True), dense(True), dense(False)


def resample(p: dict, c: TextMonkeyConfig, x: Array) -> Array:
    """Patches [B, N, C] of windows to what the queries read of them [B, queries ** 2, D]."""
    dim, side = c.llm.block.dim, c.queries
    at = np.roll(vit.sincos_2d(side, side, dim), dim // 2, axis=1)  # the column's half comes first
    across = at.reshape(side, side, dim)
    for axis, n in enumerate(c.vision.grid):  # positions of the patches are those of the queries, at another size
        across = np.moveaxis(np.tensordot(cubic_weights(side, n), across, (1, axis)), 0, axis)
    kv = layers.norm(p["kv_norm"], layers.dense(p["kv"], x), 1e-6)
    k = layers.dense(p["k"], kv + jnp.asarray(across.reshape(-1, dim), kv.dtype))
    query = layers.norm(p["query_norm"], p["query"], 1e-6) + at
    q = jnp.broadcast_to(layers.dense(p["q"], query.astype(x.dtype)), (x.shape[0], side * side, dim))
    q, k, v = (y.reshape(*y.shape[:2], c.pool_heads, -1) for y in (q, k, layers.dense(p["v"], kv)))
    out = layers.dense(p["o"], attend(q, k, v).out.reshape(x.shape[0], side * side, dim).astype(x.dtype))
    return layers.dense(p["proj"], layers.norm(p["post_norm"], out, 1e-6))


def see(bound: Bound, image: Array, *, prompt=None, dtype=None, phase: str = "prefill", key=None, out=None) -> vlm.Visual:
    """Image [B, H, W, ch], H x W of all windows, to the visual rows of the language model."""
    program, arrays, params = bound
    c: TextMonkeyConfig = program.config
    size = c.vision.image
    h, w = (s * n for s, n in zip(size, c.windows, strict=True))
    expect("image", f"shape {image.shape}", f"[batch, {h}, {w}, {c.vision.channels}]",
           image.ndim == 4 and image.shape[1:] == (h, w, c.vision.channels))  # fmt: skip
    expect("out", "a tower result", "None: windows are encoded together", out is None)
    crops = partition(image, size).reshape(-1, *size, image.shape[-1])
    ours = {cut.name: params["cross"][str(cut.layer)] for cut in program.stack("vision").cuts
            if isinstance(cut.transform, CrossWindows)}  # fmt: skip
    trained = {**arrays["trained"], "vision": {**arrays["trained"].get("vision", {}), **ours}}
    out, _ = vlm.tower(Bound(program, {**arrays, "trained": trained}, params), crops, dtype=dtype, phase=phase)
    x = resample(params["resampler"], c, out.streams.tokens("vision").x).reshape(image.shape[0], c.local, -1)
    rows = stack.streams_of({"vision": (x, Meta.of(c.local, kind=np.ones((1, c.local), np.int32)))})
    facts = {**out.evidence, "features": x, "text": prompt}
    record, aux = program.transform("project"), {}
    if record is not None:
        mine = params_of({side: arrays.get(side, {}).get("sites", {}) for side in ("operands", "trained")}, "project")
        ctx = Ctx(phase=phase, site="project", key=key, spec=c.site_spec("project"))
        rows, aux["project"] = stack.transform(record, mine, rows, "vision", facts, ctx)
    rows = rows.tokens("vision")
    if c.overview:
        rows = _beside(rows, overview(bound, image, dtype=dtype, phase=phase), c.local)
    return vlm.Visual(rows.x, rows.meta, rows.slot, facts, x, out, aux=aux)


def overview(bound: Bound, image: Array, *, dtype=None, phase: str = "prefill") -> Array:
    """[B, queries ** 2, D] of the image shrunk to one window, whose patches see no other window."""
    program, arrays, params = bound
    c: TextMonkeyConfig = program.config
    for axis, n in enumerate(c.vision.image, 1):
        weights = jnp.asarray(cubic_weights(image.shape[axis], n), jnp.float32)
        image = jnp.moveaxis(jnp.tensordot(weights, image, (1, axis)), 0, axis)
    alone = dataclasses.replace(program.stack("vision"), cuts=())
    program = dataclasses.replace(program, stacks=(("vision", alone), *program.stacks[1:]))
    out, _ = vlm.tower(Bound(program, arrays, params), image, dtype=dtype, phase=phase)
    return resample(params["resampler"], c, out.streams.tokens("vision").x)


def _beside(rows: Tokens, more: Array, start: int) -> Tokens:
    """Rows with ``more`` behind them, in time from ``start``; slots go on counting the rows they counted."""
    n = more.shape[1]
    new = stack.streams_of({"vision": (rows.x, rows.meta), "more": (more, Meta.of(
        n, pos=start + np.arange(n, dtype=np.int32)[None], kind=np.ones((1, n), np.int32)))})  # fmt: skip
    return Tokens(new.x, new.meta, rows.slot)


class TextMonkey(nnx.Module):
    """Parameters: vision, resampler, llm and cross {layer: parameters of CrossWindows}."""

    def __init__(self, c: TextMonkeyConfig, *, rngs: nnx.Rngs):
        self.config = c
        self.vision = vit.ViT(c.vision, rngs=rngs)
        self.resampler = Resampler(c, rngs=rngs)
        self.llm = llm.LLM(c.llm, rngs=rngs)


def bind(c: TextMonkeyConfig, params, *, keep: int | None = 512, reduce=None, **sockets) -> Bound:
    """Bind sockets as ``vlm.bind`` does; sites "vision.<layer>" of the attentions between windows are taken.

    keep: tokens of all windows that the token resampler leaves, None: all; ``reduce["project"]`` replaces it.
    """
    within = {f"vision.{layer}": record for layer, record in c.crossings().items()}
    taken = [site for site in reduce or {} if site in within or site == "vision"]
    expect("reduce", taken, "inside the tower, between its attentions across windows, or behind the resampler", not taken)
    behind = {} if keep is None else {"project": textmonkey(keep)}
    return vlm.bind(c, params, reduce={**within, **behind, **(reduce or {})}, **sockets)


def init(c: TextMonkeyConfig, seed: int = 0) -> dict:
    """Fresh parameters as a pure dict; those of the token resampler are the bound model's (``bind``)."""

    def make(key):
        pure = layers.pure(TextMonkey(c, rngs=nnx.Rngs(params=key)))
        keys = jax.random.split(jax.random.fold_in(key, 1), max(1, len(c.cross)))
        cross = {str(layer): record.init_params(k, c.vision.block.dim)
                 for k, (layer, record) in zip(keys, c.crossings().items(), strict=False)}  # fmt: skip
        return {**pure, "cross": cross}

    return jax.jit(make)(jax.random.key(seed))


__all__ = ["CrossWindows", "TextMonkey", "TextMonkeyConfig", "bind", "forward", "init", "regions", "resample", "see",
           "shifted_attention"]  # fmt: skip
