"""Generation: prefill once, then one jitted step per token, with whatever sockets the model is bound to.

Prompts of a batch may differ in length (right-padded); caches are donated from step to step; a reduction inside the stack
leaves later layers with shorter caches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.types import Array, Ctx, Meta, data, expect, split
from models import sampling, stack
from models.bind import Bound, Program, subset
from models.language import llm
from models.multimodal import vlm
from models.multimodal.pictures import Pictures


@data
class Decoding:
    """Everything between two steps: token int32 [B] to feed next, its position [B], caches, socket states, done [B]."""

    token: Array
    pos: Array
    caches: tuple
    states: dict
    sampler: object
    done: Array
    step: Array
    key: Array


def language(program: Program):
    """(language model configuration, its weights' selector) of an LLM or a VLM program."""
    c = program.config
    return (c.llm, lambda p: p["llm"]) if isinstance(c, vlm.VLMConfig) else (c, lambda p: p)


def is_paired(program: Program) -> bool:
    return any(getattr(s, "paired", False) for s in program.stack("llm").steering)


def prefill(bound: Bound, tokens: Array, *, image=None, lengths=None, max_new: int, sampler=None, sampler_params=None,
            key=None, dtype=None, image_at=None) -> tuple[Array, Decoding]:  # fmt: skip
    """Read the prompt; returns (logits [B, V] behind its last token, Decoding with the first new token sampled).

    tokens int32 [B, T] right-padded; lengths int32 [B] or None (all T); image [B, H, W, ch] for a vision-language model,
    behind the first ``image_at`` (int or int32 [B]) tokens of each prompt (None: in front), or Pictures, which know their
    places.
    """
    program, arrays, params = bound
    sampler = sampling.greedy() if sampler is None else sampler
    language_stack = program.stack("llm")
    stateful = all(getattr(a, "recurrent", False) for a in language_stack.attention)
    expect("cache", None, "a policy bound to the model, e.g. bind(model, cache=cache.full())",
           language_stack.cache is not None or stateful)  # fmt: skip
    b, t = tokens.shape
    lengths = jnp.full(b, t, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    key = jax.random.key(0) if key is None else key
    paired = is_paired(program)
    twice = (lambda x: jnp.concatenate([x, x])) if paired else (lambda x: x)
    if isinstance(program.config, vlm.VLMConfig):
        expect("image", None, "an image per prompt, or Pictures", image is not None)
        meta = prompt_meta(lengths, t)
        if isinstance(image, Pictures):
            expect("image.text", f"shape {image.text.shape}", f"one place for each of the tokens, {(b, t)}",
                   image.text.shape == (b, t))  # fmt: skip
            meta, after = image.text_meta(meta), image.after(lengths)
        else:
            meta, after = vlm.around_image(program.config, meta, image_at), program.config.visual + lengths
        text = llm.embed(params["llm"], program.config.llm, tokens, dtype)
        visual = vlm.see(bound, image, prompt=(text, meta.valid), dtype=dtype, key=key)
        if paired:  # the second half of the batch reads the same prompt without the image
            visual = jax.tree.map(twice, visual.replace(tower=None, meta=_whole(visual.meta, visual.x)))
            unseen = lambda m: m.replace(valid=m.valid & (jnp.arange(2 * b) < b)[:, None])  # noqa: E731
            ends = visual.newlines
            ends = None if ends is None else ends.replace(meta=unseen(ends.meta))
            visual = visual.replace(meta=unseen(visual.meta), newlines=ends)
        out, _ = vlm.forward(bound, image, twice(tokens), meta=jax.tree.map(twice, meta), phase="prefill", dtype=dtype,
                             visual=visual, key=key, new_rows=max_new, image_at=_for_all(image_at, b, twice),
                             logits=False)  # fmt: skip
    else:
        after = lengths
        expect("steering", "a paired method", "one that needs no image in a language model", not paired)
        meta = prompt_meta(lengths, t)
        out = llm.forward(bound, tokens, meta=meta, phase="prefill", dtype=dtype, key=key, new_rows=max_new, logits=False)
    hidden = jnp.take_along_axis(out.hidden[:b], (lengths - 1)[:, None, None], axis=1)
    return ready(bound, hidden, after, out.stack.caches, out.stack.states, sampler, sampler_params, key)


def ready(bound: Bound, hidden: Array, after: Array, caches, states, sampler, sampler_params, key) -> tuple[Array, Decoding]:
    """What ``prefill`` returns, from the last row of each prompt behind the last norm [B, 1, C] and the position behind it."""
    c, weights = language(bound.program)
    last = llm.head(weights(bound.params), c, hidden)[:, 0]  # of one row: a vocabulary wide for the whole prompt is much
    b = hidden.shape[0]
    state = Decoding(jnp.zeros(b, jnp.int32), after, caches, states, sampling.fresh(sampler), jnp.zeros(b, bool), jnp.int32(0),
                     key)  # fmt: skip
    return last, _sample(sampler, sampler_params or {}, state, last, hidden[:, 0])


def _whole(meta: Meta, x) -> Meta:
    """Meta with a batch as long as that of its rows x [B, N, C]."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (x.shape[0], *a.shape[1:])), meta)


def _for_all(image_at, b: int, twice):
    return None if image_at is None else twice(jnp.broadcast_to(jnp.asarray(image_at, jnp.int32), (b,)))


def prompt_meta(lengths, t: int) -> Meta:
    pos = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (lengths.shape[0], t))
    return Meta(pos, jnp.arange(t) < lengths[:, None], labels={"kind": jnp.zeros(pos.shape, jnp.int32)})


def _sample(sampler, params, state: Decoding, logits, hidden, stop=None) -> Decoding:
    ctx = Ctx(step=state.step, key=jax.random.fold_in(state.key, state.step), phase="decode", site="llm")
    token, sampler_state, done = sampler.step(params, state.sampler, logits, hidden, ctx)
    done = state.done | done
    if stop is not None:
        done = done | (token == stop)
    return state.replace(token=token, sampler=sampler_state, done=done)


def decode(bound: Bound, state: Decoding, *, sampler=None, sampler_params=None, stop=None,
           dtype=None) -> tuple[Array, Decoding]:  # fmt: skip
    """Feed ``state.token``; returns (logits [B, V], the next Decoding). Pure: jit it with the caches donated."""
    program, arrays, params = bound
    sampler = sampling.greedy() if sampler is None else sampler
    c, weights = language(program)
    twice = (lambda x: jnp.concatenate([x, x])) if is_paired(program) else (lambda x: x)
    b = state.token.shape[0]
    token, pos = twice(state.token), twice(state.pos)
    meta = Meta(pos[:, None], jnp.ones((pos.shape[0], 1), bool), labels={"kind": jnp.zeros((pos.shape[0], 1), jnp.int32)})
    streams = stack.streams_of({"text": (llm.embed(weights(params), c, token[:, None], dtype), meta)})
    out = stack.run(weights(params), program.stack("llm"), subset(arrays, "llm"), streams, phase="decode", caches=state.caches,
                    states=state.states, step=state.step + 1)  # fmt: skip
    done = llm.finish(bound, out, params=weights(params), c=c)
    logits = done.logits[:b, 0]
    state = state.replace(pos=state.pos + 1, caches=out.caches, states=out.states, step=state.step + 1)
    return logits, _sample(sampler, sampler_params or {}, state, logits, done.hidden[:b, 0], stop)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("max_new", "dtype"))
def _start(program, sampler, arrays, params, sampler_params, tokens, image, lengths, key, image_at, *, max_new,
           dtype):  # fmt: skip
    return prefill(Bound(program, arrays, params), tokens, image=image, lengths=lengths, max_new=max_new, sampler=sampler,
                   sampler_params=sampler_params, key=key, dtype=dtype, image_at=image_at)  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("dtype",), donate_argnums=(5,))
def _step(program, sampler, arrays, params, sampler_params, state, stop, *, dtype):
    return decode(Bound(program, arrays, params), state, sampler=sampler, sampler_params=sampler_params, stop=stop, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("steps", "dtype"), donate_argnums=(5,))
def _steps(program, sampler, arrays, params, sampler_params, state, stop, pad, *, steps, dtype):
    bound = Bound(program, arrays, params)

    def one(carry, _):
        state, over = carry
        _, after = decode(bound, state, sampler=sampler, sampler_params=sampler_params, stop=stop, dtype=dtype)
        return (after, state.done), jnp.where(over, pad, state.token)

    (state, over), tokens = jax.lax.scan(one, (state, jnp.zeros_like(state.done)), None, length=steps - 1)
    last = jnp.where(over, pad, state.token)
    return jnp.concatenate([jnp.moveaxis(tokens, 0, 1), last[:, None]], 1), state


def generate(bound: Bound, tokens, *, steps: int, image=None, lengths=None, sampler=None, stop: int | None = None, pad: int = 0,
             key=None, dtype=None, image_at=None) -> Array:  # fmt: skip
    """New tokens int32 [B, steps]; rows that met ``stop`` are filled with ``pad`` behind it.

    Args:
      tokens: int32 [B, T] prompts, right-padded.  lengths: int32 [B] or None.  image: [B, H, W, ch], or Pictures, for a VLM.
      image_at: int or int32 [B], tokens of each prompt that come before the image; None: all follow it.
      sampler: ``sampling.greedy()`` (default) or ``sampling.sample(...)``.
    """
    expect("steps", steps, "at least 1", steps >= 1)
    if _turning(bound.program, tokens, lengths, steps):
        found = list(stream(bound, tokens, steps=steps, lengths=lengths, sampler=sampler, stop=stop, pad=pad, key=key,
                            dtype=dtype))  # fmt: skip
        found += [jnp.full_like(found[0], pad)] * (steps - len(found))
        return jnp.stack(found, 1)
    program, state, sampler, params = _begin(bound, tokens, steps, image, lengths, sampler, stop, key, dtype, image_at)
    stop = jnp.int32(-1 if stop is None else stop)
    new, _ = _steps(program, sampler, bound.arrays, bound.params, params, state, stop, jnp.int32(pad), steps=steps, dtype=dtype)
    return new


def stream(bound: Bound, tokens, *, steps: int, image=None, lengths=None, sampler=None, stop: int | None = None, pad: int = 0,
           key=None, dtype=None, image_at=None) -> Iterator[Array]:  # fmt: skip
    """Like ``generate``, token by token: yields int32 [B]; ends early once every row is done."""
    expect("steps", steps, "at least 1", steps >= 1)
    if first := _turning(bound.program, tokens, lengths, steps):
        rest = dict(sampler=sampler, stop=stop, pad=pad, dtype=dtype)
        said = []
        for new in stream(bound, tokens, steps=first, lengths=lengths, key=key, **rest):
            said.append(new)
            yield new
        over = jnp.zeros(len(new), bool) if stop is None else (jnp.stack(said) == stop).any(0)
        if len(said) < first or bool(over.all()):
            return
        tokens, lengths = _behind(tokens, lengths, jnp.stack(said, 1))
        key = None if key is None else jax.random.fold_in(key, first)
        for new in stream(bound, tokens, steps=steps - first, lengths=lengths, key=key, **rest):
            yield jnp.where(over, pad, new)
        return
    program, state, sampler, params = _begin(bound, tokens, steps, image, lengths, sampler, stop, key, dtype, image_at)
    stop = jnp.int32(-1 if stop is None else stop)
    over = jnp.zeros(state.done.shape, bool)
    for i in range(steps):
        emitted, over = jnp.where(over, pad, state.token), jnp.copy(state.done)  # the next step overwrites the state
        yield emitted
        if i + 1 == steps or bool(over.all()):
            return
        _, state = _step(program, sampler, bound.arrays, bound.params, params, state, stop, dtype=dtype)


def _turning(program: Program, tokens, lengths, steps: int) -> int:
    """New tokens after which the longest row of a model with longrope outgrows the length it was trained for; 0: it does not.
    Its frequencies are others from there on, for every row before as well, so the texts are read again."""
    rope = language(program)[0].block.rope
    if rope is None or rope.scaling is None or rope.scaling.kind != "longrope":
        return 0
    left = rope.scaling.original_length + 1 - (np.shape(tokens)[1] if lengths is None else int(np.max(lengths)))
    return left if 0 < left < steps else 0


def _behind(tokens, lengths, new):
    """(prompts [B, T + n] with the n new tokens behind them, right-padded; their lengths)."""
    (b, t), n = tokens.shape, new.shape[1]
    lengths = np.full(b, t) if lengths is None else np.asarray(lengths)
    longer = np.pad(np.asarray(tokens), [(0, 0), (0, n)])
    longer[np.arange(b)[:, None], lengths[:, None] + np.arange(n)] = new
    return longer, lengths + n


def _begin(bound, tokens, steps, image, lengths, sampler, stop, key, dtype, image_at):
    tokens = jnp.asarray(tokens, jnp.int32)
    expect("tokens", f"shape {tokens.shape}", "[batch, prompt tokens], at least one each",
           tokens.ndim == 2 and tokens.size > 0)  # fmt: skip
    if lengths is not None:
        lengths = np.asarray(lengths, np.int32)
        expect("lengths", lengths.tolist(), f"{tokens.shape[0]} numbers between 1 and {tokens.shape[1]}",
               lengths.shape == tokens.shape[:1] and lengths.min() >= 1 and lengths.max() <= tokens.shape[1])  # fmt: skip
    sampler, params = split(sampling.greedy() if sampler is None else sampler)
    key = jax.random.key(0) if key is None else key
    _, state = _start(bound.program, sampler, bound.arrays, bound.params, params, tokens, image, lengths, key, image_at,
                      max_new=steps, dtype=dtype)  # fmt: skip
    if stop is not None:
        state = state.replace(done=state.done | (state.token == stop))
    return bound.program, state, sampler, params


__all__ = ["Decoding", "decode", "generate", "prefill", "stream"]
