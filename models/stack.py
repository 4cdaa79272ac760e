"""The loop over layers, written once for every model: the only place where all sockets meet.

Per layer: project -> cache.view -> Call -> steering.call -> attention -> steering.heads -> evidence -> cache.pending;
between segments TokenTransforms; after the scan cache.commit. One ``lax.scan`` per segment: compile time does not grow
with depth, and the cache is read-only inside it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.core import statistics
from jaxattn.core.reduce import fresh
from jaxattn.core.types import Array, Call, Ctx, Need, Part, State, data, default_state, expect
from jaxattn.nn import block as B
from jaxattn.nn.partition import STREAM, constrain
from models import evidence as ev
from models.bind import StackProgram, needs_of, params_of
from models.caches import CacheStack, join_caches
from models.cuts import cut as cut_rows
from models.cuts import transform
from models.rows import Streams, streams_of


@data
class StackOut:
    """What a pass leaves: the rows, the evidence found, caches, socket states (tuple of State), and what attentions (per
    layer) and transforms ("cut.0", ...) tell beside."""

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
        cuts = [c for c in program.cuts if start <= c.layer < stop and (c.inside or c.layer > start)]
        edges = sorted({start, stop, *(c.layer for c in cuts), *(c.layer + 1 for c in cuts if c.inside)})
        at = lambda b: tuple(c for c in cuts if c.layer + c.inside == b)  # noqa: E731
        pieces = [(a, b, None, at(b)) for a, b in zip(edges, edges[1:], strict=False)]
    carried, told, given, shift = {}, {}, streams.meta.rope, None
    if phase == "prefill" and given is not None and given.ndim == 3:  # pictures take fewer positions than rows (M-RoPE)
        shift = _behind(streams.meta)
    for a, b, cache, cuts in pieces:
        if cache is not None:
            streams = _shifted(streams, given, cache.shift)
        inside = [c for c in cuts if c.inside]
        streams, states, found, pending, extra = _segment(
            params, program, arrays, streams, a, b, phase=phase, mask=mask, cache=cache, states=states, step=step, key=key,
            evidence=evidence, const=const, keep_cache=keep_cache, new_rows=new_rows, whole_layers=not inside,
        )  # fmt: skip
        evidence |= _over_depth(program, evidence, found, a > start)
        aux.append(extra)
        if keep_cache:
            done.append(pending if cache is not None else pending.replace(shift=shift))
        for cut in sorted(cuts, key=lambda c: not c.inside):
            streams, carried, told[cut.name] = cut_rows(params, program, arrays, streams, cut, evidence, carried, mask=mask,
                                                        step=step, key=key, phase=phase)  # fmt: skip
            if getattr(cut.transform, "positions", "original") == "fresh":
                streams = streams.replace(meta=fresh(streams.meta)[0])
                shift = _behind(streams.meta)
            if inside and cut is inside[-1]:
                streams = _feed_forward(params, program, arrays, streams, states, a, phase=phase, step=step, key=key)
    if keep_cache and phase == "prefill":
        done = join_caches(done)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *aux) if aux and jax.tree.leaves(aux) else {}
    return StackOut(streams, evidence, tuple(done), states, joined | told)


# --------------------------------------------------------------------------------------------------------- a segment


def _segment(params, program, arrays, streams, a, b, *, phase, mask, cache, states, step, key, evidence, const,
             keep_cache, new_rows, whole_layers=True):  # fmt: skip
    """Layers [a, b); not ``whole_layers``: one layer up to its feed-forward."""
    block, policy = program.block, program.cache
    mask = B.mask(block, mask)
    batch = streams.x.shape[0]
    unmerge = phase in ("train", "prefill") and any(getattr(s, "unmerge", False) for s in program.steering)
    places = streams.places() if unmerge else None  # where attention happens, if not at the rows
    groups = places.spans() if unmerge else streams.spans()
    attended = streams.meta if places is None else places.meta
    spec = block.spec(program.layers, batch=batch, length=attended.pos.shape[1] + new_rows, dtype=streams.x.dtype.name)
    base = Ctx(step=step, key=key, const=const, phase=phase, site=program.site, spec=spec, groups=_spans(groups))
    runs = _neurons(program, streams.spans())
    asked = program.needs if phase not in ("decode", "extend") else ()
    every = [x for x in asked if x.at.endswith(".*")]
    needs = [x for x in asked if not x.at.endswith(".*") and a <= int(x.at.rsplit(".", 1)[1]) < b]
    names = [need.name for need in (*every, *needs)]
    expect("needs", f"two requests called {max(names, key=names.count, default='')!r}", "a name for each kind of evidence",
           len(set(names)) == len(names))  # fmt: skip
    expect("needs", names, "none of a layer in which rows are unmerged", places is None or not names)
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
    handed = {f"steering.{i}": s for i, s in enumerate(program.steering) if hasattr(s, "blank")}
    carry_states |= {name: s.blank(batch, attended.pos.shape[1], base.groups) for name, s in handed.items()}

    def body(carry, inputs):
        x, shared, carried, found = carry
        x = constrain(x, STREAM)  # else the parameters' layout wins, and every device gets all rows of the batch
        layer, p = inputs
        if p is None:
            p = B.layer_of(params["layers"], layer)
        h = B.attention_input(p, block, x)
        wide = (lambda rows: rows) if places is None else places.spread
        ctx = dataclasses.replace(base, layer=layer, x=wide(h), hidden=wide(x))
        here = {name: State(B.layer_of(layer_states[name], layer), carried[name]) for name in states}
        meta = attended
        cache_state = State(B.layer_of(cache.state.layer, layer - a), shared) if keep_cache else None
        if keep_cache and hasattr(policy, "positions"):
            meta = policy.positions(policy_params, cache_state, meta, ctx)
        q, k, v = (wide(rows) for rows in B.project(p["attn"], block, h))
        length = B.rotary_length(block, meta)
        q_turned, k_turned = B.rotate(block, q, meta, length, layer), B.rotate(block, k, meta, length, layer)
        side = _side(program, arrays, here, ctx.x, k, v, meta, ctx)
        views: tuple = ()
        if keep_cache and phase != "prefill":
            q_seen, k_seen = (q_turned, k_turned) if policy.rotated else (q, k)
            views, shared = policy.view(policy_params, cache_state, q_seen, k_seen, meta, ctx)
            if not policy.rotated:
                views = tuple(w.replace(k=B.rotate(block, w.k, w.meta, length, layer)) for w in views)
            views = tuple(w.replace(meta=B.of_layer(block, w.meta, layer)) for w in views)  # what masks compare
        seen_as = B.of_layer(block, meta, layer)
        call = Call(q_turned, k_turned, v, seen_as, seen_as, past=views, key=side, mask=mask, scale=block.scale,
                    score_mod=B.score_mod(block), rope=B.shared_rope(block))  # fmt: skip
        for i, steer in enumerate(program.steering):
            if callable(getattr(steer, "call", None)):
                call = steer.call(params_of(arrays, f"steering.{i}"), here[f"steering.{i}"], call, ctx)
        part, here, aux = _attend(program, arrays, call, ctx, here)
        out = part.out
        for i, steer in enumerate(program.steering):
            if callable(getattr(steer, "heads", None)):
                name = f"steering.{i}"
                out, here[name] = steer.heads(params_of(arrays, name), here[name], out, meta, ctx)
            if callable(getattr(steer, "observe", None)):
                name = f"steering.{i}"
                here[name] = steer.observe(params_of(arrays, name), here[name], call, part, ctx)
        out = out if places is None else places.average(out, x.shape[1])
        told = any("transition" in (need.what, getattr(getattr(need.rows, "given", None), "what", "")) for need in asked)
        moved = _blocks(p, block, h, x, out, runs) if told else ((None, None), (None, None))  # the layer's own, not made again
        ask_here = lambda need, x=x: ev.answer(need, call, part, hidden=x, k_raw=k, groups=groups, evidence=evidence,  # noqa: E731
                                               blocks=lambda: moved)  # fmt: skip
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
        x = B.residual(p, block, 1, x, moved[0][1]) if told else B.attention_residual(p, block, x, out)
        if whole_layers:
            x = _close(p, program, arrays, here, x, runs, dataclasses.replace(ctx, x=h, hidden=x), moved[1][1])
        ys = (pending, {name: s.layer for name, s in here.items()}, aux, seen)
        return (x, shared, {name: s.shared for name, s in here.items()}, found), ys

    inputs = (jnp.arange(a, b), params["layers"] if whole else None)
    found = {}
    if needs:
        found = _blank_evidence(needs, program, streams, evidence)
    carry = (streams.x, shared, carry_states, found)
    step_fn = jax.checkpoint(body, prevent_cse=False) if program.remat and phase == "train" else body
    (x, shared, carried, found), (pending, new_layer, aux, seen) = lax.scan(step_fn, carry, inputs)
    carried |= {name: states[name].shared for name in handed}
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


def _behind(meta):
    """int32 [B]: how far the last rotary position is behind the last place."""
    rope = meta.rope if meta.rope.ndim == 2 else meta.rope.max(-1)
    last, turned = (jnp.max(jnp.where(meta.valid, x, 0), axis=1) for x in (meta.pos, rope))
    return last - turned


def _shifted(streams: Streams, given, shift) -> Streams:
    """New rows, whose rotary positions were ``given``, in a segment whose prompt was renumbered: they go on behind it."""
    meta = streams.meta
    rope = given if shift is None else (meta.pos if given is None else given) - shift[:, None]
    return streams.replace(meta=meta.replace(rope=rope))


def _blocks(p, block, h, x, out, runs):
    """((normalised input, output), ...) of the attention and the feed-forward sub-block."""
    return (h, B.attention_output(p, block, x, out)), B.mlp_output(p, block, B.attention_residual(p, block, x, out), runs)


def _close(p, program, arrays, here, x, runs, ctx, added=None):
    """The feed-forward sub-block (``added``: its output, where it is known), and what methods make of a layer's output."""
    x = B.mlp_residual(p, program.block, x, runs) if added is None else B.residual(p, program.block, 2, x, added)
    for i, steer in enumerate(program.steering):
        if callable(getattr(steer, "hidden", None)):
            x = steer.hidden(params_of(arrays, f"steering.{i}"), here[f"steering.{i}"], x, ctx)
    return x


def _feed_forward(params, program, arrays, streams, states, layer: int, **where) -> Streams:
    """What is left of a layer behind a cut inside it."""
    groups = streams.spans()
    spec = program.block.spec(program.layers, batch=streams.x.shape[0], dtype=streams.x.dtype.name)
    ctx = Ctx(layer=jnp.int32(layer), site=program.site, spec=spec, hidden=streams.x, groups=_spans(groups), **where)
    here = {name: State(B.layer_of(s.layer, layer), s.shared) for name, s in states.items()}
    p = B.layer_of(params["layers"], layer)
    return streams.replace(x=_close(p, program, arrays, here, streams.x, _neurons(program, groups), ctx))


def _spans(groups: dict) -> tuple:
    return tuple((name, *span) for name, span in groups.items())


def _neurons(program, groups: dict) -> tuple:
    """Runs of rows (see ``block.mlp_output``) where methods spare neurons; () where every row uses all."""
    hidden = program.block.hidden
    ask = [s.neurons for s in program.steering if hasattr(s, "neurons")]
    runs = tuple((a, b, min([hidden, *(f(name, hidden) for f in ask)])) for name, (a, b) in groups.items())
    return runs if any(n < hidden for _, _, n in runs) else ()


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
    return {**arrays["operands"].get(name, {}), **B.layer_of(arrays.get("trained", {}).get(name, {}), layer)}


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


__all__ = ["CacheStack", "StackOut", "Streams", "init_states", "run", "streams_of", "transform"]
