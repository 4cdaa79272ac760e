"""One transformer layer: parameters, and the two pure halves around its attention.

The loop that joins them (cache, attention, steering, evidence) is ``models.stack``; no method is known here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn.core import mask as masks
from jaxattn.core.logits import soft_cap
from jaxattn.core.rope import Rope
from jaxattn.core.rope import rotate as turn
from jaxattn.core.types import Array, Meta, Spec, contract, expect
from jaxattn.nn import layers


@contract
class BlockConfig:
    """Static shape of a layer; what Llama, Mistral, Qwen2, Qwen3, Gemma, BERT and the usual vision towers differ in.

    norm: "rms" | "layer".  activation: a key of ``layers.ACTIVATIONS``.  gated: SwiGLU-like feed-forward.
    rope: Rope or None.  window: keys per query (sliding window), or the label of rows that see each other, or None.
    causal: mask of the layer.
    layer_scale: learned per-channel factors on both residual branches (DINOv2).
    order: where norms stand: "pre", on what each sub-block reads; "post", on the sum behind it (BERT); "both", on what it
      reads and on what it adds (Gemma).  unit_offset: RMS scales are stored as offsets from one (Gemma).
    scale: of the attention logits, None: head_dim ** -0.5.  cap: soft cap of the attention logits or None.
    full_layers: numbers of the layers that have no window in a stack where others do.  local_rope: the rotary embedding of
      layers with a window, where it is not ``rope``.
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    norm: str = "rms"
    eps: float = 1e-6
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: Rope | None = None
    window: int | str | None = None
    causal: bool = True
    layer_scale: bool = False
    order: str = "pre"
    unit_offset: bool = False
    scale: float | None = None
    cap: float | None = None
    full_layers: tuple = ()
    local_rope: Rope | None = None

    def check(self):
        expect("heads", f"{self.heads} with kv_heads {self.kv_heads}", "a multiple of kv_heads",
               self.kv_heads > 0 and self.heads % self.kv_heads == 0)  # fmt: skip
        expect("norm", self.norm, "'rms' or 'layer'", self.norm in ("rms", "layer"))
        expect("activation", self.activation, f"one of {sorted(layers.ACTIVATIONS)}", self.activation in layers.ACTIVATIONS)
        expect("order", self.order, "'pre', 'post' or 'both'", self.order in ("pre", "post", "both"))
        expect("full_layers", self.full_layers, "none without a window", not self.full_layers or self.window is not None)
        local, rope = self.local_rope, self.rope
        expect("local_rope", local, "None, or one that turns the same channels as rope in a stack with full_layers",
               local is None or (bool(self.full_layers) and rope is not None
                                 and (local.dim, local.layout, local.axes) == (rope.dim, rope.layout, rope.axes)))  # fmt: skip

    def spec(self, n_layers: int, **more) -> Spec:
        return Spec(layers=n_layers, dim=self.dim, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
                    value_dim=self.head_dim, **more)  # fmt: skip


class Projections(nnx.Module):
    """q, k, v, o and, where the layer has them, the per-head norms of q and k."""

    def __init__(self, c: BlockConfig, *, out_scale: float, rngs: nnx.Rngs):
        self.q = layers.Dense(c.dim, c.heads * c.head_dim, bias=c.qkv_bias, rngs=rngs)
        self.k = layers.Dense(c.dim, c.kv_heads * c.head_dim, bias=c.qkv_bias, rngs=rngs)
        self.v = layers.Dense(c.dim, c.kv_heads * c.head_dim, bias=c.qkv_bias, rngs=rngs)
        self.o = layers.Dense(c.heads * c.head_dim, c.dim, bias=c.out_bias, scale=out_scale, rngs=rngs)
        if c.qk_norm:
            self.q_norm = layers.Norm(c.head_dim, offset=c.unit_offset)
            self.k_norm = layers.Norm(c.head_dim, offset=c.unit_offset)


class Block(nnx.Module):
    """norm1, attn, norm2, mlp, norms of what they add where there are; residual outputs start smaller by (2 L) ** -0.5."""

    def __init__(self, c: BlockConfig, n_layers: int, *, rngs: nnx.Rngs):
        out_scale = (2 * n_layers) ** -0.5
        norm = lambda: layers.Norm(c.dim, kind=c.norm, offset=c.unit_offset)  # noqa: E731
        self.norm1 = norm()
        self.attn = Projections(c, out_scale=out_scale, rngs=rngs)
        self.norm2 = norm()
        self.mlp = layers.MLP(c.dim, c.hidden, gated=c.gated, bias=c.mlp_bias, out_scale=out_scale, rngs=rngs)
        if c.order == "both":
            self.norm1_out, self.norm2_out = norm(), norm()
        if c.layer_scale:
            self.scale1 = layers.Norm(c.dim)
            self.scale2 = layers.Norm(c.dim)


def make_stack(c: BlockConfig, n_layers: int, rngs: nnx.Rngs) -> Block:
    """``n_layers`` blocks as one Block whose parameters carry a leading layer axis."""
    keys = jax.random.split(rngs.params(), n_layers)
    return nnx.vmap(lambda key: Block(c, n_layers, rngs=nnx.Rngs(params=key)))(keys)


def layer_of(tree, i):
    """One layer's slice of a tree whose leaves are stacked over layers; i: int or int32 scalar."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 0, keepdims=False), tree)


def norm(p: dict, c: BlockConfig, x: Array) -> Array:
    """A norm of the layer, or of the model around it."""
    return layers.norm(p, x, c.eps, unit_offset=c.unit_offset)


def attention_input(p: dict, c: BlockConfig, x: Array) -> Array:
    """What the attention sub-block reads of the residual stream."""
    return x if c.order == "post" else norm(p["norm1"], c, x)


def project(p: dict, c: BlockConfig, x: Array) -> tuple[Array, Array, Array]:
    """The sub-block's input [B, N, C] -> q [B, N, H, D], k, v [B, N, G, D], not rotated."""
    q = layers.dense(p["q"], x).reshape(*x.shape[:2], c.heads, c.head_dim)
    k = layers.dense(p["k"], x).reshape(*x.shape[:2], c.kv_heads, c.head_dim)
    v = layers.dense(p["v"], x).reshape(*x.shape[:2], c.kv_heads, c.head_dim)
    if c.qk_norm:
        q, k = norm(p["q_norm"], c, q), norm(p["k_norm"], c, k)
    return q, k, v


def attention_residual(p: dict, c: BlockConfig, x: Array, out: Array) -> Array:
    """Add the projected head outputs [B, N, H, Dv] to the residual stream."""
    return residual(p, c, 1, x, attention_output(p, c, x, out))


def residual(p: dict, c: BlockConfig, sub_block: int, x: Array, y: Array) -> Array:
    """The residual stream x behind sub-block 1 (attention) or 2 (feed-forward), which adds y."""
    y = y * p[f"scale{sub_block}"]["scale"].astype(y.dtype) if c.layer_scale else y
    return norm(p[f"norm{sub_block}"], c, x + y) if c.order == "post" else x + y


def attention_output(p: dict, c: BlockConfig, x: Array, out: Array) -> Array:
    """Head outputs [B, N, H, Dv] projected to the width and dtype of x: what the attention sub-block adds, unscaled."""
    y = layers.dense(p["attn"]["o"], out.reshape(*out.shape[:2], -1).astype(x.dtype))
    return norm(p["norm1_out"], c, y) if c.order == "both" else y


def mlp_residual(p: dict, c: BlockConfig, x: Array, runs: tuple = ()) -> Array:
    return residual(p, c, 2, x, mlp_output(p, c, x, runs)[1])


def mlp_output(p: dict, c: BlockConfig, x: Array, runs: tuple = ()) -> tuple[Array, Array]:
    """(input, output) of the feed-forward sub-block at the residual stream x. runs: ((first row, row behind the last,
    neurons), ...), where runs of rows use the first of its neurons only."""
    h = x if c.order == "post" else norm(p["norm2"], c, x)
    if runs:
        part = lambda a, b, n: layers.mlp(layers.first_neurons(p["mlp"], n), h[:, a:b], c.activation)  # noqa: E731
        y = jnp.concatenate([part(*run) for run in runs], 1)
    else:
        y = layers.mlp(p["mlp"], h, c.activation)
    return h, norm(p["norm2_out"], c, y) if c.order == "both" else y


# ------------------------------------------------------------------------------------- what differs from layer to layer

FULL = "full_layer"  # label of rows in a stack with windows in some layers: 1 where the layer has none


def mask(c: BlockConfig, given=None):
    """The layers' own mask and the caller's (packing, prefixes), as one expression or None. Where some layers have a window
    it reads the label of ``of_layer``: the kind of a layer is data, so that one scan runs them all."""
    if given is None and c.causal:
        given = masks.causal()
    if c.window is None:
        return given
    own = masks.same(c.window) if isinstance(c.window, str) else masks.window(c.window)
    own = own | masks.query_is(FULL, 1) if c.full_layers else own
    return own if given is None else given & own


def is_full(c: BlockConfig, layer: Array | int) -> Array:
    """bool scalar: whether a layer of a stack with ``full_layers`` is one of them."""
    return jnp.any(jnp.asarray(layer) == np.asarray(c.full_layers, np.int32))


def of_layer(c: BlockConfig, meta: Meta, layer: Array | int) -> Meta:
    """Meta of rows with the label that the mask of a mixed stack reads."""
    if not c.full_layers:
        return meta
    label = jnp.broadcast_to(is_full(c, layer).astype(jnp.int32), jnp.shape(meta.pos))
    return meta.replace(labels={**meta.labels, FULL: label})


def score_mod(c: BlockConfig):
    """What the layer does to its attention logits, or None."""
    return None if c.cap is None else soft_cap(c.cap)


@contract
class _varies:
    """Stands for the rotary embedding of a stack whose layers have different ones."""

    def shift(self, x, offset, **_):
        raise ValueError("rope: expected one rotary embedding for all layers, got a stack with two: keys cannot be moved")

    apply = shift


def shared_rope(c: BlockConfig):
    """The rotary embedding that a Call names: every layer's, or one that refuses to be used."""
    return c.rope if c.local_rope is None else _varies()


def rotary_length(c: BlockConfig, meta: Meta) -> Array | None:
    """Tokens so far, by the highest rotary position of the new rows: what some scalings of the frequencies read; None for
    every other rotary embedding."""
    if not any(r is not None and r.scaling is not None and r.scaling.by_length for r in (c.rope, c.local_rope)):
        return None
    pos = jnp.asarray(meta.pos if meta.rope is None else meta.rope)
    valid = meta.valid if pos.ndim == meta.valid.ndim else meta.valid[..., None]
    return jnp.max(jnp.where(valid, pos, 0)) + 1


def rotate(c: BlockConfig, x: Array, meta: Meta, length: Array | None = None, layer: Array | int = 0) -> Array:
    """Apply the layer's rotary embedding, if it has one, at a Meta's rotary positions (its ``pos`` where none are set).

    ``length``: of ``rotary_length``, the same for queries and the keys they meet."""
    if c.rope is None:
        return x
    pos = jnp.asarray(meta.pos if meta.rope is None else meta.rope)
    per_head = meta.valid.ndim == 3  # kv heads keep different rows
    if c.local_rope is None:
        return c.rope.apply(x, pos, length=length, per_head=per_head)
    full, ropes = is_full(c, layer), (c.rope, c.local_rope)
    freqs = jnp.where(full, *(r.frequencies(length) for r in ropes))
    scale = jnp.where(full, *(jnp.float32(r.attention_scaling) for r in ropes))
    return turn(x, pos, freqs, layout=c.rope.layout, axes=c.rope.axes, per_head=per_head, scale=scale)
