"""A Llama-like language model: RMSNorm, rotary embeddings, grouped queries, SwiGLU; what Llama 2/3, Mistral, Qwen2, Qwen3
and Gemma differ in is the configuration's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.core import mask as masks
from jaxattn.core.rope import Rope
from jaxattn.core.types import Array, Meta, contract, data, expect
from jaxattn.nn import layers
from jaxattn.nn.block import BlockConfig, make_stack, norm
from jaxattn.nn.partition import constrain
from models import stack
from models.bind import Bound, Program, bind_stack, subset


@contract
class LLMConfig:
    """Static shape of a language model. ``length``: positions it is trained for (documentation and defaults).

    embed_scale: factor on the embeddings that enter the stack.  cap: soft cap of the logits or None (Gemma)."""

    vocab: int
    layers: int
    block: BlockConfig
    tie: bool = True
    length: int = 2048
    embed_scale: float = 1.0
    cap: float | None = None

    def check(self):
        expect("vocab", self.vocab, "at least 2", self.vocab >= 2)
        expect("layers", self.layers, "at least 1", self.layers >= 1)


def config(vocab: int, layers: int, dim: int, heads: int, *, kv_heads: int | None = None, head_dim: int | None = None,
           hidden: int | None = None, base: float = 10000.0, tie: bool = True, length: int = 2048, rope: bool = True,
           embed_scale: float = 1.0, logit_cap: float | None = None, **block) -> LLMConfig:  # fmt: skip
    """An LLMConfig from the usual sizes; ``block`` takes every other field of BlockConfig (qk_norm, window, ...)."""
    head_dim = dim // heads if head_dim is None else head_dim
    turn = Rope(head_dim, base) if rope is True else rope or None
    hidden = -(-dim * 8 // 3 // 32) * 32 if hidden is None else hidden
    layer = BlockConfig(dim, heads, kv_heads or heads, head_dim, hidden, rope=turn, **block)
    return LLMConfig(vocab, layers, layer, tie, length, embed_scale, logit_cap)


class LLM(nnx.Module):
    """Parameters: embed, layers (leading layer axis), norm and, untied, head."""

    def __init__(self, c: LLMConfig, *, rngs: nnx.Rngs):
        self.config = c
        self.embed = layers.Embed(c.vocab, c.block.dim, rngs=rngs)
        self.layers = make_stack(c.block, c.layers, rngs)
        self.norm = layers.Norm(c.block.dim, kind=c.block.norm, offset=c.block.unit_offset)
        if not c.tie:
            self.head = layers.Dense(c.block.dim, c.vocab, rngs=rngs)


@data
class LLMOut:
    """logits float32 [B, N, V]; hidden [B, N, C] after the last norm; the stack's own results."""

    logits: Array
    hidden: Array
    stack: stack.StackOut


def bind(c: LLMConfig, params, *, attention=None, reduce=None, cache=None, steering=None, remat=False, trained=None,
         key=None) -> Bound:  # fmt: skip
    """Bind sockets to a language model; ``reduce`` maps "llm.8" (or "llm" for a method with its own schedule)."""
    cuts = {}
    for site, record in (reduce or {}).items():
        expect("reduce", site, "'llm' or 'llm.<layer>' in a language model", site == "llm" or site.startswith("llm."))
        cuts[site[4:]] = record
    program, operands, fresh = bind_stack(c.block, c.layers, "llm", attention=attention, reduce=cuts, cache=cache,
                                          steering=steering, remat=remat, trained=trained, key=key)  # fmt: skip
    arrays = {"operands": {"llm": operands}, "trained": {"llm": fresh}}
    return Bound(Program(c, (("llm", program),)), arrays, params)


def text_meta(tokens: Array, *, pad: int | None = None, start=0) -> Meta:
    """Meta of right-padded token rows [B, N]: positions from ``start``, padding (== pad) invalid."""
    b, n = tokens.shape
    pos = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32) + jnp.asarray(start, jnp.int32).reshape(-1, 1), (b, n))
    valid = jnp.ones((b, n), bool) if pad is None else tokens != pad
    return Meta(pos, valid)


def record_meta(batch: dict) -> tuple[Meta, object]:
    """(Meta, mask) of a layout record: packed segments see themselves only; position drives order and rotation."""
    segment = jnp.asarray(batch["segment"])
    pos = jnp.asarray(batch["position"])
    # Order in time must be unique in a row for causality; the position inside the segment is the rotary one.
    order = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32), segment.shape)
    meta = Meta(order, segment > 0, rope=pos, labels={"segment": segment})
    return meta, masks.causal() & masks.same("segment")


def embed(params: dict, c: LLMConfig, tokens: Array, dtype=None) -> Array:
    x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
    x = x if c.embed_scale == 1 else x * jnp.asarray(c.embed_scale, x.dtype)
    return x if dtype is None else x.astype(dtype)


def head(params: dict, c: LLMConfig, x: Array) -> Array:
    """Logits float32 [..., V] of normalised hidden rows."""
    kernel = params["embed"]["embedding"].T if c.tie else params["head"]["kernel"]
    acc = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=acc)
    logits = logits if c.cap is None else c.cap * jnp.tanh(logits / c.cap)
    return constrain(logits, ("batch", "length", "vocab")) if x.ndim == 3 else logits


def forward(bound: Bound, tokens: Array, *, meta: Meta | None = None, mask=None, phase: str = "train", dtype=None,
            logits: bool = True, **run) -> LLMOut:  # fmt: skip
    """Tokens int32 [B, N] to logits.

    Args: meta: default consecutive positions.  mask: replaces the causal mask (packing, prefixes).  dtype: of the
      residual stream (bfloat16 for mixed precision; float32 statistics and logits).  run: ``models.stack.run`` arguments.
    """
    program, arrays, params = bound
    expect("tokens", f"shape {tokens.shape}", "[batch, tokens]", tokens.ndim == 2)
    meta = text_meta(tokens) if meta is None else meta
    streams = stack.streams_of({"text": (embed(params, program.config, tokens, dtype), meta)})
    return finish(bound, stack.run(params, program.stack("llm"), subset(arrays, "llm"), streams, phase=phase, mask=mask, **run),
                  logits=logits)  # fmt: skip


def finish(bound: Bound, out: stack.StackOut, *, logits: bool = True, params=None, c=None) -> LLMOut:
    """Final norm and head over the rows of a stack's result."""
    params = bound.params if params is None else params
    c = bound.program.config if c is None else c
    hidden = norm(params["norm"], c.block, out.streams.x)
    return LLMOut(head(params, c, hidden) if logits else None, hidden, out)


def init(c: LLMConfig, seed: int = 0) -> dict:
    """Fresh parameters as a pure dict (jitted: the initial values never exist twice)."""
    return jax.jit(lambda key: layers.pure(LLM(c, rngs=nnx.Rngs(params=key))))(jax.random.key(seed))


def tiny(vocab: int = 64, **changes) -> LLMConfig:
    """A small configuration for tests and examples."""
    sizes = dict(vocab=vocab, layers=3, dim=32, heads=4, kv_heads=2, hidden=64) | changes
    return config(**sizes)


__all__ = ["LLM", "LLMConfig", "LLMOut", "bind", "config", "embed", "finish", "forward", "head", "init", "record_meta",
           "text_meta", "tiny"]  # fmt: skip
