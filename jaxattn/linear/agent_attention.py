"""Agent attention: queries talk to a few agents, agents to the keys; two small softmaxes instead of one large.

"Agent Attention: On the Integration of Softmax and Linear Attention" (arXiv:2312.08874).

    A = pool(Q);   V_A = softmax(A K^T / sqrt(D) + B1) V;   O = softmax(Q A^T / sqrt(D) + B2) V_A + dwconv3x3(V)

with agents A pooled from the query grid, B1 and B2 a resized 7 x 7 table plus a row and a column table, and entries of
their own for the class token. Linear in the number of tokens: a linear attention whose feature maps are softmaxes.

``agent_sd`` is the training-free form for diffusion transformers: tokens and agents are merged tokens, the second
softmax is flatter, and a share of V is added back. Merging commutes with the linear projections, so it acts on q, k, v.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.core.attend import attend, attend_call
from jaxattn.core.conv import depthwise_conv2d
from jaxattn.core.gates import scale_rows
from jaxattn.core.pooling import adaptive_avg_pool_2d, bilinear_resize
from jaxattn.core.select import gather_tokens, rank_of
from jaxattn.core.slots import merge_tokens
from jaxattn.core.types import Array, Call, Ctx, Part, Spec, State, contract, expect
from jaxattn.registry import register

TABLE = 7  # side of the tables that are resized to the grid
ROWS = 512  # rows of a tile in the search for the nearest token


def agent_attend(q, k, v, agents, *, bias1=None, bias2=None, scale=None, scale2=None, k_meta=None) -> Array:
    """softmax(q agents^T scale2 + bias2) softmax(agents k^T scale + bias1) v.

    Args:
      q: [B, N, H, D].  k, v: [B, M, H, D|Dv].  agents: [B, n, H, D].  bias1: [1, H, n, M].  bias2: [1, H, N, n].
      scale, scale2: of the two logits; default D ** -0.5, and scale.  k_meta: Meta of the keys (padding).
    Returns: [B, N, H, Dv].
    """
    scale2 = scale if scale2 is None else scale2
    gathered = attend(agents, k, v, bias=bias1, scale=scale, k_meta=k_meta).out
    return attend(q, agents, gathered, bias=bias2, scale=scale2).out


@register("attention")
def agent_attention(agents=49, *, grid, cls=False, kv_grid=None) -> AgentAttention:
    """Agent attention as a layer's attention, with trained biases and a depthwise convolution.

    Args:
      agents: how many, a square number.  grid: (rows, columns) of the patches.  cls: whether row 0 is a class token.
      kv_grid: (rows, columns) of the keys where they are spatially reduced (PVT): V is resized to ``grid`` for the
        convolution. DeiT: 49 agents on 14 x 14 with cls; Swin and PVT: 9, 16, 49, 49 over the four stages.
    """
    return AgentAttention(agents, tuple(grid), cls, None if kv_grid is None else tuple(kv_grid))


@contract
class AgentAttention:
    agents: int
    grid: tuple[int, int]
    cls: bool = False
    kv_grid: tuple[int, int] | None = None

    def check(self):
        side = round(self.agents**0.5)
        expect("agents", self.agents, "a positive square number", self.agents >= 1 and side * side == self.agents)
        for name, grid in (("grid", self.grid), ("kv_grid", self.kv_grid or self.grid)):
            expect(name, grid, "(rows, columns)", len(grid) == 2 and min(grid) >= 1)

    def init(self, key, spec: Spec) -> dict:
        """an, na [H, n, 7, 7]; ah [H, n, rows], aw [H, n, columns] of the key grid; ha [H, rows, n], wa [H, columns, n]
        of the query grid; with cls ac, ca [H, n]; dwc_kernel [3, 3, H * Dv], dwc_bias [H * Dv]."""
        h, n, width = spec.heads, self.agents, spec.heads * (spec.value_dim or spec.head_dim)
        (rows, columns), (k_rows, k_columns) = self.grid, self.kv_grid or self.grid
        shapes = {"an": (h, n, TABLE, TABLE), "na": (h, n, TABLE, TABLE), "ah": (h, n, k_rows), "aw": (h, n, k_columns),
                  "ha": (h, rows, n), "wa": (h, columns, n)}  # fmt: skip
        shapes |= {"ac": (h, n), "ca": (h, n)} if self.cls else {}
        first, *keys = jax.random.split(key, len(shapes) + 1)
        tables = zip(keys, shapes.items(), strict=True)
        params = {name: 0.02 * jax.random.truncated_normal(i, -2, 2, shape) for i, (name, shape) in tables}
        kernel = jax.random.uniform(first, (3, 3, width), minval=-1 / 3, maxval=1 / 3)
        return params | {"dwc_kernel": kernel, "dwc_bias": jnp.zeros(width)}

    def apply(self, params: dict, state: State, call: Call, ctx: Ctx) -> tuple[Part, State, dict]:
        (b, n, h, _), (rows, columns), kv_grid = call.q.shape, self.grid, self.kv_grid or self.grid
        expect("q", f"{n} rows", f"{self.cls:d} + {rows} * {columns}, cls and grid", n == self.cls + rows * columns)
        m = self.cls + kv_grid[0] * kv_grid[1]
        expect("k", call.k.shape[1:3], f"({m}, {h}): the key grid, every head its own", call.k.shape[1:3] == (m, h))
        expect("mask", call.mask, "None", call.mask is None)
        expect("past", f"{len(call.past)} views", "no cache", not call.past)

        def patches(x, grid):
            return x[:, int(self.cls) :].reshape(b, *grid, -1)

        side = round(self.agents**0.5)
        agents = adaptive_avg_pool_2d(patches(call.q, self.grid), (side, side)).reshape(b, self.agents, h, -1)
        one, two = self.biases(params)
        out = agent_attend(call.q, call.k, call.v, agents, bias1=one, bias2=two, scale=call.scale, k_meta=call.k_meta)
        values = patches(call.v, kv_grid)
        if kv_grid != self.grid:
            values = bilinear_resize(values, self.grid)
        local = depthwise_conv2d(values, params["dwc_kernel"], params["dwc_bias"]).reshape(b, rows * columns, h, -1)
        out = out + jnp.pad(local, [(0, 0), (int(self.cls), 0), (0, 0), (0, 0)]).astype(out.dtype)
        return Part(scale_rows(out, call.out_gate), None), state, {}

    def biases(self, params: dict) -> tuple[Array, Array]:
        """B1 [1, H, n, M] of agents to keys and B2 [1, H, N, n] of queries to agents."""

        def resized(table, grid):  # [H, n, 7, 7] -> [H, n, rows, columns]
            return bilinear_resize(table[..., None], grid)[..., 0]

        to_keys = resized(params["an"], self.kv_grid or self.grid)
        to_keys = to_keys + params["ah"][..., None] + params["aw"][..., None, :]
        to_keys = to_keys.reshape(*to_keys.shape[:2], -1)
        to_agents = jnp.moveaxis(resized(params["na"], self.grid), 1, -1)
        to_agents = to_agents + params["ha"][:, :, None] + params["wa"][:, None]
        to_agents = to_agents.reshape(to_agents.shape[0], -1, self.agents)
        if self.cls:
            to_keys = jnp.concatenate([params["ac"][..., None], to_keys], -1)
            to_agents = jnp.concatenate([params["ca"][:, None], to_agents], 1)
        return to_keys[None], to_agents[None]


# ----------------------------------------------------------------------------------------------- Stable Diffusion


@register("attention")
def agent_sd(grid, *, ratio=0.4, agent_ratio=0.8, k2=0.3, shortcut=0.075, stride=2, random=False) -> AgentSD:
    """AgentSD: training-free agent attention for the self-attention of diffusion models.

    Args:
      grid: (rows, columns) of the resolution it acts on; calls with other numbers of rows are dense.
      ratio: share of the tokens merged away before attention.  agent_ratio: the same for agents; at most all but one
        token of every ``stride`` x ``stride`` cell.  Agents are used only where they are fewer than half of the merged
        tokens (so not with the released defaults, ratio 0.5 and stride 2: attention to merged tokens remains).
      k2: the second logits are scaled by D ** (-0.5 k2).  shortcut: share of V added to the output.
      random: draw the kept token of each cell from ctx.key instead of taking its first.
    The paper uses it for the first part of the denoising steps.
    """
    return AgentSD(tuple(grid), ratio, agent_ratio, k2, shortcut, stride, random)


@contract
class AgentSD:
    grid: tuple[int, int]
    ratio: float = 0.4
    agent_ratio: float = 0.8
    k2: float = 0.3
    shortcut: float = 0.075
    stride: int = 2
    random: bool = False

    def check(self):
        for name in ("ratio", "agent_ratio"):
            expect(name, getattr(self, name), "in [0, 1)", 0 <= getattr(self, name) < 1)
        expect("grid", self.grid, f"at least {self.stride} x {self.stride}", min(self.grid) >= self.stride >= 1)

    def apply(self, params: dict, state: State, call: Call, ctx: Ctx) -> tuple[Part, State, dict]:
        n = call.q.shape[1]
        if n != self.grid[0] * self.grid[1] or call.k.shape[1] != n or call.past:
            return Part(attend_call(call)[0].out, None), state, {}
        expect("mask", call.mask, "None", call.mask is None)
        expect("ctx.hidden", ctx.hidden, "the residual stream, by which tokens are matched", ctx.hidden is not None)
        similarity, nearest, is_kept = match(ctx.hidden, self._kept(ctx))
        loose = n - self._cells()
        gone, for_agents = (min(int(n * r), loose) for r in (self.ratio, self.agent_ratio))
        slot = merge_slots(similarity, nearest, is_kept, gone)
        q, k, v = (merged(x, slot, n - gone) for x in (call.q, call.k, call.v))
        if 2 * (n - for_agents) < n - gone:
            agents = merged(call.q, merge_slots(similarity, nearest, is_kept, for_agents), n - for_agents)
            scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
            out = agent_attend(q, k, v, agents, scale=scale, scale2=scale**self.k2) + self.shortcut * v
        else:
            out = attend(q, k, v, scale=call.scale).out
        return Part(scale_rows(gather_tokens(out.astype(v.dtype), slot), call.out_gate), None), state, {}

    def _cells(self) -> int:
        return (self.grid[0] // self.stride) * (self.grid[1] // self.stride)

    def _kept(self, ctx: Ctx) -> Array:
        """int32 [cells]: the token of every cell that others merge into."""
        s, (rows, columns) = self.stride, self.grid
        top, left = np.mgrid[: rows // s, : columns // s].reshape(2, -1) * s
        if not self.random:
            return jnp.asarray(top * columns + left)
        expect("ctx.key", ctx.key, "a random key: random=True", ctx.key is not None)
        at = jax.random.randint(jax.random.fold_in(ctx.key, ctx.step), top.shape, 0, s * s)
        return (top + at // s) * columns + left + at % s


def match(x, kept) -> tuple[Array, Array, Array]:
    """For every token the most similar (cosine) of the ``kept`` ones [D]: (similarity, its number in kept) [B, N], and
    bool [N], whether the token itself is kept."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
    targets = x[:, kept]
    size = min(ROWS, x.shape[1])
    tiles = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), (0, 0)])
    tiles = jnp.moveaxis(tiles.reshape(x.shape[0], -1, size, x.shape[2]), 1, 0)

    def best_of_tile(rows):
        scores = jnp.einsum("bnc,bdc->bnd", rows, targets)
        return scores.max(-1), jnp.argmax(scores, -1)

    found = (jnp.moveaxis(a, 0, 1).reshape(x.shape[0], -1) for a in lax.map(best_of_tile, tiles))
    similarity, nearest = (a[:, : x.shape[1]] for a in found)
    return similarity, nearest, jnp.zeros(x.shape[1], bool).at[kept].set(True)


def merge_slots(similarity, nearest, is_kept, r: int) -> Array:
    """int32 [B, N]: the row each token goes to when the ``r`` most similar loose tokens join their kept one. Rows are
    the loose tokens by falling similarity, then the kept tokens."""
    loose = is_kept.shape[0] - is_kept.sum()
    rank = rank_of(jnp.where(is_kept, -jnp.inf, similarity))
    own = jnp.cumsum(is_kept) - 1
    return jnp.where(is_kept, loose - r + own, jnp.where(rank < r, loose - r + nearest, rank - r)).astype(jnp.int32)


def merged(x, slot, rows: int) -> Array:
    """x [B, N, H, D] -> [B, rows, H, D], the means of the tokens of each row."""
    flat = merge_tokens(x.reshape(*x.shape[:2], -1), slot, rows)
    return flat.reshape(flat.shape[0], rows, *x.shape[2:])
