"""Text encoders: BERT, and the text towers of CLIP and SigLIP. Absolute positions, and one row (or the mean) that stands for
a text; what they differ in is the configuration's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.core.types import Array, Meta, contract, data, expect
from jaxattn.nn import layers
from jaxattn.nn.block import BlockConfig, make_stack, norm
from models import stack
from models.bind import Bound, Program, bind_stack, subset
from models.language.llm import text_meta

POOLS = ("", "cls", "eos", "last")


@contract
class EncoderConfig:
    """Static shape of a text encoder.

    length: positions it has.  types: kinds of tokens with an embedding of their own (0: none; BERT's sentences).
    embed_norm: a norm on the embeddings (BERT).  final_norm: one behind the last layer (CLIP, SigLIP).
    pool: "cls", tanh of a dense map of the first row (BERT's pooler); "eos", the row of the first token ``eos``, or of the
      largest id where ``eos`` is None (CLIP); "last", the last row (SigLIP); "", none.
    out: width that the pooled row is projected to, 0 for none.  out_bias: of that map.
    """

    vocab: int
    layers: int
    block: BlockConfig
    length: int
    types: int = 0
    embed_norm: bool = False
    final_norm: bool = True
    pool: str = ""
    eos: int | None = None
    out: int = 0
    out_bias: bool = False

    def check(self):
        expect("pool", self.pool, f"one of {POOLS}", self.pool in POOLS)
        expect("out", self.out, "0 without a pool", self.out == 0 or bool(self.pool))


class Encoder(nnx.Module):
    """Parameters: embed, pos, layers; where there are any: types, embed_norm, norm, pooler, out."""

    def __init__(self, c: EncoderConfig, *, rngs: nnx.Rngs):
        dim, kind = c.block.dim, c.block.norm
        self.embed = layers.Embed(c.vocab, dim, rngs=rngs)
        self.pos = nnx.Param(jax.random.normal(rngs.params(), (c.length, dim)) * 0.02)
        if c.types:
            self.types = nnx.Param(jax.random.normal(rngs.params(), (c.types, dim)) * 0.02)
        if c.embed_norm:
            self.embed_norm = layers.Norm(dim, kind=kind)
        self.layers = make_stack(c.block, c.layers, rngs)
        if c.final_norm:
            self.norm = layers.Norm(dim, kind=kind)
        if c.pool == "cls":
            self.pooler = layers.Dense(dim, dim, bias=True, rngs=rngs)
        if c.out:
            self.out = layers.Dense(dim, c.out, bias=c.out_bias, rngs=rngs)


@data
class EncoderOut:
    """rows [B, N, C] behind the last norm; pooled [B, C], projected where the encoder has ``out``, or None; the stack's own
    results."""

    rows: Array
    pooled: Array | None
    stack: stack.StackOut


def bind(c: EncoderConfig, params, *, attention=None, reduce=None, steering=None, remat=False, trained=None,
         key=None) -> Bound:  # fmt: skip
    """Bind sockets to an encoder; ``reduce`` maps "text.6" to the transform before layer 6."""
    cuts = {}
    for site, record in (reduce or {}).items():
        expect("reduce", site, "'text' or 'text.<layer>' in a text encoder", site == "text" or site.startswith("text."))
        cuts[site[5:]] = record
    program, operands, fresh = bind_stack(c.block, c.layers, "text", attention=attention, reduce=cuts, steering=steering,
                                          remat=remat, trained=trained, key=key)  # fmt: skip
    arrays = {"operands": {"text": operands}, "trained": {"text": fresh}}
    return Bound(Program(c, (("text", program),)), arrays, params)


def embed(params: dict, c: EncoderConfig, tokens: Array, meta: Meta, types: Array | None = None, dtype=None) -> Array:
    n = tokens.shape[1]
    expect("tokens", f"{n} rows", f"at most {c.length}, the positions of the encoder", n <= c.length)
    x = jnp.take(params["embed"]["embedding"], tokens, axis=0) + jnp.take(params["pos"], jnp.asarray(meta.pos), axis=0)
    if c.types:
        x = x + jnp.take(params["types"], jnp.zeros_like(tokens) if types is None else types, axis=0)
    x = norm(params["embed_norm"], c.block, x) if c.embed_norm else x
    return x if dtype is None else x.astype(dtype)


def forward(bound: Bound, tokens: Array, *, meta: Meta | None = None, types: Array | None = None, phase: str = "train",
            dtype=None, **run) -> EncoderOut:  # fmt: skip
    """Tokens int32 [B, N] to rows.

    Args: meta: default consecutive positions, all valid (padding: ``text_meta(tokens, pad=...)``).  types: int32 [B, N], the
      kind of each token, default 0.  run: ``models.stack.run`` arguments.
    """
    program, arrays, params = bound
    tokens = jnp.asarray(tokens)
    expect("tokens", f"shape {tokens.shape}", "[batch, tokens]", tokens.ndim == 2)
    c: EncoderConfig = program.config
    expect("types", types, "None for an encoder without them", types is None or c.types > 0)
    meta = text_meta(tokens) if meta is None else meta
    streams = stack.streams_of({"text": (embed(params, c, tokens, meta, types, dtype), meta)})
    out = stack.run(params, program.stack("text"), subset(arrays, "text"), streams, phase=phase, **run)
    rows = norm(params["norm"], c.block, out.streams.x) if c.final_norm else out.streams.x
    return EncoderOut(rows, pool(params, c, rows, tokens, out.streams.slots["text"]) if c.pool else None, out)


def pool(params: dict, c: EncoderConfig, rows: Array, tokens: Array, slot: Array) -> Array:
    """[B, C] (or [B, out]): the row that stands for the text. slot int32 [B, N]: the row of each token."""
    if c.pool == "cls":
        at = jnp.zeros(len(tokens), jnp.int32)
    elif c.pool == "last":
        at = jnp.full(len(tokens), tokens.shape[1] - 1)
    else:
        at = jnp.argmax(tokens if c.eos is None else tokens == c.eos, axis=1)
    at = jnp.take_along_axis(slot, at[:, None], 1)
    x = jnp.take_along_axis(rows, at[..., None], 1)[:, 0]
    x = jnp.tanh(layers.dense(params["pooler"], x)) if c.pool == "cls" else x
    return layers.dense(params["out"], x) if c.out else x


def mean_pool(rows: Array, valid: Array) -> Array:
    """[B, C] mean of the valid rows: what sentence embeddings of BERT's kind use.  rows [B, N, C], valid bool [B, N]."""
    weight = valid[..., None].astype(jnp.promote_types(rows.dtype, jnp.float32))
    return (rows * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


def init(c: EncoderConfig, seed: int = 0) -> dict:
    """Fresh parameters as a pure dict."""
    return jax.jit(lambda key: layers.pure(Encoder(c, rngs=nnx.Rngs(params=key))))(jax.random.key(seed))


__all__ = ["Encoder", "EncoderConfig", "EncoderOut", "bind", "embed", "forward", "init", "mean_pool", "pool"]
