"""Between two segments of a stack: a TokenTransform decides, from evidence, which rows go on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxattn.core.select import gather_meta, gather_tokens
from jaxattn.core.types import Call, Ctx, State, expect, is_contract
from jaxattn.nn import block as B
from models import evidence as ev
from models.bind import needs_of, params_of
from models.rows import Streams


@jax.named_scope("choose")
def cut(params, program, arrays, streams, at, evidence, carried, *, mask, step, key, phase) -> tuple[Streams, dict, dict]:
    """Apply one TokenTransform before layer ``at.layer``; "next" evidence projects the rows through that layer.
    ``carried``: {name: State} from the cuts before. Returns (streams, carried, what the transform tells beside)."""
    record, block = at.transform, program.block
    acts_on = getattr(record, "acts_on", "vision")
    asked = dict(evidence)
    following = [need for need in needs_of(record) if need.at == "next"]
    if following:
        p = B.layer_of(params["layers"], at.layer)
        h, length = B.attention_input(p, block, streams.x), B.rotary_length(block, streams.meta)
        q, k, v = B.project(p["attn"], block, h)
        rows, index = streams.meta, _asked_rows(following, streams)
        if index is not None:  # a few rows ask: no other row is projected for it
            q, rows = B.project(p["attn"], block, gather_tokens(h, index))[0], gather_meta(rows, index)
            following = [dataclasses.replace(need, rows="all") for need in following]
        turn = functools.partial(B.rotate, block, length=length, layer=at.layer)
        meta = [B.of_layer(block, m, at.layer) for m in (rows, streams.meta)]
        call = Call(turn(q, rows), turn(k, streams.meta), v, *meta, mask=B.mask(block, mask), scale=block.scale,
                    score_mod=B.score_mod(block))  # fmt: skip
        for need in following:
            asked[need.name] = ev.answer(need, call, None, hidden=streams.x, k_raw=k, groups=streams.spans(), evidence=asked)
    ctx = Ctx(layer=at.layer, step=step, key=key, phase=phase, site=f"{program.site}.{at.layer}",
              spec=block.spec(program.layers), hidden=streams.x,
              groups=tuple((name, *span) for name, span in streams.spans().items()))  # fmt: skip
    local = frozenset(need.name for need in (*program.needs, *following))
    name = getattr(record, "carries", None)
    state = carried.get(name, State())
    streams, state, aux = _transform(record, params_of(arrays, at.name), state, streams, acts_on, asked, ctx, local)
    return streams, carried if name is None else {**carried, name: state}, aux


def _asked_rows(needs, streams: Streams):
    """int32 [B, R]: the rows whose attention all of ``needs`` ask for, where these are the same few; else None."""
    reading = [need for need in needs if need.what not in ("hidden", "keys", "rotated_keys", "values")]
    kinds = {need.rows for need in reading}
    few = len(kinds) == 1 and not is_contract(*kinds) and kinds != {"all"}
    if not few or any(need.what != "received" or need.iterate > 1 for need in reading):
        return None
    full = lambda x: jnp.broadcast_to(x, streams.x.shape[:2])  # noqa: E731
    meta = streams.meta.replace(pos=full(streams.meta.pos), valid=full(streams.meta.valid))
    index, _ = ev.row_weights(*kinds, meta, streams.spans(), {}, False)
    return index if 2 * index.shape[1] <= meta.n else None


def transform(record, params, streams: Streams, acts_on: str, evidence: dict, ctx: Ctx,
              local=frozenset()) -> tuple[Streams, dict]:  # fmt: skip
    """Apply a TokenTransform to one group of rows, with the evidence of that group's rows: (streams, what it tells beside).

    ``local`` names facts whose columns are this stack's rows; per-key facts found elsewhere have a column per original
    row of the group and follow its slots (a merged row gets the sum, or the maximum, of its members').
    """
    return _transform(record, params, State(), streams, acts_on, evidence, ctx, local)[::2]


@jax.named_scope("choose")
def _transform(record, params, state, streams, acts_on, evidence, ctx, local):
    if acts_on == "all":
        expect("acts_on", f"{len(streams.groups)} groups", "one group for a transform of all rows", len(streams.groups) == 1)
        acts_on = streams.groups[0][0]
    start, stop = streams.span(acts_on)
    tokens = streams.tokens(acts_on)
    mine = dict(evidence)
    for need in needs_of(record):
        if need.name in local:
            mine[need.name] = ev.columns(need, mine[need.name], start, stop)
        elif need.what in ev.PER_KEY and mine.get(need.name) is not None and tokens.slot is not None:
            mine[need.name] = ev.follow(mine[need.name], tokens.slot, stop - start, need.merged)
    new, state, aux = record.apply(params, state, tokens, mine, ctx)
    expect("rows", new.x.shape[1], f"the {record.rows(stop - start)} rows the transform declared",
           new.x.shape[1] == record.rows(stop - start))  # fmt: skip
    return streams.put(acts_on, new), state, aux
