"""Prompts whose image leaves the language model at a layer that only the pass itself finds: the host splits the program.

A cut that removes all image tokens or none (``exits``: ``tokens.dyvte``) ends a compiled program; the host looks at its
verdict, and the layers behind it run with image rows or without them. Where masks of one program hide image rows, here they
are not there: neither in the arrays nor in the caches of later layers.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxattn.core.types import Array, data, expect, split
from jaxattn.nn.block import norm
from models import cuts, sampling, stack
from models.bind import Bound, Program, subset
from models.caches import join_caches
from models.generate import prompt_meta, ready
from models.multimodal import vlm
from models.rows import Streams


@data
class _Walk:
    """Where a prompt is: its rows, socket states, evidence so far, the caches of the layers just run, and whether no image
    row is left."""

    streams: Streams
    states: dict
    evidence: dict
    caches: tuple
    gone: Array


def gates(program: Program) -> tuple:
    """The cuts of the language model at which a host may split."""
    return tuple(c for c in program.stack("llm").cuts if getattr(c.transform, "exits", False))


def without(streams: Streams, name: str) -> Streams:
    """The rows of all groups but one."""
    start, stop = streams.span(name)
    rest = lambda a: jnp.concatenate([a[:, :start], a[:, stop:]], 1)  # noqa: E731
    slots = {group: slot for group, slot in streams.slots.items() if group != name}
    return Streams(rest(streams.x), jax.tree.map(rest, streams.meta), slots, tuple(g for g in streams.groups if g[0] != name))


def _judged(bound: Bound, out: stack.StackOut, stop: int, key) -> _Walk:
    """Behind a run of layers: the cut in front of layer ``stop``, if there is one."""
    program, arrays, params = bound
    mine = program.stack("llm")
    streams, gone = out.streams, jnp.zeros((), bool)
    for gate in gates(program):
        if gate.layer == stop:
            streams = cuts.cut(params["llm"], mine, subset(arrays, "llm"), streams, gate, out.evidence, {}, mask=None, step=0,
                               key=key, phase="prefill")[0]  # fmt: skip
            gone = ~streams.tokens("vision").meta.valid.any()
    return _Walk(streams, out.states, out.evidence, out.caches, gone)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("stop", "new_rows", "dtype"))
def _first(program, arrays, params, tokens, image, lengths, key, image_at, *, stop, new_rows, dtype) -> _Walk:
    bound = Bound(program, arrays, params)
    meta = vlm.around_image(program.config, prompt_meta(lengths, tokens.shape[1]), image_at)
    out, _ = vlm.forward(bound, image, tokens, meta=meta, phase="prefill", dtype=dtype, key=key, image_at=image_at, stop=stop,
                         new_rows=new_rows, logits=False)  # fmt: skip
    return _judged(bound, out.stack, stop, key)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("start", "stop", "image", "new_rows"))
def _next(program, arrays, params, walk, key, *, start, stop, image, new_rows) -> _Walk:
    bound = Bound(program, arrays, params)
    streams = walk.streams if image else without(walk.streams, "vision")
    # Without image rows nothing is left to cut.
    mine = program.stack("llm") if image else dataclasses.replace(program.stack("llm"), cuts=(), needs=())
    out = stack.run(params["llm"], mine, subset(arrays, "llm"), streams, phase="prefill", start=start, stop=stop,
                    states=walk.states, evidence=walk.evidence, key=key, new_rows=new_rows)  # fmt: skip
    if image:
        return _judged(bound, out, stop, key)
    return _Walk(out.streams, out.states, out.evidence, out.caches, jnp.ones((), bool))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _last(program, sampler, arrays, params, sampler_params, walk, caches, lengths, after, key):
    rows = walk.streams.tokens("text").x
    rows = jnp.take_along_axis(rows, (lengths - 1)[:, None, None], axis=1)
    hidden = norm(params["llm"]["norm"], program.config.llm.block, rows)
    return ready(Bound(program, arrays, params), hidden, after, caches, walk.states, sampler, sampler_params, key)


def prefill_exits(bound: Bound, tokens: Array, *, image, max_new: int, lengths=None, image_at=None, sampler=None, key=None,
                  dtype=None):  # fmt: skip
    """``generate.prefill`` of a vision-language model with an exit bound to "llm", split where it may leave.

    tokens int32 [B, T]; image [B, H, W, ch]; lengths, image_at as there. A batch goes on with image rows until none of its
    images needs them: one prompt at a time saves most.
    Returns: (logits [B, V], Decoding, the number of layers that read image rows).
    """
    program, arrays, params = bound
    expect("bound", type(program.config).__name__, "a vision-language model", isinstance(program.config, vlm.VLMConfig))
    places = sorted({gate.layer for gate in gates(program)})
    expect("reduce", "no exit", "a method at 'llm' whose cuts remove all image rows or none, e.g. dyvte", bool(places))
    expect("cache", None, "a policy bound to the model", program.stack("llm").cache is not None)
    depth = program.stack("llm").layers
    tokens = jnp.asarray(tokens, jnp.int32)
    lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    key = jax.random.key(0) if key is None else key
    walk = _first(program, arrays, params, tokens, image, lengths, key, image_at, stop=places[0], new_rows=max_new, dtype=dtype)
    caches, at, read = [*walk.caches], places[0], depth
    while at < depth:
        if bool(walk.gone) and read == depth:
            read = at
        ahead = [p for p in places if p > at] if read == depth else []
        stop = ahead[0] if ahead else depth
        walk = _next(program, arrays, params, walk, key, start=at, stop=stop, image=read == depth, new_rows=max_new)
        caches, at = [*caches, *walk.caches], stop
    sampler, sampler_params = split(sampling.greedy() if sampler is None else sampler)
    after = program.config.visual + lengths
    caches = tuple(join_caches(caches))
    return *_last(program, sampler, arrays, params, sampler_params, walk, caches, lengths, after, key), read


__all__ = ["gates", "prefill_exits", "without"]
