"""SiT: tokens of a vision transformer become fewer soft mixtures of themselves ("Self-slimmed Vision Transformer",
arXiv 2111.12624).

A slimming module turns N tokens X [N, C] into M: with W = GELU(LN(X) W1) W2 [N, M], the weights A = softmax over the N
tokens of (scale W), scale a trained number, and the new tokens A^T X. CLS and registers pass by. The published stages leave
int(N / 2^i) tokens. ``jaxattn.objectives.sit`` trains them against the model that keeps every token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.maps import dense, init_dense, init_norm, normed
from jaxattn.core.reduce import reduce_merge, valid_rows
from jaxattn.core.types import Array, Spec, contract, expect
from jaxattn.registry import register
from jaxattn.tokens.staged import check_ratios, stage_count, stage_sites


def init_slimming(key, dim: int, rows: int) -> dict:
    """Parameters of a slimming module that leaves ``rows`` tokens of ``dim`` channels: norm, down, up, and scale []."""
    a, b = jax.random.split(key)
    return {"norm": init_norm(dim), "down": init_dense(a, dim, dim // 2, std=0.02),
            "up": init_dense(b, dim // 2, rows, std=0.02), "scale": jnp.ones(())}  # fmt: skip


def slimming_weights(params: dict, x: Array, valid: Array | None = None) -> Array:
    """A [B, N, M] of tokens x [B, N, C]: each column sums to 1 over the valid tokens (bool [B, N]), at least float32."""
    w = dense(params["up"], jax.nn.gelu(dense(params["down"], normed(params["norm"], x)), approximate=False))
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32)) * params["scale"]
    return jax.nn.softmax(w, axis=1, where=None if valid is None else valid[..., None])


def slim(params: dict, x: Array, valid: Array | None = None) -> tuple[Array, Array]:
    """(A^T x [B, M, C] in x's dtype, A [B, N, M])."""
    a = slimming_weights(params, x, valid)
    return jnp.einsum("bnm,bnc->bmc", a, x.astype(a.dtype)).astype(x.dtype), a


@contract
class _Slimming:
    """One slimming; ``before`` and ``ratio``: fractions of the tokens that entered, in front of it and behind."""

    before: float
    ratio: float

    def rows(self, n):
        return max(1, stage_count(n, self.before, self.ratio, "keep"))

    def init(self, key, spec: Spec) -> dict:
        expect("spec.length", spec.length, "the number of tokens that enter: they are not of any number", spec.length > 0)
        return init_slimming(jax.random.fold_in(key, spec.length), spec.dim, self.rows(spec.length))

    def apply(self, params, state, tokens, evidence, ctx):
        b, n, _ = tokens.x.shape
        valid, left = valid_rows(tokens), self.rows(n)
        x, a = slim(params, tokens.x, valid)
        # A mixture stands nowhere: they are numbered evenly, and a token counts to the one that takes most of it.
        index = jnp.broadcast_to(jnp.arange(left) * n // left, (b, left)).astype(jnp.int32)
        some = jnp.broadcast_to(valid.any(-1, keepdims=True), (b, left))
        out = reduce_merge(tokens, x, a.argmax(-1).astype(jnp.int32), index, some)
        meta = out.meta.replace(valid=some)  # whatever row the place was taken from
        return out.replace(meta=meta), state, {"weights": a}


@contract
class _SiT:
    layers: tuple | None = None
    ratios: tuple = (0.5, 0.25, 0.125)

    place = "vision"

    def check(self):
        check_ratios(self.ratios, None if self.layers is None else len(self.layers))
        expect("layers", None, "numbers for ratios of another length than 3", self.layers is not None or len(self.ratios) == 3)

    def sites(self, layers):
        return stage_sites(self.layers, (9, 12, 14), 16, layers)

    def schedule(self, layers):
        before = (1.0, *self.ratios)
        return tuple((s, _Slimming(a, b)) for s, a, b in zip(self.sites(layers), before, self.ratios, strict=False))


@register("tokens")
def sit(layers: tuple[int, ...] | None = None, ratios: tuple[float, ...] = (0.5, 0.25, 0.125)):
    """Slim the tokens of a vision tower at the ends of stages (site "vision").

    Args:
      layers: numbers of layers done when the slimmings happen; None: the published 9, 12 and 14 of 16 (SiT-S), scaled to the
        depth.
      ratios: what each leaves, as fractions of the tokens that entered the tower.
    Its parameters, one module per slimming, are trained arrays of the bound model, made for its number of tokens.
    """
    return _SiT(layers, ratios)


__all__ = ["init_slimming", "sit", "slim", "slimming_weights"]
