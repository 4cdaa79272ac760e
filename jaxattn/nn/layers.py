"""Parameter holders and the functions that read them: dense maps, norms, embeddings, feed-forward.

A module only makes and names parameters; the mathematics is a function of its pure dict, so that a stack of layers is
one dict with a leading layer axis and a step is ``jax.jit`` over plain arrays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.core.types import Array

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Dense(nnx.Module):
    """kernel [in, out] ~ N(0, scale^2 / in), optional bias [out] of zeros."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, scale: float = 1.0, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) * (scale * inputs**-0.5))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs))


class Norm(nnx.Module):
    """scale [dim] of ones (of zeros where it is an ``offset`` from one); kind "layer" adds bias [dim] of zeros."""

    def __init__(self, dim: int, *, kind: str = "rms", offset: bool = False):
        self.scale = nnx.Param(jnp.zeros(dim) if offset else jnp.ones(dim))
        if kind == "layer":
            self.bias = nnx.Param(jnp.zeros(dim))


class Embed(nnx.Module):
    """embedding [vocab, dim] ~ N(0, scale^2)."""

    def __init__(self, vocab: int, dim: int, *, scale: float = 0.02, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab, dim)) * scale)


class MLP(nnx.Module):
    """Feed-forward parameters: up, down and, when gated, gate."""

    def __init__(self, dim: int, hidden: int, *, gated: bool, bias: bool, out_scale: float, rngs: nnx.Rngs):
        if gated:
            self.gate = Dense(dim, hidden, bias=bias, rngs=rngs)
        self.up = Dense(dim, hidden, bias=bias, rngs=rngs)
        self.down = Dense(hidden, dim, bias=bias, scale=out_scale, rngs=rngs)


def dense(p: dict, x: Array) -> Array:
    """x [..., in] -> [..., out]; products in x's dtype, accumulated in float32 by the hardware's dot."""
    y = x @ p["kernel"].astype(x.dtype)
    if "lora" in p:
        y = y + low_rank(p["lora"], x)
    return y + p["bias"].astype(y.dtype) if "bias" in p else y


def low_rank(p: dict, x: Array) -> Array:
    """(x a) b, a [in, rank] and b [rank, out]; with "keep" and "key" (uint32 [2]) that share of x's entries, scaled up."""
    if "keep" in p:
        kept = jax.random.bernoulli(jax.random.wrap_key_data(p["key"]), p["keep"], x.shape)
        x = jnp.where(kept, x / p["keep"].astype(x.dtype), 0)
    return (x @ p["a"].astype(x.dtype)) @ p["b"].astype(x.dtype)


def norm(p: dict, x: Array, eps: float, *, unit_offset: bool = False) -> Array:
    """RMS norm, or layer norm where the parameters have a bias; statistics in float32.

    ``unit_offset``: the stored scale is an offset from one (Gemma's layout)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if "bias" in p:
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    scale = p["scale"].astype(wide.dtype) + (1.0 if unit_offset else 0.0)
    y = wide * scale
    if "bias" in p:
        y = y + p["bias"].astype(wide.dtype)
    return y.astype(x.dtype)


def mlp(p: dict, x: Array, activation: str) -> Array:
    """Gated (SwiGLU-like) where the parameters have a gate, plain otherwise."""
    act = ACTIVATIONS[activation]
    hidden = act(dense(p["gate"], x)) * dense(p["up"], x) if "gate" in p else act(dense(p["up"], x))
    return dense(p["down"], hidden)


def first_neurons(p: dict, n: int) -> dict:
    """Parameters of a feed-forward with its first ``n`` hidden neurons only."""

    def outputs(d):
        cut = {name: x[..., :n] for name, x in d.items() if name in ("kernel", "bias")}
        return {**cut, "lora": {**d["lora"], "b": d["lora"]["b"][:, :n]}} if "lora" in d else cut

    def inputs(d):
        cut = {**d, "kernel": d["kernel"][:n]}
        return {**cut, "lora": {**d["lora"], "a": d["lora"]["a"][:n]}} if "lora" in d else cut

    return {name: inputs(d) if name == "down" else outputs(d) for name, d in p.items()}


def pure(module: nnx.Module) -> dict:
    """The parameters of a module as a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))
