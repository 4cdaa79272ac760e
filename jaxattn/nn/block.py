"""One pre-norm transformer layer: parameters, and the two pure halves around its attention.

The loop that joins them (cache, attention, steering, evidence) is ``models.stack``; no method is known here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.core.rope import Rope
from jaxattn.core.types import Array, Meta, Spec, contract, expect
from jaxattn.nn import layers


@contract
class BlockConfig:
    """Static shape of a layer; what Llama, Mistral, Qwen2, Qwen3 and the usual vision towers differ in.

    norm: "rms" | "layer".  activation: a key of ``layers.ACTIVATIONS``.  gated: SwiGLU-like feed-forward.
    rope: Rope or None.  window: keys per query (sliding window) or None.  causal: mask of the layer.
    layer_scale: learned per-channel factors on both residual branches (DINOv2).
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
    window: int | None = None
    causal: bool = True
    layer_scale: bool = False

    def check(self):
        expect("heads", f"{self.heads} with kv_heads {self.kv_heads}", "a multiple of kv_heads",
               self.kv_heads > 0 and self.heads % self.kv_heads == 0)  # fmt: skip
        expect("norm", self.norm, "'rms' or 'layer'", self.norm in ("rms", "layer"))
        expect("activation", self.activation, f"one of {sorted(layers.ACTIVATIONS)}", self.activation in layers.ACTIVATIONS)

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
            self.q_norm = layers.Norm(c.head_dim)
            self.k_norm = layers.Norm(c.head_dim)


class Block(nnx.Module):
    """norm1, attn, norm2, mlp; residual outputs start smaller by (2 L) ** -0.5."""

    def __init__(self, c: BlockConfig, n_layers: int, *, rngs: nnx.Rngs):
        out_scale = (2 * n_layers) ** -0.5
        self.norm1 = layers.Norm(c.dim, kind=c.norm)
        self.attn = Projections(c, out_scale=out_scale, rngs=rngs)
        self.norm2 = layers.Norm(c.dim, kind=c.norm)
        self.mlp = layers.MLP(c.dim, c.hidden, gated=c.gated, bias=c.mlp_bias, out_scale=out_scale, rngs=rngs)
        if c.layer_scale:
            self.scale1 = layers.Norm(c.dim)
            self.scale2 = layers.Norm(c.dim)


def make_stack(c: BlockConfig, n_layers: int, rngs: nnx.Rngs) -> Block:
    """``n_layers`` blocks as one Block whose parameters carry a leading layer axis."""
    keys = jax.random.split(rngs.params(), n_layers)
    return nnx.vmap(lambda key: Block(c, n_layers, rngs=nnx.Rngs(params=key)))(keys)


def project(p: dict, c: BlockConfig, x: Array) -> tuple[Array, Array, Array]:
    """Normalised input [B, N, C] -> q [B, N, H, D], k, v [B, N, G, D], not rotated."""
    q = layers.dense(p["q"], x).reshape(*x.shape[:2], c.heads, c.head_dim)
    k = layers.dense(p["k"], x).reshape(*x.shape[:2], c.kv_heads, c.head_dim)
    v = layers.dense(p["v"], x).reshape(*x.shape[:2], c.kv_heads, c.head_dim)
    if c.qk_norm:
        q, k = layers.norm(p["q_norm"], q, c.eps), layers.norm(p["k_norm"], k, c.eps)
    return q, k, v


def attention_residual(p: dict, c: BlockConfig, x: Array, out: Array) -> Array:
    """Add the projected head outputs [B, N, H, Dv] to the residual stream."""
    y = attention_output(p, x, out)
    return x + (y * p["scale1"]["scale"].astype(y.dtype) if c.layer_scale else y)


def attention_output(p: dict, x: Array, out: Array) -> Array:
    """Head outputs [B, N, H, Dv] projected to the width and dtype of x: what the attention sub-block adds, unscaled."""
    return layers.dense(p["attn"]["o"], out.reshape(*out.shape[:2], -1).astype(x.dtype))


def mlp_residual(p: dict, c: BlockConfig, x: Array) -> Array:
    y = mlp_output(p, c, x)[1]
    return x + (y * p["scale2"]["scale"].astype(y.dtype) if c.layer_scale else y)


def mlp_output(p: dict, c: BlockConfig, x: Array) -> tuple[Array, Array]:
    """(normalised input, output) of the feed-forward sub-block at the residual stream x."""
    h = layers.norm(p["norm2"], x, c.eps)
    return h, layers.mlp(p["mlp"], h, c.activation)


def rotary_length(c: BlockConfig, meta: Meta) -> Array | None:
    """Tokens so far, by the highest rotary position of the new rows: what a dynamic scaling of the frequencies reads; None
    for every other rotary embedding."""
    if c.rope is None or c.rope.scaling is None or c.rope.scaling.kind != "dynamic":
        return None
    pos = jnp.asarray(meta.pos if meta.rope is None else meta.rope)
    valid = meta.valid if pos.ndim == meta.valid.ndim else meta.valid[..., None]
    return jnp.max(jnp.where(valid, pos, 0)) + 1


def rotate(c: BlockConfig, x: Array, meta: Meta, length: Array | None = None) -> Array:
    """Apply the layer's rotary embedding, if it has one, at a Meta's rotary positions (its ``pos`` where none are set).

    ``length``: of ``rotary_length``, the same for queries and the keys they meet."""
    if c.rope is None:
        return x
    pos = meta.pos if meta.rope is None else meta.rope
    per_head = meta.valid.ndim == 3  # kv heads keep different rows
    return c.rope.apply(x, jnp.asarray(pos), length=length, per_head=per_head)
