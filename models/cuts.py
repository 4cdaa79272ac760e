"""Between two segments of a stack: a TokenTransform decides, from evidence, which rows go on."""

from __future__ import annotations

import functools

import jax

from jaxattn.core.types import Call, Ctx, State, expect
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
        q, k, v = B.project(p["attn"], block, B.attention_input(p, block, streams.x))
        length = B.rotary_length(block, streams.meta)
        turn = functools.partial(B.rotate, block, meta=streams.meta, length=length, layer=at.layer)
        meta = B.of_layer(block, streams.meta, at.layer)
        call = Call(turn(q), turn(k), v, meta, meta, mask=B.mask(block, mask), scale=block.scale,
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
