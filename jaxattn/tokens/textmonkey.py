"""TextMonkey's token resampler: keep the tokens that no later token repeats, and let them read all others ("TextMonkey: An
OCR-Free Large Multimodal Model for Understanding Document").

With S the cosines between tokens, the redundancy of token i is its likeness to the tokens behind it,

    m_i = max_{j > i} S_ij,   m_N = -1   (the last token always stays)

and the ``keep`` tokens of smallest m stay in their order: of two equal tokens the earlier one leaves. They are the latents
of one perceiver step,

    y = attention(q = LN(L W), k, v = [LN(X W); LN(L W)]),    out = L + s FFN(y),   FFN(y) = W2 gelu(W1 LN(y))

over all tokens X, so that what was dropped can be read back. W2 starts at 0: out = L until training says otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.attend import attend
from jaxattn.core.reduce import check_budget, choose, count_of, dispose, rows_left, valid_rows
from jaxattn.core.select import unit_rows
from jaxattn.core.types import Array, Meta, Spec, contract, expect, operand
from jaxattn.registry import register

TILE = 128  # rows whose cosines to all tokens exist at a time


def textmonkey_redundancy(x: Array, *, valid: Array | None = None, tile: int = TILE) -> Array:
    """m float32 [B, N]: the largest cosine of each row of x [B, N, D] to the rows behind it, -1 where there is none.

    valid: bool [B, N]; other rows are nobody's likeness.  tile: rows compared at a time.
    """
    b, n, d = x.shape
    valid = jnp.ones((b, n), bool) if valid is None else jnp.broadcast_to(valid, (b, n))
    unit = unit_rows(x)
    tile = min(tile, n)
    steps = -(-n // tile)
    rows = jnp.pad(unit, [(0, 0), (0, steps * tile - n), (0, 0)])

    def of_tile(start):
        mine = jax.lax.dynamic_slice_in_dim(rows, start, tile, axis=1)
        alike = jnp.einsum("bid,bjd->bij", mine, unit, precision="highest")
        behind = jnp.arange(n) > start + jnp.arange(tile)[:, None]
        return jnp.where(behind & valid[:, None], alike, -1.0).max(-1)

    found = jax.lax.map(of_tile, jnp.arange(steps) * tile)  # [steps, B, tile]
    return jnp.moveaxis(found, 0, 1).reshape(b, -1)[:, :n]


# ---------------------------------------------------------------------------------------------------- reading them back
def init_perceiver(key, dim: int, width: int) -> dict:
    """Parameters of the perceiver step for tokens of ``dim`` channels: kernels of the projections, none with a bias, two
    norms of ``width`` channels in front of the attention and one in front of the feed-forward, and its scale."""
    shapes = {"down": (dim, width), "q": (width, width), "kv": (width, 2 * width), "out": (width, width), "up": (width, width)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    dense = {name: {"kernel": jax.random.normal(keys[name], s) * s[0] ** -0.5} for name, s in shapes.items()}
    norms = {f"norm_{name}": {"scale": jnp.ones(width), "bias": jnp.zeros(width)} for name in ("tokens", "latents", "mlp")}
    return {**dense, **norms, "last": {"kernel": jnp.zeros((width, dim))}, "gain": jnp.ones(())}


def _norm(p: dict, x: Array) -> Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def read_back(params: dict, x: Array, latents: Array, valid: Array, live: Array, *, heads: int = 8) -> Array:
    """What the latents [B, K, D] read from all tokens x [B, N, D] and themselves: [B, K, D], to be added to them.

    params: of ``init_perceiver``.  valid: bool [B, N] of the tokens.  live: bool [B, K] of the latents.
    """
    b, k, _ = latents.shape
    dense = lambda name, y: y @ params[name]["kernel"].astype(y.dtype)  # noqa: E731
    down, down_latents = _norm(params["norm_tokens"], dense("down", x)), _norm(params["norm_latents"], dense("down", latents))
    keys, values = jnp.split(dense("kv", jnp.concatenate([down, down_latents], 1)), 2, axis=-1)
    q, keys, values = (y.reshape(b, -1, heads, y.shape[-1] // heads) for y in (dense("q", down_latents), keys, values))
    seen = jnp.concatenate([valid, live], 1)
    out = attend(q, keys, values, k_meta=Meta.of(seen.shape[1], valid=seen)).out.reshape(b, k, -1)
    y = _norm(params["norm_mlp"], dense("out", out))
    y = dense("last", jax.nn.gelu(dense("up", y), approximate=False))
    return (params["gain"] * y).astype(latents.dtype)


@contract
class _TextMonkey:
    keep: int = operand("budget")
    width: int | None = None
    heads: int = 8
    mode: str = "keep"
    positions: str = "original"

    place = "project"

    def check(self):
        check_budget(self.keep, self.mode, self.positions)
        ok = self.width is None or (self.width >= self.heads and self.width % self.heads == 0)
        expect("width", self.width, f"None or a multiple of the {self.heads} heads", ok and self.heads >= 1)

    def init(self, key, spec: Spec) -> dict:
        width = -(-spec.dim // (4 * self.heads)) * self.heads if self.width is None else self.width
        return init_perceiver(key, spec.dim, width)

    def rows(self, n):
        return rows_left(self.keep, n, self.mode)

    def apply(self, params, state, tokens, evidence, ctx):
        n, valid = tokens.x.shape[1], valid_rows(tokens)
        scores = -textmonkey_redundancy(jax.lax.stop_gradient(tokens.x), valid=valid)
        out = dispose(tokens, choose(scores, count_of(params, n), valid), self.rows(n), self.mode, self.positions)
        more = read_back(params, tokens.x, out.x, valid, valid_rows(out), heads=self.heads)
        return out.replace(x=out.x + more), state, {"scores": scores}


@register("tokens")
def textmonkey(keep: int, width: int | None = None, heads: int = 8, mode: str = "keep", positions: str = "original"):
    """Keep the ``keep`` image tokens that are least like a later one, and let them read all tokens by one trained
    cross-attention that starts as no change. For the site "project".

    Args:
      keep: tokens that stay (published: 512 of 1024).  width, heads: of the cross-attention; width None: a quarter of the
        model's (published: 1024 of 4096 in 8 heads).
      mode: "keep" (gather) or "mask".  positions: rotary positions "original" or "fresh" (see ``core.reduce``).
    Its parameters (``init_perceiver``) are trained arrays of the bound model.
    """
    return _TextMonkey(keep, width, heads, mode, positions)
