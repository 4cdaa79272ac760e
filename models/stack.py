"""The loop over layers, written once for every model: the only place where all sockets meet.

Per layer: project -> cache.view -> Call -> steering.call -> attention -> steering.heads -> evidence -> cache.pending;
between segments TokenTransforms; after the scan cache.commit. One ``lax.scan`` per segment: compile time does not grow
with depth, and the cache is read-only inside it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.core import mask as masks
from jaxattn.core import statistics
from jaxattn.core.reduce import fresh
from jaxattn.core.types import (
    Array,
    Call,
    Ctx,
    Meta,
    Need,
    Part,
    State,
    Tokens,
    data,
    default_state,
    expect,
    static,
)  # fmt: skip
from jaxattn.nn import block as B
from jaxattn.nn import layers
from jaxattn.nn.partition import STREAM, constrain
from models import evidence as ev
from models.bind import StackProgram, needs_of, params_of

MAX_CACHES = 4  # segments with different numbers of rows share at most this many cache stacks


@data
class Streams:
    """The rows of a stack: named groups lie one after the other in x; positions in Meta say what order means.

    x [B, N, C]; meta fields [B, N]; slots {group: int32 [B, N0]} follow original rows; groups ((name, rows), ...)."""

    x: Array
    meta: Meta
    slots: dict[str, Array]
    groups: tuple = static(())

    def span(self, name: str) -> tuple[int, int]:
        start = 0
        for group, rows in self.groups:
            if group == name:
                return start, start + rows
            start += rows
        raise ValueError(f"acts_on: expected one of {[g for g, _ in self.groups]}, got {name!r}")

    def spans(self) -> dict[str, tuple[int, int]]:
        return {name: self.span(name) for name, _ in self.groups}

    def tokens(self, name: str) -> Tokens:
        start, stop = self.span(name)
        meta = jax.tree.map(lambda a: a[:, start:stop], self.meta)
        return Tokens(self.x[:, start:stop], meta, self.slots[name])

    def put(self, name: str, new: Tokens) -> Streams:
        start, stop = self.span(name)
        join = lambda a, b: jnp.concatenate([a[:, :start], b.astype(a.dtype), a[:, stop:]], 1)  # noqa: E731
        groups = tuple((g, new.x.shape[1] if g == name else n) for g, n in self.groups)
        old = self.meta
        if new.meta.size is not None and old.size is None:
            old = old.replace(size=jnp.ones(old.pos.shape, jnp.float32))
        if new.meta.rope is not None and old.rope is None:
            old = old.replace(rope=old.pos)
        more = {label: jnp.zeros_like(old.pos) for label in new.meta.labels if label not in old.labels}
        old = old.replace(labels={**old.labels, **more})
        meta = jax.tree.map(join, old, jax.tree.map(jnp.asarray, new.meta))
        return Streams(join(self.x, new.x), meta, {**self.slots, name: new.slot}, groups)


def streams_of(groups: dict[str, tuple[Array, Meta]]) -> Streams:
    """Streams from {name: (x, Meta)}; labels missing in one group are 0 there."""
    names = sorted({label for _, meta in groups.values() for label in meta.labels})
    has = {f: any(getattr(m, f) is not None for _, m in groups.values()) for f in ("rope", "size")}
    metas, slots = [], {}
    for name, (x, meta) in groups.items():
        shape = x.shape[:2]
        full = lambda a, shape=shape: jnp.broadcast_to(a, (*shape, *jnp.shape(a)[2:]))  # noqa: E731
        labels = {n: full(meta.labels.get(n, np.zeros((1, shape[1]), np.int32))) for n in names}
        rope = (full(meta.pos if meta.rope is None else meta.rope)) if has["rope"] else None
        size = (full(np.ones((1, shape[1]), np.float32) if meta.size is None else meta.size)) if has["size"] else None
        metas.append(Meta(full(meta.pos), full(meta.valid), rope, size, labels))
        slots[name] = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    x = jnp.concatenate([x for x, _ in groups.values()], 1)
    meta = jax.tree.map(lambda *a: jnp.concatenate(a, 1), *metas)
    return Streams(x, meta, slots, tuple((name, x.shape[1]) for name, (x, _) in groups.items()))


@data
class CacheStack:
    """The cache of layers [start, stop): one State, leaves stacked over those layers. ``shift`` int32 [B]: what is taken
    off a new row's position before rotation where a cut renumbered the rows (None: nothing)."""

    state: State
    shift: Array | None = None
    start: int = static(0)
    stop: int = static(0)


@data
class StackOut:
    """What a pass leaves: the rows, the evidence found, caches, socket states (tuple of State), aux per layer."""

    streams: Streams
    evidence: dict[str, Array]
    caches: tuple[CacheStack, ...]
    states: dict[str, State]
    aux: dict[str, Any]


def init_states(program: StackProgram, batch: int, dtype) -> dict[str, State]:
    """Fresh states of the stateful sockets, leaves stacked over layers: recurrent attentions and steering."""
    spec = program.block.spec(program.layers, batch=batch, dtype=jnp.dtype(dtype).name)
    named = [(f"attention.{i}", a) for i, a in enumerate(program.attention)]
    named += [(f"steering.{i}", s) for i, s in enumerate(program.steering)]
    return {name: default_state(record, spec) for name, record in named}


def layer_mask(program: StackProgram, mask):
    """The layer's own mask and the caller's (packing, prefixes), as one expression or None."""
    block = program.block
    if mask is None and block.causal:
        mask = masks.causal()
    if block.window is not None:
        mask = masks.window(block.window) if mask is None else mask & masks.window(block.window)
    return mask


def run(params: dict, program: StackProgram, arrays: dict, streams: Streams, *, phase: str, mask=None, caches=(),
        states=None, step=0, key=None, start: int = 0, stop: int | None = None, evidence=None, const=(),
        new_rows: int = 0) -> StackOut:  # fmt: skip
    """Run layers [start, stop) of a stack.

    Args:
      params: {"layers": stacked block parameters}.  program, arrays: of ``bind_stack``.
      phase: "train" | "prefill" (nothing cached before) | "extend" (several rows after a cache) | "decode" (one row).
      caches: CacheStacks of the steps before (extend, decode).  new_rows: rows the cache must still find room for.
      evidence: facts found earlier (prompt embeddings, the vision tower's scores) for the transforms.
    """
    stop = program.layers if stop is None else stop
    batch = streams.x.shape[0]
    states = init_states(program, batch, streams.x.dtype) if states is None else states
    evidence = dict(evidence or {})
    aux: list = []
    done: list = []
    keep_cache = program.cache is not None and phase != "train"
    if phase in ("decode", "extend"):
        pieces = [(c.start, c.stop, c, ()) for c in caches] if keep_cache else [(start, stop, None, ())]
    else:
        cuts = [c for c in program.cuts if start < c.layer < stop]
        edges = [start, *sorted({c.layer for c in cuts}), stop]
        pieces = [(a, b, None, tuple(c for c in cuts if c.layer == b)) for a, b in zip(edges, edges[1:], strict=False)]
    shift, carried, given = None, {}, streams.meta.rope
    for a, b, cache, cuts in pieces:
        if cache is not None:
            streams = _shifted(streams, given, cache.shift)
        streams, states, found, pending, extra = _segment(
            params, program, arrays, streams, a, b, phase=phase, mask=mask, cache=cache, states=states, step=step, key=key,
            evidence=evidence, const=const, keep_cache=keep_cache, new_rows=new_rows,
        )  # fmt: skip
        evidence |= _over_depth(program, evidence, found, a > start)
        aux.append(extra)
        if keep_cache:
            done.append(pending if cache is not None else pending.replace(shift=shift))
        for cut in cuts:
            streams, carried = _cut(params, program, arrays, streams, cut, evidence, carried, mask=mask, step=step, key=key,
                                    phase=phase)  # fmt: skip
            if getattr(cut.transform, "positions", "original") == "fresh":
                streams = streams.replace(meta=fresh(streams.meta)[0])
                shift = _last(streams.meta.pos, streams.meta.valid) - _last(streams.meta.rope, streams.meta.valid)
    if keep_cache and phase == "prefill":
        done = _join_caches(done)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *aux) if aux and jax.tree.leaves(aux) else {}
    return StackOut(streams, evidence, tuple(done), states, joined)


# --------------------------------------------------------------------------------------------------------- a segment


def _segment(params, program, arrays, streams, a, b, *, phase, mask, cache, states, step, key, evidence, const,
             keep_cache, new_rows):  # fmt: skip
    block, policy = program.block, program.cache
    mask = layer_mask(program, mask)
    batch, n = streams.x.shape[:2]
    spec = block.spec(program.layers, batch=batch, length=n + new_rows, dtype=streams.x.dtype.name)
    base = Ctx(step=step, key=key, const=const, phase=phase, site=program.site, spec=spec)
    groups = streams.spans()
    asked = program.needs if phase not in ("decode", "extend") else ()
    every = [x for x in asked if x.at.endswith(".*")]
    needs = [x for x in asked if not x.at.endswith(".*") and a <= int(x.at.rsplit(".", 1)[1]) < b]
    names = [need.name for need in (*every, *needs)]
    expect("needs", f"two requests called {max(names, key=names.count, default='')!r}", "a name for each kind of evidence",
           len(set(names)) == len(names))  # fmt: skip
    if keep_cache:
        if cache is None:
            state = policy.init_state(spec.replace(layers=b - a))
            cache = CacheStack(state, None, a, b)
        policy_params = params_of(arrays, "cache")
        shared = cache.state.shared
    else:
        shared, policy_params = (), {}
    whole = a == 0 and b == program.layers  # no cut: parameters travel as plain scan inputs
    layer_states = {name: s.layer for name, s in states.items()}
    carry_states = {name: s.shared for name, s in states.items()}

    def body(carry, inputs):
        x, shared, carried, found = carry
        x = constrain(x, STREAM)  # else the parameters' layout wins, and every device gets all rows of the batch
        layer, p = inputs
        if p is None:
            p = _at(params["layers"], layer)
        h = layers.norm(p["norm1"], x, block.eps)
        ctx = dataclasses.replace(base, layer=layer, x=h, hidden=x)
        here = {name: State(_at(layer_states[name], layer), carried[name]) for name in states}
        meta = streams.meta
        cache_state = State(_at(cache.state.layer, layer - a), shared) if keep_cache else None
        if keep_cache and hasattr(policy, "positions"):
            meta = policy.positions(policy_params, cache_state, meta, ctx)
        q, k, v = B.project(p["attn"], block, h)
        length = B.rotary_length(block, meta)
        q_turned, k_turned = B.rotate(block, q, meta, length), B.rotate(block, k, meta, length)
        side = _side(program, arrays, here, h, k, v, meta, ctx)
        views: tuple = ()
        if keep_cache and phase != "prefill":
            q_seen, k_seen = (q_turned, k_turned) if policy.rotated else (q, k)
            views, shared = policy.view(policy_params, cache_state, q_seen, k_seen, meta, ctx)
            if not policy.rotated:
                views = tuple(w.replace(k=B.rotate(block, w.k, w.meta, length)) for w in views)
        call = Call(q_turned, k_turned, v, meta, meta, past=views, key=side, mask=mask, rope=block.rope)
        for i, steer in enumerate(program.steering):
            if callable(getattr(steer, "call", None)):
                call = steer.call(params_of(arrays, f"steering.{i}"), here[f"steering.{i}"], call, ctx)
        part, here, aux = _attend(program, arrays, call, ctx, here)
        out = part.out
        for i, steer in enumerate(program.steering):
            if callable(getattr(steer, "heads", None)):
                name = f"steering.{i}"
                out, here[name] = steer.heads(params_of(arrays, name), here[name], out, meta, ctx)
        blocks = lambda x=x, out=out: _blocks(p, block, h, x, out)  # noqa: E731
        ask_here = lambda need, x=x: ev.answer(need, call, part, hidden=x, k_raw=k, groups=groups, evidence=evidence,  # noqa: E731
                                               blocks=blocks)  # fmt: skip
        seen = {need.name: ask_here(need) for need in every}
        for need in needs:
            at = int(need.at.rsplit(".", 1)[1])
            kept = found[need.name]
            found = {**found, need.name: lax.cond(layer == at, lambda n=need: ask_here(n), lambda old=kept: old)}
        pending = ()
        if keep_cache:
            facts = {need.name: _live_evidence(need, call, part) for need in needs_of(policy) if need.at.endswith(".*")}
            stored = k_turned if policy.rotated else k
            pending = policy.pending(policy_params, cache_state, stored, v, meta, side, facts, ctx)
        x = B.attention_residual(p, block, x, out)
        x = B.mlp_residual(p, block, x)
        for i, steer in enumerate(program.steering):
            if callable(getattr(steer, "hidden", None)):
                x = steer.hidden(params_of(arrays, f"steering.{i}"), here[f"steering.{i}"], x, ctx)
        ys = (pending, {name: s.layer for name, s in here.items()}, aux, seen)
        return (x, shared, {name: s.shared for name, s in here.items()}, found), ys

    inputs = (jnp.arange(a, b), params["layers"] if whole else None)
    found = {}
    if needs:
        found = _blank_evidence(needs, program, streams, evidence)
    carry = (streams.x, shared, carry_states, found)
    step_fn = jax.checkpoint(body, prevent_cse=False) if program.remat and phase == "train" else body
    (x, shared, carried, found), (pending, new_layer, aux, seen) = lax.scan(step_fn, carry, inputs)
    states = {
        name: State(_replace_layers(states[name].layer, new_layer[name], a, b, program.layers), carried[name])
        for name in states
    }
    if keep_cache:
        state = policy.commit(policy_params, State(cache.state.layer, shared), pending)
        pending = CacheStack(state, cache.shift, cache.start, cache.stop)
    return streams.replace(x=x), states, found | seen, pending, aux


def _over_depth(program, before: dict, found: dict, later: bool) -> dict:
    """Evidence of every layer ("llm.*") grows by each segment's layers; other answers are what the segment found."""
    for need in program.needs:
        if later and need.at.endswith(".*") and need.name in found:
            old, new = before[need.name], found[need.name]
            expect(f"need {need.name!r} at {need.at}", f"{new.shape[1:]} after a cut", f"{old.shape[1:]} as before it",
                   old.shape[1:] == new.shape[1:])  # fmt: skip
            found = {**found, need.name: jnp.concatenate([old, new])}
    return found


def _last(pos, valid):
    return jnp.max(jnp.where(valid, pos, 0), axis=1)


def _shifted(streams: Streams, given, shift) -> Streams:
    """New rows, whose rotary positions were ``given``, in a segment whose prompt was renumbered: they go on behind it."""
    meta = streams.meta
    rope = given if shift is None else (meta.pos if given is None else given) - shift[:, None]
    return streams.replace(meta=meta.replace(rope=rope))


def _blocks(p, block, h, x, out):
    """((normalised input, output), ...) of the attention and the feed-forward sub-block."""
    return (h, B.attention_output(p, x, out)), B.mlp_output(p, block, B.attention_residual(p, block, x, out))


def _at(tree, i):
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), tree)


def _replace_layers(old, new, a: int, b: int, n: int):
    if a == 0 and b == n:
        return new
    return jax.tree.map(lambda o, x: lax.dynamic_update_slice_in_dim(o, x.astype(o.dtype), a, 0), old, new)


def _side(program, arrays, here, h, k, v, meta, ctx) -> dict:
    """Per-key rows that methods keep beside k and v (float32 [B, N, 1|G|H])."""
    side: dict = {}
    for i, kind in enumerate(program.attention):
        if hasattr(kind, "side"):
            side |= kind.side(_kind_params(arrays, i, ctx.layer), h, k, v)
    for i, steer in enumerate(program.steering):
        if callable(getattr(steer, "side", None)):
            side |= steer.side(params_of(arrays, f"steering.{i}"), here[f"steering.{i}"], meta, ctx)
    return side


def _kind_params(arrays, i: int, layer) -> dict:
    name = f"attention.{i}"
    return {**arrays["operands"].get(name, {}), **_at(arrays.get("trained", {}).get(name, {}), layer)}


def _attend(program, arrays, call, ctx, here):
    """Run the layer's kind of attention; several kinds share one program through ``lax.switch``."""
    kinds = program.attention

    def apply(i):
        name = f"attention.{i}"
        own = call.replace(past=()) if getattr(kinds[i], "recurrent", False) else call  # its past is its state
        return kinds[i].apply(_kind_params(arrays, i, ctx.layer), here[name], own, ctx)

    if len(kinds) == 1:
        part, state, aux = apply(0)
        return part, {**here, "attention.0": state}, {"attention.0": aux} if aux else {}
    shapes = [jax.eval_shape(lambda i=i: apply(i)) for i in range(len(kinds))]
    with_lse = all(s[0].lse is not None for s in shapes)

    def branch(i):
        def go():
            part, state, aux = apply(i)
            states = {f"attention.{j}": state if j == i else here[f"attention.{j}"] for j in range(len(kinds))}
            zeros = lambda t: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), t)  # noqa: E731
            every = {f"attention.{j}": aux if j == i else zeros(shapes[j][2]) for j in range(len(kinds))}
            return Part(part.out, part.lse if with_lse else None), states, every

        return go

    part, states, aux = lax.switch(arrays["operands"]["which"][ctx.layer], [branch(i) for i in range(len(kinds))])
    return part, {**here, **states}, {k: v for k, v in aux.items() if v}


def _live_evidence(need: Need, call: Call, part: Part) -> dict:
    """Per-layer evidence a cache policy declared, over own and cached keys: {"own": [B, H, N], "past": (...)}."""
    expect(f"need {need.name!r}", need.what, "'received' (what a cache policy may ask of every layer)", need.what == "received")
    call = jax.lax.stop_gradient(call)
    index, weights = ev.row_weights(need.rows, ev._batched(call.q_meta, call.q.shape[0]), {}, {}, need.total)
    lse = statistics.log_mass(call, 1.0) if part.lse is None else part.lse
    if index is not None and index.shape[1] < call.q.shape[1]:
        lse = jnp.take_along_axis(lse, index[..., None], axis=1)
        call = statistics.rows_call(call, index)
    elif index is not None:
        weights = jnp.take_along_axis(weights, jnp.argsort(index, axis=1), axis=1)
    own, past = statistics.received(call, lse, weights)
    return {"own": own, "past": past}


def _blank_evidence(needs, program, streams, evidence) -> dict:
    """Zero buffers in the shape of each answer: the layer that is asked writes, the others pass it on."""
    block = program.block
    batch, n = streams.x.shape[:2]
    acc = jnp.promote_types(streams.x.dtype, jnp.float32)

    def shape_of(need):
        def probe(x):
            q = jnp.zeros((batch, n, block.heads, block.head_dim), x.dtype)
            k = jnp.zeros((batch, n, block.kv_heads, block.head_dim), x.dtype)
            call = Call(q, k, k, streams.meta, streams.meta)
            part = Part(q, jnp.zeros(q.shape[:3], acc))
            return ev.answer(need, call, part, hidden=x, k_raw=k, groups=streams.spans(), evidence=evidence,
                             blocks=lambda: ((x, x), (x, x)))  # fmt: skip

        return jax.eval_shape(probe, streams.x)

    return {need.name: jnp.zeros(s.shape, s.dtype) for need in needs for s in [shape_of(need)]}


# -------------------------------------------------------------------------------------------------------------- cuts


def _cut(params, program, arrays, streams, cut, evidence, carried, *, mask, step, key, phase) -> tuple[Streams, dict]:
    """Apply one TokenTransform before layer ``cut.layer``; "next" evidence projects the rows through that layer.
    ``carried``: {name: State} from the cuts before."""
    record, block = cut.transform, program.block
    acts_on = getattr(record, "acts_on", "vision")
    asked = dict(evidence)
    following = [need for need in needs_of(record) if need.at == "next"]
    if following:
        p = _at(params["layers"], cut.layer)
        h = layers.norm(p["norm1"], streams.x, block.eps)
        q, k, v = B.project(p["attn"], block, h)
        turn = functools.partial(B.rotate, block, meta=streams.meta, length=B.rotary_length(block, streams.meta))
        call = Call(turn(q), turn(k), v, streams.meta, streams.meta,
                    mask=layer_mask(program, mask))  # fmt: skip
        for need in following:
            asked[need.name] = ev.answer(need, call, None, hidden=streams.x, k_raw=k, groups=streams.spans(), evidence=asked)
    ctx = Ctx(layer=cut.layer, step=step, key=key, phase=phase, site=f"{program.site}.{cut.layer}",
              spec=block.spec(program.layers), hidden=streams.x)  # fmt: skip
    local = frozenset(need.name for need in (*program.needs, *following))
    name = getattr(record, "carries", None)
    state = carried.get(name, State())
    streams, state = _transform(record, params_of(arrays, cut.name), state, streams, acts_on, asked, ctx, local)
    return streams, carried if name is None else {**carried, name: state}


def transform(record, params, streams: Streams, acts_on: str, evidence: dict, ctx: Ctx, local=frozenset()) -> Streams:
    """Apply a TokenTransform to one group of rows, with the evidence of that group's rows.

    ``local`` names facts whose columns are this stack's rows; per-key facts found elsewhere have a column per original
    row of the group and follow its slots (a merged row gets the sum, or the maximum, of its members').
    """
    return _transform(record, params, State(), streams, acts_on, evidence, ctx, local)[0]


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
    new, state, _ = record.apply(params, state, tokens, mine, ctx)
    expect("rows", new.x.shape[1], f"the {record.rows(stop - start)} rows the transform declared",
           new.x.shape[1] == record.rows(stop - start))  # fmt: skip
    return streams.put(acts_on, new), state


# ------------------------------------------------------------------------------------------------------------ caches


def _join_caches(stacks: list[CacheStack]) -> list[CacheStack]:
    """At most MAX_CACHES stacks, or one per numbering of the rows: neighbours with the fewest rows to lose are padded to a
    common capacity."""
    stacks = list(stacks)
    while len(stacks) > MAX_CACHES:
        widths = [_width(s) for s in stacks]
        costs = [abs(widths[i] - widths[i + 1]) for i in range(len(stacks) - 1)]
        for i, (x, y) in enumerate(zip(stacks, stacks[1:], strict=False)):
            if x.shift is not y.shift:  # one stack has one offset
                costs[i] = np.inf
        i = int(np.argmin(costs))
        if costs[i] == np.inf:
            break
        stacks[i : i + 2] = [_join(stacks[i], stacks[i + 1])]
    return stacks


def _width(stack: CacheStack) -> int:
    return max((a.shape[-2] for a in jax.tree.leaves(stack.state.layer) if a.ndim >= 5), default=0)


def _join(a: CacheStack, b: CacheStack) -> CacheStack:
    """Stack two neighbours' layers; the narrower is padded with invalid slots on its slot axis."""

    def fit(x, y):
        target = tuple(max(m, n) for m, n in zip(x.shape[1:], y.shape[1:], strict=True))
        pad = lambda z: jnp.pad(z, [(0, 0)] + [(0, t - n) for t, n in zip(target, z.shape[1:], strict=True)])  # noqa: E731
        return jnp.concatenate([pad(x), pad(y)])

    layer = jax.tree.map(fit, a.state.layer, b.state.layer)
    return CacheStack(State(layer, a.state.shared), b.shift, a.start, b.stop)
