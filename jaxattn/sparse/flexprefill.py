"""FlexPrefill: block-sparse prefill whose pattern and budget follow the input, head by head.

"FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference" (arXiv:2502.20766).

The last ``block`` queries are looked at exactly. Where their attention, pooled over key blocks, is close (root of the
Jensen-Shannon divergence below tau) to an estimate from mean-pooled queries and keys, the head is *query-aware*: blocks
are chosen from the pooled map until they cover gamma of it. Otherwise the head is *vertical-slash*: columns and
diagonals that cover gamma of the looked-at rows. Training-free, prefill only; decoding is dense.

Deviations from the released code: 0 log 0 is 0 in the divergence (NaN there, which turns a head vertical-slash). Kept:
budgets are counted in tokens and divided by a fixed 128 (``count_block``), whatever the block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.attend import attend_call
from jaxattn.core.pooling import mean_pool
from jaxattn.core.select import coverage_count, forbid, from_mask, gather_tokens, protect, rank_of, top_p
from jaxattn.core.statistics import profile
from jaxattn.core.types import Array, Call, Ctx, Part, State, contract, expect, operand
from jaxattn.registry import register


def flexprefill_blocks(
    q, k, *, block=128, gamma=0.95, tau=0.1, min_budget=1, max_budget=None, count_block=128, scale=None, valid=None
) -> dict:
    """The blocks that causal attention of N queries to N keys should read.

    Args:
      q: [B, N, H, D].  k: [B, N, G, D], both rotated.
      block: tokens per block of queries and of keys.  gamma: mass to cover; at 1 or above everything.
      tau: heads whose divergence is below it are query-aware; 0 for none.  gamma and tau may be traced.
      min_budget, max_budget: tokens, of columns and of diagonals each; None for no limit.
      count_block: tokens per block in the count of columns and diagonals.  scale: of the logits, default D ** -0.5.
      valid: bool [B|1, N]; padding is False. The last valid rows are looked at; None for no padding.

    Returns: dict of
      where: Selection of key blocks per query block and head;  mask: its table, bool [B, H, Nb, Nb], causal;
      vertical, slash: float32 [B, H, N], mean attention per column and per diagonal (slash[N - 1]: the main one);
      vertical_block, pooled: float32 [B, H, Nb], the two distributions compared;  sqrt_jsd: float32 [B, H].
    """
    b, n, h, d = q.shape
    expect("k", f"{k.shape[1]} keys", f"as many as queries, {n}", k.shape[1] == n)
    expect("block", block, f"between 1 and the {n} tokens", 1 <= block <= n)
    blocks = -(-n // block)
    low = -(-min_budget // block)
    high = blocks if max_budget is None else min(-(-max_budget // block), blocks)
    scale = d**-0.5 if scale is None else scale

    if valid is None:
        last, live = q[:, n - block :], jnp.ones((1, blocks), bool)
        vertical, slash = profile(q, k, block, scale=scale)
    else:
        valid = jnp.broadcast_to(valid, (b, n))
        live = jnp.pad(valid, [(0, 0), (0, blocks * block - n)]).reshape(b, blocks, block).any(-1)
        last, (vertical, slash) = _padded_profile(q, k, block, scale, valid)
    columns = jnp.clip(coverage_count(vertical, gamma, rule="beyond") // count_block + 1, low, high)
    diagonals = jnp.clip(coverage_count(slash, gamma, rule="beyond") // count_block + 1, low, high)

    vertical_block, slash_block = _sum_pool(vertical, block), _sum_pool(slash, block)
    keys = mean_pool(k.astype(vertical.dtype), block, valid=valid)  # [B, Nb, G, D]
    mean_query = last.astype(vertical.dtype).mean(1, keepdims=True)
    dead = ~live[:, None]
    pooled = jax.nn.softmax(forbid(_block_logits_tile(mean_query, keys, scale)[:, :, 0], dead))
    sqrt_jsd = _root_divergence(pooled, vertical_block)
    aware = sqrt_jsd < tau
    columns, diagonals = (jnp.where(aware, low, x) for x in (columns, diagonals))

    i = jnp.arange(blocks)
    distance = i[:, None] - i
    # The first column and the main diagonal are always read.
    kept_columns = rank_of(protect(vertical_block, i == 0)) < columns[..., None]
    kept_diagonals = rank_of(protect(slash_block, i == blocks - 1)) < diagonals[..., None]
    lines = jnp.take(kept_diagonals[..., ::-1], jnp.maximum(distance, 0), axis=-1)
    logits = _block_logits_tile(mean_pool(q.astype(vertical.dtype), block, valid=valid), keys, scale)
    table = jax.nn.softmax(forbid(logits, (distance < 0) | (dead[:, :, None] & (distance > 0))))
    table = jnp.where(dead[..., None], 0.0, table)
    mass = gamma * live.sum(-1)[:, None, None]
    covered = top_p(table.reshape(b, h, -1), mass, rule="within").reshape(table.shape)
    mask = (kept_columns[..., None, :] | lines | (aware[..., None, None] & covered)) & (distance >= 0)
    return {
        "where": from_mask(mask, unit=block, tile=block), "mask": mask, "vertical": vertical, "slash": slash,
        "vertical_block": vertical_block, "pooled": pooled, "sqrt_jsd": sqrt_jsd,
    }  # fmt: skip


@register("attention")
def flexprefill(gamma=0.95, tau=0.1, *, block=128, min_budget=512, max_budget=None, count_block=128) -> FlexPrefill:
    """FlexPrefill as a layer's attention; arguments as in ``flexprefill_blocks``. Dense for decoding, for queries with
    cached keys, and for prompts of at most two blocks or the minimal budget. gamma and tau do not recompile."""
    return FlexPrefill(gamma, tau, block, min_budget, max_budget, count_block)


@contract
class FlexPrefill:
    gamma: float = operand("scalar", 0.95)
    tau: float = operand("scalar", 0.1)
    block: int = 128
    min_budget: int = 512
    max_budget: int | None = None
    count_block: int = 128

    def check(self):
        expect("block", self.block, "at least 1", self.block >= 1)
        expect("min_budget", self.min_budget, "at least 1 token", self.min_budget >= 1)
        low = self.min_budget
        expect("max_budget", self.max_budget, f"None or at least min_budget, {low}", (self.max_budget or low) >= low)

    def dense(self, n: int) -> bool:
        """Whether a prompt of ``n`` tokens is too short to gain from a pattern."""
        return n <= max(2 * self.block, -(-self.min_budget // self.block) * self.block)

    def apply(self, params: dict, state: State, call: Call, ctx: Ctx) -> tuple[Part, State, dict]:
        n = call.q.shape[1]
        if call.past or call.k.shape[1] != n or self.dense(n):
            return attend_call(call)[0], state, {"density": jnp.ones(call.q.shape[:1] + call.q.shape[2:3])}
        found = flexprefill_blocks(
            jax.lax.stop_gradient(call.q), jax.lax.stop_gradient(call.k), block=self.block, gamma=params["gamma"],
            tau=params["tau"], min_budget=self.min_budget, max_budget=self.max_budget, count_block=self.count_block,
            scale=call.scale, valid=None if _full(call.k_meta.valid) else call.k_meta.valid,
        )  # fmt: skip
        return attend_call(call.replace(where=found["where"]))[0], state, {"density": found["mask"].mean((-1, -2))}


def _block_logits_tile(q, k, scale) -> Array:
    """[B, H, n, m] logits of a few (pooled or last) query rows [B, n, H, D] against keys [B, m, G, D]."""
    b, n, h, d = q.shape
    g = k.shape[2]
    s = jnp.einsum("bngrd,bmgd->bgrnm", q.reshape(b, n, g, h // g, d), k, preferred_element_type=jnp.float32)
    return s.reshape(b, h, n, -1) * scale


def _full(valid) -> bool:
    """Whether it is known without running that no row is padding."""
    return isinstance(valid, np.ndarray) and bool(valid.all())


def _padded_profile(q, k, block, scale, valid):
    """The last rows that are not padding and their profile. Rows move until they end the sequence; one more channel
    takes padding out of the softmax."""
    n = q.shape[1]
    shift = jnp.argmax(valid[:, ::-1], axis=1)[:, None]
    moved = (jnp.arange(n) - shift) % n
    q, k, valid = (gather_tokens(x, moved) for x in (q, k, valid))
    low = jnp.finfo(jnp.float32).min * 1e-6
    off = jnp.broadcast_to(jnp.where(valid, 0.0, low)[..., None, None], (*k.shape[:3], 1)).astype(k.dtype)
    on = jnp.ones((*q.shape[:3], 1), q.dtype)
    vertical, slash = profile(jnp.concatenate([q, on], -1), jnp.concatenate([k, off], -1), block, scale=scale)
    back = (jnp.arange(n) + shift) % n
    vertical = jnp.take_along_axis(vertical, jnp.broadcast_to(back[:, None], vertical.shape), -1)
    return q[:, n - block :], (vertical, slash)


def _sum_pool(x, block) -> Array:
    x = jnp.pad(x, [(0, 0)] * 2 + [(0, -x.shape[-1] % block)])
    return x.reshape(*x.shape[:2], -1, block).sum(-1)


def _root_divergence(p, q) -> Array:
    m = (p + q) / 2
    terms = jax.scipy.special.rel_entr(p, m) + jax.scipy.special.rel_entr(q, m)
    return jnp.sqrt(jnp.maximum(0.5 * terms.sum(-1), 0.0))
