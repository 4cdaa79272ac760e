"""Landmark attention: one token per block stands for it; a query reads a block as much as it attends its landmark.

"Landmark Attention: Random-Access Infinite Context Length for Transformers" (arXiv:2305.16300).

Every ``every`` tokens a landmark closes a block. One softmax runs over the tokens of the query's own block and the
landmarks of all earlier blocks; inside each of those another runs over its tokens, and their weights multiply:

    w_ij = exp(s_ij + s_i,landmark(b) - lse_b(i)) / Z_i   (j in an earlier block b),   exp(s_ij) / Z_i   (own block)

so landmarks carry no value and the own landmark is never read. After training, a query needs the tokens of the few
blocks whose landmarks it attends most: ``retrieve`` reads the best blocks of a cache per token and head, at positions
that stay within the trained range ("stingy"): older blocks share one slot, the last ``retrieve`` ones follow it.

Rows are computed in tiles against all blocks and recomputed in the gradient: memory is linear in length. Blocks are
runs of positions (``Meta.pos``), so padding and caches in any order need no care. Cached keys carry their rotary
embedding; rotations compose, so moving a retrieved key to its slot is what the authors' caching before it does.

Deviation: with exactly ``retrieve`` cached blocks the released code puts the last one where the local tokens begin;
here blocks keep their own places until there are more than ``retrieve`` + 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.core.gates import scale_rows
from jaxattn.core.mask import field_of
from jaxattn.core.select import forbid, keep_top
from jaxattn.core.types import Array, Call, Ctx, Part, State, contract, data, expect
from jaxattn.registry import register

ROWS, RETRIEVING_ROWS = 64, 8  # queries per tile: against shared blocks, and where each gathers its own
SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")


# --------------------------------------------------------------------------------------------------------------- data


def insert_landmarks(tokens, every: int, landmark_id: int):
    """tokens [..., N] -> [..., N + N // every]: ``landmark_id`` after every ``every`` tokens. numpy in, numpy out."""
    xp = np if isinstance(tokens, np.ndarray) else jnp
    expect("every", every, "at least 1", every >= 1)
    *batch, n = tokens.shape
    whole = n // every * every
    blocks = tokens[..., :whole].reshape(*batch, -1, every)
    blocks = xp.concatenate([blocks, xp.full((*blocks.shape[:-1], 1), landmark_id, tokens.dtype)], -1)
    return xp.concatenate([blocks.reshape(*batch, -1), tokens[..., whole:]], -1)


def landmark_loss_mask(n: int, every: int, *, include_landmark: bool = False) -> np.ndarray:
    """bool [n]: rows whose next token counts in the loss. A landmark is inserted by position, so predicting it is not
    asked unless ``include_landmark``."""
    return np.ones(n, bool) if include_landmark else (np.arange(n) + 1) % (every + 1) != every


def jumping_positions(key, batch: int, n: int, every: int, jump: int) -> Array:
    """int32 [batch, n]: rotary positions that skip a random number in [0, jump) after each landmark (an augmentation
    towards lengths not trained on; ``Meta.rope``)."""
    skips = jax.random.randint(key, (batch, n), 0, jump) * (jnp.arange(n) % (every + 1) == every)
    return jnp.arange(n, dtype=jnp.int32) + jnp.pad(jnp.cumsum(skips, 1)[:, :-1], [(0, 0), (1, 0)]).astype(jnp.int32)


# ------------------------------------------------------------------------------------------------------------- records


@register("attention")
def landmark_attention(
    every=63, *, retrieve=None, selection="per_token_and_head", positions="stingy", group_dropout=0.0
) -> LandmarkAttention:
    """Landmark attention as a layer's attention; positions ``every``, 2 * ``every`` + 1, ... hold landmarks.

    Args:
      every: tokens between landmarks (m); a block is m + 1 positions.
      retrieve: None reads all cached blocks; k reads the k best complete blocks of the cache, beside the rows of the
        incomplete one and the new rows. It moves keys by Call.rope (None: nothing to move).
      selection: blocks chosen for each "per_token_and_head", or shared: "max_over_heads", "max_over_tokens" (of the
        new rows), by the largest landmark probability.
      positions: of retrieved blocks: "stingy" | "true".
      group_dropout: probability of dropping an earlier block's weight in training (needs ctx.key).
    """
    return LandmarkAttention(every, retrieve, selection, positions, group_dropout)


@data
class Blocks:
    """Keys laid out by position: k, v [B, G, C blocks, m + 1, D]; fields {name: int32}, seen bool [B, G, C, m + 1]."""

    k: Array
    v: Array
    fields: dict
    seen: Array


@contract
class LandmarkAttention:
    every: int = 63
    retrieve: int | None = None
    selection: str = "per_token_and_head"
    positions: str = "stingy"
    group_dropout: float = 0.0

    def check(self):
        expect("every", self.every, "at least 1", self.every >= 1)
        expect("retrieve", self.retrieve, "None or at least 1", self.retrieve is None or self.retrieve >= 1)
        expect("selection", self.selection, f"one of {SELECTIONS}", self.selection in SELECTIONS)
        expect("positions", self.positions, "'stingy' or 'true'", self.positions in ("stingy", "true"))
        expect("group_dropout", self.group_dropout, "in [0, 1)", 0 <= self.group_dropout < 1)

    def apply(self, params: dict, state: State, call: Call, ctx: Ctx) -> tuple[Part, State, dict]:
        extras = ("bias", "where", "sink_logit", "score_mod", "gain")
        for name in extras:
            expect(name, "a value", "None: weights are products of two softmaxes", getattr(call, name) is None)
        expect("past", f"{len(call.past)} views", "none or one", len(call.past) < 2)
        whole = all(w.heads is None and w.where is None and w.own is None for w in call.past)
        expect("past", "a view of some heads or keys", "a view of all", whole)
        if call.past and self.retrieve is not None:
            out = self._retrieving(call)
        else:
            blocks = lay_out(*joined(call), self.every + 1)
            key = ctx.key if self.group_dropout and ctx.phase == "train" else None
            key = None if key is None else jax.random.fold_in(jax.random.fold_in(key, ctx.layer), 19)

            def tile(q, fields, number):
                dropped = None if key is None else (jax.random.fold_in(key, number), self.group_dropout)
                return grouped_softmax([score_tile(q, fields, blocks, call)], fields["pos"], self.every + 1, dropped)

            out = over_rows(tile, ROWS, call)
        return Part(scale_rows(out.astype(call.v.dtype), call.out_gate), None), state, {}

    # ------------------------------------------------------------------------------------------------------- retrieval

    def _retrieving(self, call: Call) -> Array:
        size, (view,) = self.every + 1, call.past
        b, g, r = call.q.shape[0], call.k.shape[2], call.q.shape[2] // call.k.shape[2]
        k, v, fields, valid = joined(call.replace(k=view.k, v=view.v, k_meta=view.meta, past=()))
        rope, last_row = rotary_positions(view.meta, b, g), k.shape[2] - 1
        row, first = places(fields["pos"], valid, size)
        row = row.reshape(b, g, -1, size)  # rows of the view by block, beyond the last one where there is none
        done = (jnp.where(valid, fields["pos"], -1).max(-1, keepdims=True) + 1) // size  # complete blocks, [B, G, 1]
        there = (row[..., -1] <= last_row) & (first + jnp.arange(row.shape[2]) < done)
        count = there.sum(-1, keepdims=True)
        slot = jnp.maximum(jnp.cumsum(there, -1) - 1 - jnp.maximum(count - self.retrieve - 1, 0), 0)
        behind = jnp.minimum(count, self.retrieve + 1) * size - done * size  # rows after the blocks follow the slots
        q = self._moved(call, call.q, rotary_positions(call.q_meta, b, g), spread(call.q_meta.pos, b, g) + behind)

        # The incomplete block of the cache and the new rows.
        tail = jnp.minimum((done - first) * size + jnp.arange(size - 1), row[0, 0].size - 1)
        tail = jnp.take_along_axis(row.reshape(b, g, -1), tail, -1)
        own_k, own_v, own_fields, own_valid = joined(call.replace(past=()))

        def with_tail(cached, own):
            return jnp.concatenate([take_rows(cached, jnp.minimum(tail, last_row)), own], 2)

        now = {name: with_tail(x, own_fields[name]) for name, x in fields.items()}
        live = jnp.concatenate([(tail <= last_row) & (now["pos"][..., : size - 1] >= done * size), own_valid], -1)
        turned = with_tail(rope, rotary_positions(call.k_meta, b, g))
        k_now = self._moved(call, swap(with_tail(k, own_k)), turned, now["pos"] + behind)
        local = lay_out(swap(k_now), with_tail(v, own_v), now, live, size)

        # Landmarks at their slots; every query picks its blocks.
        marks = jnp.minimum(row[..., -1], last_row)
        k_marks = self._moved(call, swap(take_rows(k, marks)), take_rows(rope, marks), slot * size + self.every)
        facts = {name: take_rows(x, marks) for name, x in fields.items()}
        chosen, kept = self._choose(call.replace(q=q), swap(k_marks), facts, there)
        near = (count > self.retrieve) & (slot > 0)

        def tile(q, fields_q, number):
            index, kept = fields_q.pop("chosen"), fields_q.pop("kept").astype(bool)  # [B, G, R, t, K]
            rows = take_rows(row, index)  # [B, G, R, t, K, m + 1]
            flat = jnp.minimum(rows, last_row).reshape(b, g, -1)
            at = (jnp.arange(index.shape[-1]) + take_rows(near, index))[..., None] * size + jnp.arange(size)
            keys = self._moved(call, swap(take_rows(k, flat)), take_rows(rope, flat), at.reshape(flat.shape))
            found = Blocks(
                swap(keys).reshape(*rows.shape, -1), take_rows(v, flat).reshape(*rows.shape, -1),
                {name: take_rows(x, flat).reshape(rows.shape) for name, x in fields.items()},
                (rows <= last_row) & kept[..., None],
            )  # fmt: skip
            sources = [score_tile(q, fields_q, found, call, shared=False), score_tile(q, fields_q, local, call)]
            return grouped_softmax(sources, fields_q["pos"], size)

        shape = (*chosen.shape[:2], r, *chosen.shape[3:])
        extra = {"chosen": jnp.broadcast_to(chosen, shape), "kept": jnp.broadcast_to(kept.astype(jnp.int32), shape)}
        return over_rows(tile, RETRIEVING_ROWS, call.replace(q=q), extra)

    def _moved(self, call: Call, x, old, new) -> Array:
        """x [B, n, heads, D], rotated at old [B, G, n], as if at new [B, G, n]."""
        if call.rope is None or self.positions == "true":
            return x
        return call.rope.shift(x, new - old, per_head=True)

    def _choose(self, call: Call, k_marks, facts: dict, there) -> tuple[Array, Array]:
        """(block numbers ascending, in use) [B, G, R|1, N, k] of the best landmarks k_marks [B, G, C, D]."""
        b, g = there.shape[:2]
        marks = Blocks(k_marks[..., None, :], k_marks, {n: x[..., None] for n, x in facts.items()}, there[..., None])
        fields = {n: spread(field_of(call.q_meta, n), b, g)[:, :, None] for n in facts}
        s, seen, _, _ = score_tile(lax.stop_gradient(grouped(call.q, g)), fields, lax.stop_gradient(marks), call)
        s, seen = s[..., 0], seen[..., 0]  # [B, G, R, N, C]
        p = jax.nn.softmax(jnp.where(seen, s, jnp.finfo(s.dtype).min))
        p = jnp.where(seen, p, -1.0)
        if self.selection == "max_over_heads":
            p = jnp.broadcast_to(p.max((1, 2), keepdims=True), (b, g, 1, *p.shape[3:]))
        elif self.selection == "max_over_tokens":
            p = jnp.broadcast_to(p.max(3, keepdims=True), p.shape)
        return keep_top(forbid(p, p < 0), min(self.retrieve, p.shape[-1]))


# -------------------------------------------------------------------------------------------------------- mathematics


def landmark_reference(q, k, v, every: int, *, scale=None) -> Array:
    """Causal landmark attention by the paper's groups, over the full table. q [B, N, H, D], k, v [B, N, H, D|Dv]."""
    n = q.shape[1]
    s = jnp.einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    i, j = jnp.arange(n)[:, None], jnp.arange(n)
    block, mark = j // (every + 1), j % (every + 1) == every
    own = i // (every + 1) == block
    outer = (j <= i) & (own ^ mark)  # tokens of the own block, landmarks of earlier ones
    first = jnp.where(outer, jnp.exp(s - jnp.where(outer, s, -jnp.inf).max(-1, keepdims=True)), 0.0)
    first = first / first.sum(-1, keepdims=True)
    weights = jnp.where(own, first, 0.0)
    for b in range(n // (every + 1)):
        inside = (block == b) & ~mark
        inner = jnp.where(inside, jnp.exp(s - jnp.where(inside, s, -jnp.inf).max(-1, keepdims=True)), 0.0)
        by_mark = jnp.where(own, 0.0, first)[..., b * (every + 1) + every, None]
        weights = weights + inner / inner.sum(-1, keepdims=True) * by_mark
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def grouped_softmax(sources, q_pos, size: int, dropped=None) -> Array:
    """The two-level softmax over blocks from several sources.

    Args:
      sources: tuples (logits, seen [B, G, R, t, C, size], values, number [..., C] of each block); the last entry of a
        block is its landmark.  values [B, G, C, size, Dv], or [B, G, R, t, C, size, Dv] where rows have their own.
      q_pos: [B, G|1, 1, t].  dropped: (key, probability) of earlier blocks' weights, or None.
    Returns: [B, G, R, t, Dv].
    """
    own = (q_pos // size)[..., None]
    logits, oks, earlier = [], [], []
    for s, seen, _, number in sources:
        tokens, mark = seen[..., :-1], seen[..., -1]
        before = number < own
        lse, some = _log_sum(s[..., :-1], tokens)
        shift = jnp.where(before & some & mark, s[..., -1] - lse, 0.0)
        ok = tokens & ((before & mark) | (number == own))[..., None]
        logits.append((s[..., :-1] + shift[..., None]).reshape(*s.shape[:-2], -1))
        oks.append(ok.reshape(*s.shape[:-2], -1))
        earlier.append(jnp.broadcast_to(before[..., None], ok.shape).reshape(oks[-1].shape))
    x, ok = jnp.concatenate(logits, -1), jnp.concatenate(oks, -1)
    total, some = _log_sum(x, ok)
    p = jnp.where(ok, jnp.exp(jnp.where(ok, x - total[..., None], 0.0)), 0.0)
    if dropped is not None:
        (key, rate), blocks = dropped, x.shape[-1] // (size - 1)
        keep = jax.random.bernoulli(key, 1 - rate, (*x.shape[:-1], blocks)) / (1 - rate)
        p = p * jnp.where(jnp.concatenate(earlier, -1), jnp.repeat(keep, size - 1, -1), 1.0)
    out, at = 0.0, 0
    for s, _, values, _ in sources:
        width = s.shape[-2] * (size - 1)
        part = p[..., at : at + width].reshape(*s.shape[:-1], size - 1).astype(values.dtype)
        at += width
        spec = "bgrtcl,bgclv->bgrtv" if values.ndim == 5 else "bgrtcl,bgrtclv->bgrtv"
        out = out + jnp.einsum(spec, part, values[..., :-1, :], preferred_element_type=p.dtype)
    return out


def score_tile(q, fields, blocks: Blocks, call: Call, shared=True):
    """A source of ``grouped_softmax``: logits of q [B, G, R, t, D], fields [B, G, 1, t], against blocks that all rows
    share, or whose arrays have the axes R and t too."""
    spec = "bgrtd,bgcld->bgrtcl" if shared else "bgrtd,bgrtcld->bgrtcl"
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    s = jnp.einsum(spec, q, blocks.k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32)) * scale
    facts, there = {n: x[:, :, None, None] if shared else x for n, x in blocks.fields.items()}, blocks.seen
    there = there[:, :, None, None] if shared else there
    fields = {n: x[..., None, None] for n, x in fields.items()}
    ok = there & (facts["pos"] <= fields["pos"])
    ok = ok if call.mask is None else ok & call.mask.test(fields, facts)
    number = jnp.where(there, facts["pos"], -1).max(-1) // s.shape[-1]
    return s, jnp.broadcast_to(ok, s.shape), blocks.v, number


def _log_sum(x, seen):
    """(log of the sum of exp over the seen entries of the last axis, whether there are any); 0 where there are none."""
    top = lax.stop_gradient(jnp.where(seen, x, -jnp.inf).max(-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    mass = jnp.where(seen, jnp.exp(jnp.where(seen, x - top, 0.0)), 0.0).sum(-1)
    return top[..., 0] + jnp.log(jnp.where(mass > 0, mass, 1.0)), mass > 0


# ------------------------------------------------------------------------------------------------------------ layout


def joined(call: Call):
    """Cached and own keys: k, v [B, G, M, D|Dv], the fields {name: int32 [B, G, M]} of the mask, valid [B, G, M]."""
    b, g = call.q.shape[0], call.k.shape[2]
    sets = [(w.k, w.v, w.meta) for w in call.past] + [(call.k, call.v, call.k_meta)]
    names = {"pos"} | (call.mask.fields() if call.mask is not None else frozenset())
    k, v = (swap(jnp.concatenate([x[i] for x in sets], 1)) for i in (0, 1))
    fields = {n: jnp.concatenate([spread(field_of(meta, n), b, g) for _, _, meta in sets], -1) for n in names}
    return k, v, fields, jnp.concatenate([spread(meta.valid, b, g) for _, _, meta in sets], -1)


def places(pos, valid, size: int) -> tuple[Array, Array]:
    """Where keys lie: (row [B, G, C * size] of the key at each position, M where there is none; first block
    [B, G, 1]) for pos, valid [B, G, M] and enough blocks C for any M consecutive positions (the latest are kept)."""
    m = pos.shape[-1]
    blocks = -(-m // size) + 1
    first = jnp.maximum(jnp.where(valid, pos, 0).max(-1, keepdims=True) // size - (blocks - 1), 0)
    at = pos - first * size
    at = jnp.where(valid & (at >= 0), at, blocks * size)
    empty = jnp.full(blocks * size, m, jnp.int32)
    put = jax.vmap(jax.vmap(lambda i: empty.at[i].set(jnp.arange(m, dtype=jnp.int32), mode="drop")))
    return put(at), first


def lay_out(k, v, fields: dict, valid, size: int) -> Blocks:
    """Keys [B, G, M, ...] of ``joined`` as blocks of ``size`` consecutive positions."""
    row, _ = places(fields["pos"], valid, size)
    there = row < k.shape[2]
    row = jnp.minimum(row, k.shape[2] - 1)

    def block(x):
        x = take_rows(x, row)
        return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])

    there = there.reshape(*there.shape[:2], -1, size)
    return Blocks(block(k), block(v), {n: block(x) for n, x in fields.items()}, there)


def over_rows(tile, size: int, call: Call, extra=None) -> Array:
    """[B, N, H, Dv] of ``tile(q [B, G, R, t, D], fields {name: [B, G, 1, t]}, number)`` over tiles of ``size`` queries;
    ``extra`` {name: [B, G, R, N, ...]} joins the fields. Tiles are recomputed in the gradient."""
    (b, n, h, _), g = call.q.shape, call.k.shape[2]
    names = {"pos"} | (call.mask.fields() if call.mask is not None else frozenset())
    fields = {x: spread(field_of(call.q_meta, x), b, g)[:, :, None] for x in names}
    size = min(size, n)

    def split(x):  # [B, G, R, N, ...] -> [tiles, B, G, R, t, ...]
        x = jnp.pad(x, [(0, -n % size if axis == 3 else 0) for axis in range(x.ndim)], mode="edge")
        return jnp.moveaxis(x.reshape(*x.shape[:3], -1, size, *x.shape[4:]), 3, 0)

    inputs = jax.tree.map(split, (grouped(call.q, g), fields | (extra or {})))
    numbers = jnp.arange(-(-n // size))
    out = lax.map(jax.checkpoint(lambda x: tile(*x)), (*inputs, numbers))
    out = jnp.moveaxis(out, 0, 3)
    return jnp.moveaxis(out.reshape(b, h, -1, out.shape[-1])[:, :, :n], 1, 2)


def rotary_positions(meta, b: int, g: int) -> Array:
    """[B, G, M] positions that the rotary embedding read."""
    rope = meta.pos if meta.rope is None else meta.rope
    expect("rope", f"{jnp.ndim(rope)} axes", "one rotary position per row", jnp.ndim(rope) == jnp.ndim(meta.pos))
    return spread(rope, b, g)


def spread(x, b: int, g: int) -> Array:
    """A Meta field [B|1, M] or [B|1, G, M] as [B, G, M]."""
    x = jnp.asarray(x)
    x = x[:, None] if x.ndim == 2 else x
    return jnp.broadcast_to(x, (b, g, x.shape[-1]))


def take_rows(x, index) -> Array:
    """x [B, G, M, ...], index int32 [B, G, ...] -> x's rows [B, G, ..., ...]."""
    return jax.vmap(jax.vmap(lambda rows, i: rows.at[i].get(mode="promise_in_bounds")))(x, index)


def grouped(q, g: int) -> Array:
    """[B, N, H, D] -> [B, G, R, N, D]."""
    b, n, h, d = q.shape
    return jnp.moveaxis(q.reshape(b, n, g, h // g, d), 1, 3)


def swap(x) -> Array:
    """[B, M, G, D] <-> [B, G, M, D]."""
    return jnp.moveaxis(x, 1, 2)
