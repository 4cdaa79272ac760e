"""Dynamic mask attention: keys gain a learned importance from their values; each row keeps the most important ones.

"Trainable Dynamic Mask Sparse Attention" (arXiv:2508.02124), the attention of Doge models. Per kv head g

    dt = concat_g(v) W_dt;   delta = exp(A_g softplus(dt_g))  ("paper")  or  A_g softplus(dt_g)  ("log")
    out_i = softmax_j(q_i . k_j / sqrt(D) + delta_j) v_j   over the ``width`` visible keys with the largest delta

Importance is added to the logits, so A and W_dt learn; the choice itself has no gradient. delta depends on v alone and
is cached with it. Ties go to the earliest key.

The N x N table of the released code is a threshold per row here: its ``width``-th largest visible delta, found by
reading keys in order of importance until every row of a tile has seen ``width`` of them. Exact for any mask, with
padding and over caches; positions above 2^24 lose the rule for ties. Key tiles without an active entry are skipped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.core.attend import attend_call
from jaxattn.core.mask import block_map, field_of
from jaxattn.core.select import from_mask
from jaxattn.core.types import Array, Call, Ctx, Meta, Part, Selection, Spec, State, contract, expect, operand
from jaxattn.registry import register

ROWS, KEYS = 64, 1024  # rows of a tile and keys per step of the search for thresholds
TILE = 128  # queries and keys per tile of the attention when tiles are skipped


@register("attention")
def dynamic_mask_attention(width=2048, *, form="paper", mode="topk", block_smooth=None) -> DynamicMaskAttention:
    """Dynamic mask attention as a layer's attention, with trained A [G] (zeros) and dt [G * Dv, G].

    Args:
      width: keys each row keeps (the authors' keep_window_size); does not recompile.
      form: "paper" (delta > 0) | "log" (the released kernels' form).
      mode: "topk" | "relu": every key with delta > 0, whatever their number.
      block_smooth: keys per block, or None. Afterwards a row keeps a block whole if more than half of its keys were
        kept, and drops it otherwise (blocks of positions; a row may lose all its keys and is then 0). Serves training,
        prefill and decoding row by row.
    """
    return DynamicMaskAttention(width, form, mode, block_smooth)


def importance(v, a, dt, form="paper") -> Array:
    """delta [B, M, G] of values v [B, M, G, Dv]; a [G], dt [G * Dv, G]. float32 or wider."""
    wide = jnp.promote_types(v.dtype, jnp.float32)
    scores = a * jax.nn.softplus(v.reshape(*v.shape[:2], -1).astype(wide) @ dt.astype(wide))
    return jnp.exp(scores) if form == "paper" else scores


@contract
class _Keep:
    """logits + delta for keys at or above the row's threshold (delta, pos), -inf for the others."""

    def fields(self):
        return frozenset({"pos"})

    def __call__(self, logits, q, k, row, key):
        delta = key["delta"]
        keep = (delta > row["delta_min"]) | ((delta == row["delta_min"]) & (k["pos"] <= row["last_pos"]))
        return jnp.where(keep, logits + delta, -jnp.inf)


@contract
class DynamicMaskAttention:
    width: int = operand("int", 2048)
    form: str = "paper"
    mode: str = "topk"
    block_smooth: int | None = None

    def check(self):
        expect("width", self.width, "at least 1", not isinstance(self.width, int) or self.width >= 1)
        expect("form", self.form, "'paper' or 'log'", self.form in ("paper", "log"))
        expect("mode", self.mode, "'topk' or 'relu'", self.mode in ("topk", "relu"))
        smooth = self.block_smooth
        expect("block_smooth", smooth, "None or at least 2", smooth is None or smooth > 1)

    def init(self, key, spec: Spec) -> dict:
        rows = spec.kv_heads * (spec.value_dim or spec.head_dim)
        return {"A": jnp.zeros(spec.kv_heads), "dt": jax.random.normal(key, (rows, spec.kv_heads)) * rows**-0.5}

    def side(self, params: dict, x, k, v) -> dict:
        return {"delta": importance(v, params["A"], params["dt"], self.form)}

    def apply(self, params: dict, state: State, call: Call, ctx: Ctx) -> tuple[Part, State, dict]:
        expect("score_mod", call.score_mod, "None: importance is the layer's own", call.score_mod is None)
        if "delta" not in call.key:
            call = call.replace(key={**call.key, **self.side(params, None, call.k, call.v)})
        for view in call.past:
            expect("past", sorted(view.key), "cached side rows named 'delta'", "delta" in view.key)
        delta, fields, valid = joined_keys(lax.stop_gradient(call))
        delta_min, last_pos = self.thresholds(params, call, delta, fields, valid)
        n, h, g = call.q.shape[1], call.q.shape[2], call.k.shape[2]
        row = {"delta_min": delta_min, "last_pos": last_pos.astype(delta.dtype)}
        row = {name: jnp.repeat(x, h // g, axis=2) for name, x in row.items()}
        call = call.replace(score_mod=_Keep(), row={**call.row, **row})
        if self.block_smooth is not None:
            call = self._smoothed(call, delta, fields, valid, delta_min, last_pos)
        elif call.where is None and n > TILE:
            call = call.replace(where=active_tiles(call, delta_min))
        return attend_call(call)[0], state, {}

    def thresholds(self, params, call, delta, fields, valid) -> tuple[Array, Array]:
        """(delta_min, last_pos) [B, N, G]: row i keeps visible keys above delta_min, and those equal up to last_pos."""
        if self.mode == "relu":
            shape = (call.q.shape[0], call.q.shape[1], call.k.shape[2])
            return jnp.zeros(shape, delta.dtype), jnp.full(shape, -1, jnp.int32)
        return row_thresholds(call.mask, call.q_meta, delta, fields, valid, params["width"])

    def _smoothed(self, call, delta, fields, valid, delta_min, last_pos) -> Call:
        """The call with whole blocks kept or dropped instead of keys."""
        n, block = call.q.shape[1], self.block_smooth
        expect("block_smooth", f"{n} rows after a cache", "no cache, or one row", n == 1 or not call.past)
        expect("where", "a Selection", "None with block_smooth", call.where is None)
        everything = {x: jnp.full_like(call.row[x], v) for x, v in (("delta_min", -jnp.inf), ("last_pos", 2.0**24))}
        if not call.past:
            at = jnp.broadcast_to(jnp.arange(delta.shape[-1]) // block, delta.shape)
            kept = smoothed_blocks(call.mask, call.q_meta, delta, fields, valid, delta_min, last_pos, at, block)
            return call.replace(row=call.row | everything, where=from_mask(kept, unit=block, tile=1))
        # One row: its blocks are facts about keys. Cached rows lie in any order, so positions say which block.
        first = jnp.where(valid, fields["pos"], jnp.iinfo(jnp.int32).max).min(-1, keepdims=True) // block
        at = fields["pos"] // block - first
        kept = smoothed_blocks(call.mask, call.q_meta, delta, fields, valid, delta_min, last_pos, at, block)[:, :, 0]

        def drop(meta, key):
            pos = jnp.asarray(meta.pos)
            at = jnp.clip((pos[:, None] if pos.ndim == 2 else pos) // block - first, 0, kept.shape[-1] - 1)
            here = jnp.take_along_axis(kept, jnp.broadcast_to(at, (*kept.shape[:2], at.shape[-1])), -1)
            bias = jnp.moveaxis(jnp.where(here, 0.0, -jnp.inf), 1, 2)
            return {**key, "bias": key["bias"] + bias if "bias" in key else bias}

        expect("past", "views of some kv heads", "of all with block_smooth", all(v.heads is None for v in call.past))
        return call.replace(row=call.row | everything).map_keys(drop)


# --------------------------------------------------------------------------------------------------------- thresholds


def joined_keys(call: Call) -> tuple[Array, dict, Array]:
    """(delta [B, G, M], {field: int32 [B, G, M]}, valid [B, G, M]) of the cached and own keys of a call."""
    b, g = call.q.shape[0], call.k.shape[2]
    names = (call.mask.fields() if call.mask is not None else frozenset()) | {"pos"}
    sets = [(v.key["delta"], v.meta, v.heads) for v in call.past] + [(call.key["delta"], call.k_meta, None)]

    def spread(x, heads, blank):  # [B|1, M] or [B|1, G', M] -> [B, G, M]
        x = jnp.asarray(x)
        x = x[:, None] if x.ndim == 2 else x
        if heads is None:
            return jnp.broadcast_to(x, (b, g, x.shape[-1]))
        x = jnp.broadcast_to(x, (b, heads.shape[0], x.shape[-1]))
        return jnp.full((b, g, x.shape[-1]), blank, x.dtype).at[:, heads].set(x)

    delta = jnp.concatenate([spread(jnp.moveaxis(d, 2, 1), heads, 0) for d, _, heads in sets], -1)
    fields = {n: jnp.concatenate([spread(field_of(m, n), heads, 0) for _, m, heads in sets], -1) for n in names}
    return delta, fields, jnp.concatenate([spread(m.valid, heads, False) for _, m, heads in sets], -1)


def row_thresholds(mask, q_meta: Meta, delta, fields: dict, valid, width) -> tuple[Array, Array]:
    """Per row and kv head the ``width``-th of the visible keys ordered by falling delta, then rising position.

    Args: mask, q_meta: what each row sees.  delta, fields, valid: of ``joined_keys``.  width: int, may be traced.
    Returns: (delta_min [B, N, G], last_pos int32 [B, N, G]); (-inf, largest) for rows that see fewer keys.
    """
    order = jnp.lexsort((fields["pos"], -delta, ~valid))
    pad = -delta.shape[-1] % KEYS if delta.shape[-1] > KEYS else 0
    size = min(delta.shape[-1], KEYS)

    def arrange(x):  # [B, G, M] -> [steps, B, G, size]
        x = jnp.pad(jnp.take_along_axis(x, order, -1), [(0, 0), (0, 0), (0, pad)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size), 2, 0)

    keys = {n: arrange(x) for n, x in fields.items()}
    delta, valid = arrange(delta), arrange(valid)
    steps, (b, g) = delta.shape[0], delta.shape[1:3]

    def search(q_tile):
        def more(carry):
            step, count, *_ = carry
            return (step < steps) & jnp.any(count < width)

        def read(carry):
            step, count, delta_min, last_pos = carry
            at = lambda x: lax.dynamic_index_in_dim(x, step, 0, keepdims=False)[..., None, :]  # noqa: E731
            k_tile = {n: at(x) for n, x in keys.items()}
            seen = jnp.broadcast_to(at(valid) & _visible(mask, q_tile, k_tile), (*count.shape, size))
            total = count[..., None] + jnp.cumsum(seen, -1, dtype=jnp.int32)
            found = seen & (total == width)
            hit = found.any(-1)
            delta_min = jnp.where(hit, jnp.where(found, at(delta), -jnp.inf).max(-1), delta_min)
            last_pos = jnp.where(hit, jnp.where(found, k_tile["pos"], -1).max(-1), last_pos)
            return step + 1, total[..., -1], delta_min, last_pos

        shape = (b, g, next(iter(q_tile.values())).shape[2])
        few = steps * size <= width  # nobody sees enough keys: nothing to search
        start = (jnp.where(few, steps, 0), jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf, delta.dtype),
                 jnp.full(shape, jnp.iinfo(jnp.int32).max, jnp.int32))  # fmt: skip
        return lax.while_loop(more, read, start)[2:]

    return _over_rows(search, q_meta, fields)


def smoothed_blocks(mask, q_meta: Meta, delta, fields, valid, delta_min, last_pos, at, block) -> Array:
    """bool [B, G, N, blocks]: the blocks of which a row keeps more than half; ``at`` [B, G, M] is each key's block."""
    blocks = -(-delta.shape[-1] // block) + 1
    per_block = jax.vmap(jax.vmap(lambda i, x: jnp.zeros(blocks, jnp.int32).at[i].add(x, mode="drop")))
    length = per_block(at, valid.astype(jnp.int32))[..., None, :]
    delta, valid, keys = delta[..., None, :], valid[..., None, :], {n: x[..., None, :] for n, x in fields.items()}

    def count(q_tile):
        least, last = q_tile["delta_min"], q_tile["last_pos"]
        keep = (delta > least) | ((delta == least) & (keys["pos"] <= last))
        keep = keep & valid & _visible(mask, q_tile, keys)
        kept = jax.vmap(per_block, in_axes=(None, 2), out_axes=2)(at, keep.astype(jnp.int32))
        return (2 * kept > length,)

    rows = {"delta_min": jnp.moveaxis(delta_min, 1, 2), "last_pos": jnp.moveaxis(last_pos, 1, 2)}
    return jnp.moveaxis(_over_rows(count, q_meta, fields, rows)[0], 1, 2)


def active_tiles(call: Call, delta_min) -> Selection:
    """Own key tiles that may hold a key some row of a query tile keeps."""
    delta = lax.stop_gradient(call.key["delta"])
    valid = jnp.asarray(call.k_meta.valid)
    valid = valid[..., None] if valid.ndim == 2 else jnp.moveaxis(valid, 1, 2)
    best = _tiles(jnp.where(valid, delta, -jnp.inf), -jnp.inf).max(2)  # [B, tiles, G]
    least = _tiles(delta_min, jnp.inf).min(2)
    may, _ = block_map(call.mask, call.q_meta, call.k_meta, TILE, TILE)
    active = jnp.moveaxis(best, 1, 2)[..., None, :] >= jnp.moveaxis(least, 1, 2)[..., :, None]
    return from_mask(active & may, unit=TILE, tile=TILE)


def _tiles(x, fill):
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILE), (0, 0)], constant_values=fill)
    return x.reshape(x.shape[0], -1, TILE, x.shape[2])


def _visible(mask, q_tile: dict, k_tile: dict):
    return True if mask is None else mask.test(q_tile, k_tile)


def _over_rows(f, q_meta: Meta, fields: dict, extra=None):
    """f(fields of a tile of rows, each [B|1, G|1, t, 1]) over all rows; results [B, G, t, ...] as [B, N, G, ...]."""
    n = q_meta.n
    rows = {x: jnp.asarray(field_of(q_meta, x)) for x in fields}
    rows = {x: a[:, None] if a.ndim == 2 else a for x, a in rows.items()} | (extra or {})
    size = min(n, ROWS)
    rows = {x: jnp.pad(a, [(0, 0), (0, 0), (0, -n % size)], mode="edge") for x, a in rows.items()}
    rows = {x: jnp.moveaxis(a.reshape(*a.shape[:2], -1, size), 2, 0)[..., None] for x, a in rows.items()}
    out = lax.map(f, rows)  # [tiles, B, G, t, ...]

    def join(x):
        x = jnp.moveaxis(x, 0, 2)
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :n], 1, 2)

    return tuple(join(x) for x in out)
