"""Evidence: what methods ask to see inside a forward pass, computed beside the flash path from q, k and the lse.

A Need names a reduction; nothing hooks into a model and no N x N map exists. Gradients stop here unless a method trains
through its evidence.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxattn.core import statistics
from jaxattn.core.types import Array, Call, Meta, Need, Part, is_contract

PER_KEY = ("received", "value_received", "raw_value_received", "rows")  # evidence with a column per key


def row_weights(rows, meta: Meta, groups: dict, evidence: dict, total: bool) -> tuple[Array | None, Array]:
    """(index [B, R] of the query rows that matter, or None for all; weights [B, R]); groups: {name: (start, stop)}."""
    n = meta.pos.shape[-1]
    valid = meta.valid
    if is_contract(rows):
        weights = rows(meta, evidence)
        if getattr(rows, "group", None) not in groups:
            return None, weights
        start, stop = groups[rows.group]  # a record that names a group weighs its rows only
        index = jnp.broadcast_to(jnp.arange(start, stop), (weights.shape[0], stop - start))
        return index, weights[:, start:stop]
    if rows == "all":
        index, live = None, valid
    elif rows in groups:
        start, stop = groups[rows]
        index = jnp.broadcast_to(jnp.arange(start, stop), (valid.shape[0], stop - start))
        live = valid[:, start:stop]
    elif rows == "cls":
        if "special" not in groups:
            raise ValueError("rows: expected a tower with a CLS token for 'cls', got one without special rows")
        index, live = jnp.zeros((valid.shape[0], 1), jnp.int32), valid[:, :1]
    elif rows == "last" or isinstance(rows, int):
        w = 1 if rows == "last" else min(rows, n)
        order = jnp.where(valid, meta.pos, -1)
        top, index = jax.lax.top_k(jnp.broadcast_to(order, valid.shape), w)
        live = top >= 0
    else:
        raise ValueError(f"rows: expected 'all', 'last', 'cls', a number, one of {sorted(groups)} or a record, got {rows!r}")
    weights = live.astype(jnp.float32)
    if not total:
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1.0)
    return index, weights


def over_heads(x: Array, how: str | None) -> Array:
    """Reduce [B, H, M] over the heads."""
    if how is None:
        return x
    return {"mean": jnp.mean, "sum": jnp.sum, "max": jnp.max}[how](x, axis=1)


@jax.named_scope("choose")
def answer(need: Need, call: Call, part: Part | None, *, hidden, k_raw, groups: dict, evidence: dict, blocks=None) -> Array:
    """The evidence one Need asks of a layer whose call (rotated q, k) is given; ``part`` is its merged result or None
    where the layer has not run (a cut asks the layer that comes next). ``blocks()``: ((input, output), ...) [B, N, C] of
    its sub-blocks."""
    stop = (lambda x: x) if need.through else jax.lax.stop_gradient
    if need.what == "hidden":
        return stop(hidden)
    if need.what == "keys":
        return stop(k_raw)
    if need.what in ("rotated_keys", "values"):
        return stop(call.k if need.what == "rotated_keys" else call.v)
    if need.what == "head_out":
        return stop(part.out)
    if need.what == "transition":
        if blocks is None:
            raise ValueError(f"need {need.name!r}: expected a layer that has run for 'transition', got at={need.at!r}")
        valid = _batched(call.q_meta, call.q.shape[0]).valid
        return sum(statistics.transition(*stop(pair), valid) for pair in blocks())
    call = stop(call)
    batch, n = call.q.shape[:2]
    meta = _batched(call.q_meta, batch)
    if is_contract(need.rows) and getattr(need.rows, "given", None) is not None:
        given = need.rows.given
        found = answer(given, call, part, hidden=hidden, k_raw=k_raw, groups=groups, evidence=evidence, blocks=blocks)
        evidence = {**evidence, given.name: found}
    if need.what in ("value_received", "raw_value_received"):
        values = jnp.repeat(call.v, call.q.shape[2] // call.v.shape[2], axis=2)
        scale = 1.0 if need.what == "raw_value_received" else call.v.shape[-1] ** -0.5
        call, part = call.replace(q=values, k=call.v, scale=scale), None
    if need.what == "between":
        return _between(need, call, None if part is None else part.lse, meta, groups)
    index, weights = row_weights(need.rows, meta, groups, evidence, need.total)
    if need.what == "hidden_mean":
        mine = hidden if index is None else jnp.take_along_axis(hidden, index[..., None], axis=1)
        mine = jnp.einsum("bn,bnc->bc", weights, mine.astype(jnp.promote_types(hidden.dtype, jnp.float32)))
        return stop(mine.astype(hidden.dtype))
    if need.what == "received" and need.iterate > 1:
        found = statistics.iterated(call, jnp.broadcast_to(weights, (batch, n)), need.iterate, need.temperature)
        return over_heads(found, need.over_heads)
    lse = None if part is None or need.temperature != 1.0 else stop(part.lse)
    if need.what == "entropy":
        lse = statistics.log_mass(call, need.temperature) if lse is None else lse
        return over_heads(jnp.moveaxis(statistics.entropy(call, lse), 1, 2), need.over_heads)
    if index is not None:  # a few rows: never pay for the others
        if lse is not None:
            lse = jnp.take_along_axis(lse, index[..., None], axis=1)
        call = statistics.rows_call(call, index)
    if lse is None:
        lse = statistics.log_mass(call, need.temperature)
    if need.what == "rows":
        every = jnp.broadcast_to(jnp.arange(call.q.shape[1]), call.q.shape[:2])
        found = over_heads(statistics.rows(call, every, lse)[0], need.over_heads)
        return jnp.where((weights > 0)[..., None] if found.ndim == 3 else (weights > 0)[:, None, :, None], found, 0)
    if need.what not in ("received", "value_received", "raw_value_received"):
        raise ValueError(f"need {need.name!r}: unknown kind of evidence {need.what!r}")
    own, _ = statistics.received(call, lse, weights, temperature=need.temperature)
    return over_heads(own, need.over_heads)


def _between(need: Need, call: Call, lse, meta: Meta, groups: dict) -> Array:
    """[B, groups, groups]: mean over the valid rows of one group of their mass on another, heads averaged."""
    lse = statistics.log_mass(call) if lse is None else lse if need.through else jax.lax.stop_gradient(lse)
    found = []
    for name in groups:
        index, weights = row_weights(name, meta, groups, {}, False)
        rows = statistics.rows_call(call, index)
        own, _ = statistics.received(rows, jnp.take_along_axis(lse, index[..., None], axis=1), weights)
        own = own.mean(1)
        found.append(jnp.stack([own[:, a:b].sum(-1) for a, b in groups.values()], -1))
    return jnp.stack(found, 1)


def columns(need: Need, found: Array, start: int, stop: int) -> Array:
    """The rows [start, stop) of a fact about all rows of a stack."""
    if need.what in (*PER_KEY, "entropy", "transition"):
        return found[..., start:stop]
    return found[:, start:stop] if need.what in ("hidden", "keys", "rotated_keys", "values", "head_out") else found


def follow(found: Array, slot: Array, rows: int, merged: str = "sum") -> Array:
    """Per-key facts [B, ..., N0] of original rows as facts of the ``rows`` rows that now carry them."""
    if found.shape[-1] != slot.shape[1]:
        return found  # already about the rows at hand; the method checks the shape

    def one(x, to):
        out = jnp.zeros((*x.shape[:-1], rows + 1), x.dtype).at[..., jnp.where(to < 0, rows, to)]
        return (out.max(x) if merged == "max" else out.add(x))[..., :rows]

    return jax.vmap(one)(found, slot)


def unfollow(found: Array, slot: Array) -> Array:
    """Per-key facts [B, ..., M] of rows as facts [B, ..., N0] of the original rows in ``slot`` [B, N0]: the first member
    of a row carries its fact and the others 0, so that ``follow`` gives the rows' facts back."""
    m = found.shape[-1]

    def one(x, to):
        first = jnp.full(m + 1, to.shape[0]).at[jnp.where(to < 0, m, to)].min(jnp.arange(to.shape[0]))[:m]
        return jnp.zeros((*x.shape[:-1], to.shape[0]), x.dtype).at[..., first].set(x, mode="drop")

    return jax.vmap(one)(found, slot)


def _batched(meta: Meta, batch: int) -> Meta:
    return dataclasses.replace(
        meta,
        pos=jnp.broadcast_to(meta.pos, (batch, meta.pos.shape[-1])),
        valid=jnp.broadcast_to(meta.valid, (batch, meta.valid.shape[-1])),
    )
