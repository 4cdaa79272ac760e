"""Lightning attention: linear attention whose heads forget at fixed rates, normalised afterwards instead of divided.

"Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention" (TransNormerLLM's mixer,
arXiv:2405.17381) and "Lightning Attention-2" (arXiv:2401.04658), whose chunked form is ``core.linear``:

    o_t = sum_{j <= t} exp(-s (t - j)) (q_t . k_j) v_j         s = alibi slope of the head * (1 - l / (L - 1) + 1e-5)
    y   = gate(x) * norm(concat of the heads' o)

No scale and no denominator. Deviations: rows are counted as MiniMax-M1 counts them (from the end of the chunk), so the
state after any length is the state of decoding; the decay counts valid rows, so padding changes nothing; packed
segments start from an empty state.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.gates import scale_rows
from jaxattn.core.linear import linear_attend
from jaxattn.core.mask import causal, same
from jaxattn.core.rope import lrpe as encode_lrpe
from jaxattn.core.rope import lrpe_theta
from jaxattn.core.types import Array, Call, Ctx, Part, Spec, State, contract, expect
from jaxattn.registry import register

PACKED = causal() & same("segment")
NORMS = ("rms", "srms", "layer", None)
GATES = ("sigmoid", "low_rank", "linear", None)


def lightning_attention_2(q, k, v, slope, state=None, *, chunk=None) -> tuple[Array, Array]:
    """Causal linear attention with one decay per head (Lightning Attention-2).

    Args:
      q: [B, N, H, F].  k: [B, N, G, F].  v: [B, N, G, Dv].  slope: [H] or [B|1, N, H], >= 0: the state shrinks by
        exp(-slope) before a row is added (inf: it forgets everything).
      state: [B, H, F, Dv] before the first row, or None.  chunk: rows per block, None for what suits
        the implementation; changes speed, not the result.
    Returns: out [B, N, H, Dv] and the state after the last row, float32 or wider.
    """
    slope = jnp.asarray(slope)
    expect("slope", f"shape {slope.shape}", f"[..., {q.shape[2]}], query heads", slope.shape[-1:] == (q.shape[2],))
    return linear_attend(q, k, v, log_decay=-slope, state=state, chunk=chunk)


def alibi_slopes(heads: int) -> np.ndarray:
    """float64 [heads]: 2^(-8 h / heads), h = 1..heads, for powers of two; otherwise those of the power of two below and
    then, for the heads that are left, every second one of the power of two above (ALiBi, arXiv:2108.12409)."""
    expect("heads", heads, "at least 1", heads >= 1)
    power = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8.0 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between[: heads - power]])


def layer_slopes(heads: int, layer, layers: int) -> Array:
    """[heads] decay rates of one layer: the last of ``layers`` keeps almost everything. ``layer`` may be traced."""
    return alibi_slopes(heads) * (1 - layer / max(layers - 1, 1) + 1e-5)


def simple_rms_norm(x, eps=1e-6) -> Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, without a weight."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)


def sglu(x, w1, w2, w3) -> Array:
    """Simple gated linear unit, TransNormerLLM's channel mixer: ((x w1) * (x w2)) w3, no activation."""
    return ((x @ w1) * (x @ w2)) @ w3


@register("attention")
def lightning_attention(
    *, norm="rms", gate="sigmoid", silu_values=True, decay="layer", lrpe=False, eps=1e-6, chunk=None
) -> LightningAttention:
    """Lightning attention as a layer's attention; it owns its state (decoding is a call with N = 1).

    The defaults are MiniMax-M1's layer. TNL: ``norm="srms", gate="low_rank"`` and ``lrpe=True`` for its first layer;
    TransNormerLLM: ``norm="srms", gate="linear", silu_values=False``.

    Args:
      norm: over all heads' outputs together: "rms" | "srms" (no weight) | "layer" | None.
      gate: from the block's input x: "sigmoid" (x W), "low_rank" sigmoid (x W1 W2, width head_dim), "linear" x W, None.
      silu_values: silu on v too (q and k always have it).
      decay: "layer" (slopes fall with depth) | "head" (the same in every layer) | None.
      lrpe: learned linearised relative positions on q and k; doubles the state.
    """
    return LightningAttention(norm, gate, silu_values, decay, lrpe, eps, chunk)


@contract
class LightningAttention:
    norm: str | None = "rms"
    gate: str | None = "sigmoid"
    silu_values: bool = True
    decay: str | None = "layer"
    lrpe: bool = False
    eps: float = 1e-6
    chunk: int | None = None
    recurrent = True  # not a field: true of every record

    def check(self):
        expect("norm", self.norm, f"one of {NORMS}", self.norm in NORMS)
        expect("gate", self.gate, f"one of {GATES}", self.gate in GATES)
        expect("decay", self.decay, "'layer', 'head' or None", self.decay in ("layer", "head", None))
        expect("chunk", self.chunk, "None or at least 1", self.chunk is None or self.chunk >= 1)

    def init(self, key, spec: Spec) -> dict:
        width = spec.heads * (spec.value_dim or spec.head_dim)
        first, second = jax.random.split(key)
        params = {}
        if self.norm in ("rms", "layer"):
            params["norm"] = jnp.ones(width)
        if self.norm == "layer":
            params["norm_bias"] = jnp.zeros(width)
        if self.gate == "low_rank":
            params["gate_in"] = jax.random.normal(first, (spec.dim, spec.head_dim)) * spec.dim**-0.5
            params["gate_out"] = jax.random.normal(second, (spec.head_dim, width)) * spec.head_dim**-0.5
        elif self.gate is not None:
            params["gate"] = jax.random.normal(first, (spec.dim, width)) * spec.dim**-0.5
        if self.lrpe:
            params["theta"] = jnp.asarray(lrpe_theta(spec.heads, spec.head_dim))
        return params

    def init_state(self, spec: Spec) -> State:
        features = spec.head_dim * (2 if self.lrpe else 1)
        shape = (spec.layers, spec.batch, spec.heads, features, spec.value_dim or spec.head_dim)
        return State(layer=jnp.zeros(shape, jnp.float32))

    def apply(self, params: dict, state: State, call: Call, ctx: Ctx) -> tuple[Part, State, dict]:
        expect("past", f"{len(call.past)} cached views", "none: the layer keeps its own state", not call.past)
        packed = call.mask == PACKED
        expect("mask", call.mask, "causal(), with or without same('segment')", call.mask in (None, causal(), PACKED))
        q, k = jax.nn.silu(call.q), jax.nn.silu(call.k)
        v = jax.nn.silu(call.v) if self.silu_values else call.v
        valid = call.k_meta.valid
        v = jnp.where(jnp.asarray(valid)[..., None, None], v, 0)
        h, g = q.shape[2], k.shape[2]
        if self.lrpe:
            k = jnp.repeat(k, h // g, axis=2) if g != h else k  # angles belong to query heads
            q, k = (encode_lrpe(x, call.q_meta.pos, params["theta"]) for x in (q, k))
        start = state.layer if jax.tree.leaves(state.layer) else None
        slope = self.slopes(h, ctx)
        if packed or not (isinstance(valid, np.ndarray) and valid.all()):
            slope = jnp.where(jnp.asarray(valid)[..., None], slope, 0.0)
        if packed:
            segment = jnp.asarray(call.k_meta.labels["segment"])
            fresh = jnp.pad(segment[:, 1:] != segment[:, :-1], [(0, 0), (1, 0)])
            slope = jnp.where(fresh[..., None], jnp.inf, slope)
        out, end = lightning_attention_2(q, k, v, slope, start, chunk=self.chunk)
        if start is not None:
            state = state.replace(layer=end.astype(start.dtype))
        out = self._normed(params, out.reshape(*out.shape[:2], -1))
        out = scale_rows(out.reshape(*q.shape[:3], -1), call.out_gate)
        if self.gate is not None:
            expect("ctx.x", ctx.x, "the block's input [B, N, C], which the gate reads", ctx.x is not None)
            out = scale_rows(out, self._gate(params, ctx.x).reshape(out.shape))
        return Part(out, None), state, {}

    def slopes(self, heads: int, ctx: Ctx) -> Array:
        """[heads] decay rates of the layer at ``ctx``."""
        if self.decay is None:
            return jnp.zeros(heads)
        if self.decay == "head":
            return jnp.asarray(alibi_slopes(heads))
        expect("ctx.spec", ctx.spec, "the stack's Spec: decay='layer' needs its depth", ctx.spec is not None)
        return layer_slopes(heads, ctx.layer, ctx.spec.layers)

    def _normed(self, params, out) -> Array:
        if self.norm is None:
            return out
        wide = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        if self.norm == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        wide = simple_rms_norm(wide, self.eps)
        if self.norm != "srms":
            wide = wide * params["norm"]
        return (wide + params["norm_bias"] if self.norm == "layer" else wide).astype(out.dtype)

    def _gate(self, params, x) -> Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.gate == "low_rank":
            return jax.nn.sigmoid(x @ params["gate_in"] @ params["gate_out"])
        return jax.nn.sigmoid(x @ params["gate"]) if self.gate == "sigmoid" else x @ params["gate"]
