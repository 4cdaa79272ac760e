"""LangDC: a small language model says what a clip shows, and what it thought while saying so are the clip's tokens ("Seeing
More, Saying More: Lightweight Language Experts are Dynamic Video Token Compressors").

A video is cut into clips. A caption model reads each alone and describes it word by word; the hidden row that predicted a
word, at one chosen layer, is a soft token. Who has more to say says more: the caption's end decides how many tokens there are.
Soft tokens of all clips, in order and without gaps, go through a projector into the main language model.

Trained in two stages: the caption model by next-token prediction on captions whose length grows with what there is to see
(``caption_loss``), then projector and main model with the caption model frozen, its hidden rows taken from given captions
(teacher forcing) instead of generated ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxattn.cache.full import full
from jaxattn.core.pooling import adaptive_avg_pool_2d
from jaxattn.core.select import gather_tokens
from jaxattn.core.slots import compact
from jaxattn.core.types import Array, Meta, Spec, State, contract, data, expect
from jaxattn.nn import layers
from models import stack
from models.bind import Bound
from models.generate import decode, prefill
from models.language import llm
from models.multimodal import vlm

forward = vlm.forward


@data
class Video:
    """frames [B, F, H, W, ch]; captions int32 [B, clips, M] to take hidden rows from (each ends with the stop token), or
    None: they are generated."""

    frames: Array
    captions: Array | None = None


# ------------------------------------------------------------------------------------------------------ the caption model
@contract
class ClipConfig(vlm.VLMConfig):
    """A vision-language model of clips: ``frames`` pictures, each pooled to the grid ``pool`` behind the projector (() where
    it is not). One frame that is not pooled is a VLMConfig's model, with the same parameters."""

    frames: int = 1
    pool: tuple = ()

    @property
    def visual(self) -> int:
        return self.frames * int(np.prod(self.pool or self.vision.grid))

    def see(self, bound: Bound, image: Array, *, prompt=None, dtype=None, phase="prefill", key=None, out=None) -> vlm.Visual:
        """Clips [B, frames, H, W, ch] to rows, frame by frame."""
        expect("image", f"shape {image.shape}", f"[batch, {self.frames}, height, width, channels]",
               image.ndim == 5 and image.shape[1] == self.frames)  # fmt: skip
        expect("out", "a tower result", "None: a clip's frames are encoded together", out is None)
        b = image.shape[0]
        out, _ = vlm.tower(bound, image.reshape(-1, *image.shape[2:]), dtype=dtype, phase=phase)
        x = pooled(bound.params, self, out.streams.tokens("vision").x, self.pool).reshape(b, self.visual, -1)
        rows = stack.streams_of({"vision": (x, visual_meta(self.visual))}).tokens("vision")
        return vlm.Visual(rows.x, rows.meta, rows.slot, {**out.evidence, "features": x, "text": prompt}, x, out)


def pooled(params: dict, c: vlm.VLMConfig, x: Array, grid: tuple[int, int]) -> Array:
    """Patches [B, N, C] through the projector, averaged to a grid (as they are where it is empty): [B, n, D]."""
    every = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    x = vlm.project(params, c, x, every)
    if not grid:
        return x
    x = adaptive_avg_pool_2d(x.reshape(x.shape[0], *c.vision.grid, -1), grid)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def visual_meta(n: int) -> Meta:
    return Meta.of(n, kind=np.ones((1, n), np.int32))


# ----------------------------------------------------------------------------------------------------------- soft captions
@contract
class tap:
    """Steering that remembers the last row that enters layer ``layer``; it changes nothing."""

    layer: int

    def init_state(self, spec: Spec) -> State:
        return State(shared=jnp.zeros((spec.batch, spec.dim), spec.dtype))

    def heads(self, params, state, out, meta, ctx):
        return out, State(state.layer, jnp.where(ctx.layer == self.layer, ctx.hidden[:, -1], state.shared))


@contract
class remember:
    """The most likely token, and the row behind the last norm that said so."""

    def step(self, params, state, value, hidden, ctx):
        token = jnp.argmax(value, -1).astype(jnp.int32)
        return token, State(shared=hidden), jnp.zeros(token.shape, bool)


def layer_number(layer: int, depth: int) -> int:
    """0 (what enters the first layer) to ``depth`` (behind the last norm) from a number that may count from the end."""
    expect("layer", layer, f"a number in [{-depth - 1}, {depth}]", -depth - 1 <= layer <= depth)
    return layer % (depth + 1)


def soft_captions(c: vlm.VLMConfig, params: dict, clips: Array, prompt: tuple[int, ...], *, stop: int, max_new: int,
                  layer: int = -1, dtype=None) -> tuple[Array, Array, Array]:  # fmt: skip
    """Describe clips [B, ...] greedily.

    Args:
      c, params: the caption model.  prompt: token ids.  stop: the token that ends a caption.  max_new: longest caption.
      layer: whose hidden rows are taken, as in Hugging Face: 0 is what enters the first layer, -1 is behind the last norm.
    Returns: soft [B, max_new, C], 0 behind a caption's end; count int32 [B], words before the stop token; words int32
      [B, max_new], ``stop`` from its end on.
    """
    at, depth = layer_number(layer, c.llm.layers), c.llm.layers
    inside = at < depth
    bound = vlm.bind(c, params, cache=full(), steering=tap(at) if inside else None)
    b, sampler = len(clips), remember()
    tokens = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (b, len(prompt)))
    _, state = prefill(bound, tokens, image=clips, max_new=max_new, sampler=sampler, dtype=dtype)
    row_of = lambda s: s.states["steering.0"].shared if inside else s.sampler.shared  # noqa: E731

    def going(carry):
        i, _, _, done, _ = carry
        return (i < max_new) & ~done.all()

    def say(carry):
        i, soft, words, done, state = carry
        done = done | (state.token == stop)
        soft = soft.at[:, i].set(jnp.where(done[:, None], 0, row_of(state)))
        words = words.at[:, i].set(jnp.where(done, stop, state.token))
        return i + 1, soft, words, done, decode(bound, state, sampler=sampler, dtype=dtype)[1]

    row = row_of(state)
    start = (jnp.int32(0), jnp.zeros((b, max_new, row.shape[-1]), row.dtype), jnp.full((b, max_new), stop, jnp.int32),
             jnp.zeros(b, bool), state)  # fmt: skip
    _, soft, words, _, _ = jax.lax.while_loop(going, say, start)
    return soft, caption_length(words, stop), words


def caption_length(words: Array, stop: int) -> Array:
    """int32 [...]: tokens before the first ``stop`` of captions int32 [..., M]; M where there is none."""
    ends = words == stop
    return jnp.where(ends.any(-1), ends.argmax(-1), words.shape[-1]).astype(jnp.int32)


def _told(c: vlm.VLMConfig, params: dict, clips: Array, prompt: tuple[int, ...], words: Array, **run):
    """The caption model over prompt and caption; run: e.g. ``stop``, layers to run."""
    asked = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (len(words), len(prompt)))
    return vlm.forward(vlm.bind(c, params), clips, jnp.concatenate([asked, words[:, :-1]], 1), **run)[0]


def forced_captions(c: vlm.VLMConfig, params: dict, clips: Array, prompt: tuple[int, ...], words: Array, *, stop: int,
                    layer: int = -1, dtype=None) -> tuple[Array, Array]:  # fmt: skip
    """(soft, count) as ``soft_captions``, of given captions int32 [B, M] in place of generated ones: one parallel pass."""
    at, depth = layer_number(layer, c.llm.layers), c.llm.layers
    out = _told(c, params, clips, prompt, words, dtype=dtype, logits=False, stop=at)
    rows = out.hidden if at == depth else out.stack.streams.tokens("text").x
    count = caption_length(words, stop)
    soft = rows[:, len(prompt) - 1 :]
    return jnp.where((jnp.arange(soft.shape[1]) < count[:, None])[..., None], soft, 0), count


def caption_loss(c: vlm.VLMConfig, params: dict, clips: Array, prompt: tuple[int, ...], words: Array, *, stop: int,
                 dtype=None) -> Array:  # fmt: skip
    """Stage one: mean cross-entropy of the captions' words and their stop token, which teaches the budget."""
    logits = _told(c, params, clips, prompt, words, dtype=dtype).logits[:, len(prompt) - 1 :]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), words)
    live = (jnp.arange(words.shape[1]) <= caption_length(words, stop)[:, None]).astype(jnp.float32)
    return (nll * live).sum() / live.sum()


# -------------------------------------------------------------------------------------------------------------- the model
@contract
class LangDCConfig(vlm.VLMConfig):
    """Static shape of the model.

    caption: the caption model; ``vision`` is its tower.  llm: the main language model.  projector_hidden: width between the
    projector's two maps.  clips: of a video.  prompt, stop: the caption model's request and the token that ends a caption.
    max_new: longest caption.  layer: whose hidden rows are the tokens.  branch: grid that every frame's patches are averaged
    to, to be read in front of the captions through a projector of their own (() without this branch).
    """

    caption: vlm.VLMConfig | None = None
    clips: int = 4
    prompt: tuple = ()
    stop: int = 0
    max_new: int = 128
    layer: int = -1
    branch: tuple = ()

    def check(self):
        vlm.VLMConfig.check(self)
        expect("caption", self.caption, "a vision-language model with the same tower",
               self.caption is not None and self.caption.vision == self.vision)  # fmt: skip
        expect("prompt", self.prompt, "at least one token", len(self.prompt) > 0)
        expect("clips, max_new", (self.clips, self.max_new), "at least 1 each", min(self.clips, self.max_new) >= 1)
        layer_number(self.layer, self.caption.llm.layers)

    @property
    def frames(self) -> int:
        """Of a clip."""
        return getattr(self.caption, "frames", 1)

    @property
    def budget(self) -> int:
        """Most soft tokens of a video."""
        return self.clips * self.max_new

    @property
    def visual(self) -> int:
        return self.budget + self.clips * self.frames * int(np.prod(self.branch)) * bool(self.branch)

    def see(self, bound: Bound, image: Video, **run) -> vlm.Visual:
        return see(bound, image, **run)


def clips_of(c: LangDCConfig, frames: Array) -> Array:
    """[B, clips * frames, H, W, ch] -> what the caption model reads: [B * clips, frames, H, W, ch], or pictures [B * clips,
    H, W, ch] of one that reads no clips."""
    many = c.clips * c.frames
    expect("frames", f"shape {frames.shape}", f"[batch, {many}, height, width, channels]",
           frames.ndim == 5 and frames.shape[1] == many)  # fmt: skip
    each = (c.frames,) if isinstance(c.caption, ClipConfig) else ()
    return frames.reshape(-1, *each, *frames.shape[2:])


def captions(c: LangDCConfig, params: dict, video: Video, dtype=None) -> tuple[Array, Array]:
    """(soft [B, clips, M, C], count int32 [B, clips]) of a video, its captions given or generated; no gradient passes."""
    clips, frozen = clips_of(c, video.frames), jax.lax.stop_gradient(params["caption"])
    if video.captions is None:
        soft, count, _ = soft_captions(c.caption, frozen, clips, c.prompt, stop=c.stop, max_new=c.max_new, layer=c.layer,
                                       dtype=dtype)  # fmt: skip
    else:
        b, n, m = video.captions.shape
        expect("captions", f"shape {video.captions.shape}", f"[batch, {c.clips}, at most {c.max_new}]",
               n == c.clips and m <= c.max_new)  # fmt: skip
        words = video.captions.reshape(b * n, m)
        soft, count = forced_captions(c.caption, frozen, clips, c.prompt, words, stop=c.stop, layer=c.layer, dtype=dtype)
    soft = soft.reshape(-1, c.clips, *soft.shape[1:])
    return jax.lax.stop_gradient(soft), count.reshape(-1, c.clips)


def dense_rows(soft: Array, count: Array, budget: int) -> tuple[Array, Array, Array]:
    """Soft tokens [B, clips, M, C] of ``count`` [B, clips] each, without gaps: (rows [B, budget, C], clip int32 [B, budget],
    valid bool [B, budget])."""
    b, n, m, c = soft.shape
    live = (jnp.arange(m) < count[..., None]).reshape(b, n * m)
    index, valid = compact(live, budget)
    return gather_tokens(soft.reshape(b, n * m, c), index), index // m, valid


def see(bound: Bound, image: Video, *, prompt=None, dtype=None, phase="prefill", key=None, out=None) -> vlm.Visual:
    """A video's rows for the main language model. They end where the prompt begins, however many there are: rows of a
    shorter video stand at later places, and places in front of them are empty."""
    c, params = bound.program.config, bound.params
    expect("image", type(image).__name__, "a Video", isinstance(image, Video))
    soft, count = captions(c, params, image, dtype)
    patches = None
    if c.branch:
        frames = image.frames.reshape(-1, *image.frames.shape[2:])
        tower, _ = vlm.tower(vlm.bind(c.caption, params["caption"]), frames, dtype=dtype, phase=phase)
        patches = pooled({"projector": params["branch"]}, c, tower.streams.tokens("vision").x, c.branch)
    return rows_of(c, params, soft, count, patches, prompt=prompt)


def rows_of(c: LangDCConfig, params: dict, soft: Array, count: Array, patches: Array | None = None, *,
            prompt=None) -> vlm.Visual:  # fmt: skip
    """The rows of a video whose captions are known: soft [B, clips, M, C], count [B, clips] (of ``captions``); patches
    [B * frames, n, D], already projected, where the model has that branch."""
    x, clip, valid = dense_rows(soft, count, c.budget)
    p = params["projector"]
    x = layers.dense(p["down"], layers.ACTIVATIONS[c.activation](layers.dense(p["up"], x)))
    b, n = x.shape[:2]
    first, ahead = c.budget - valid.sum(-1, keepdims=True), c.visual - c.budget
    pos = jnp.where(valid, first + ahead + jnp.arange(n), 0)
    groups = {"vision": (x, Meta(pos, valid, labels={"kind": jnp.ones((b, n), jnp.int32), "clip": clip}))}
    if patches is not None:
        places = Meta(first + jnp.arange(ahead), jnp.ones((b, ahead), bool), labels={"kind": jnp.ones((b, ahead), jnp.int32)})
        groups = {"branch": (patches.reshape(b, ahead, -1), places), **groups}
    streams = stack.streams_of(groups)
    slot = jnp.broadcast_to(jnp.arange(streams.x.shape[1], dtype=jnp.int32), streams.x.shape[:2])
    return vlm.Visual(streams.x, streams.meta, slot, {"features": streams.x, "text": prompt, "count": count}, streams.x, None)


class Maps(nnx.Module):
    """The projector: two dense maps."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, rngs: nnx.Rngs):
        self.up = layers.Dense(inputs, hidden, bias=True, rngs=rngs)
        self.down = layers.Dense(hidden, outputs, bias=True, rngs=rngs)


class LangDC(nnx.Module):
    """Parameters: caption (the caption model's), projector, llm and, with a branch of pooled patches, branch."""

    def __init__(self, c: LangDCConfig, *, rngs: nnx.Rngs):
        self.config = c
        self.caption = vlm.VLM(c.caption, rngs=rngs)
        self.projector = Maps(c.caption.llm.block.dim, c.projector_hidden, c.llm.block.dim, rngs=rngs)
        if c.branch:
            self.branch = vlm.Projector(c, rngs=rngs)
        self.llm = llm.LLM(c.llm, rngs=rngs)


def bind(c: LangDCConfig, params, *, reduce=None, **sockets) -> Bound:
    """Bind sockets to the main language model as ``vlm.bind`` does; ``reduce`` acts inside it."""
    taken = [site for site in reduce or {} if site.partition(".")[0] != "llm"]
    expect("reduce", taken, "sites inside the language model", not taken)
    return vlm.bind(c, params, reduce=reduce, **sockets)


def init(c: LangDCConfig, seed: int = 0) -> dict:
    """Fresh parameters as a pure dict; ``{**init(c), "caption": ...}`` takes a trained caption model's."""
    return jax.jit(lambda key: layers.pure(LangDC(c, rngs=nnx.Rngs(params=key))))(jax.random.key(seed))


__all__ = ["ClipConfig", "LangDC", "LangDCConfig", "Video", "bind", "caption_length", "caption_loss", "captions", "dense_rows",
           "forced_captions", "forward", "init", "remember", "rows_of", "see", "soft_captions", "tap"]  # fmt: skip
