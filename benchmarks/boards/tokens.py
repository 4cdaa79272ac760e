"""Token methods on a trained scene model: each method at each budget over the same held-out scenes.

    entries, _ = budgets.plan(("full", "random", "hiprune"), (72, 36), model)
    results = measure(entries, model, params, dataset, scenes=2000, batch=50)

One compiled program per entry answers all questions of a batch of images: its predictions are scored and its time is
taken in the same call. Every batch goes through all programs in turn, in another order each time, so that whatever
else the machine does hits all alike; times are compared within a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.boards.budgets import Entry
from benchmarks.boards.cost import array_bytes, matmul_flops
from jaxattn.core.types import expect
from jaxattn.tokens.mmtok import content_mask
from models.bind import Bound
from models.generate import generate, prefill
from models.language import llm
from models.multimodal import vlm
from train import scenes
from train.data import Batches
from train.data.questions import KINDS, Vocabulary
from train.data.scenes import BACKGROUND

UNFAIR = ("count_all", "count_of")  # answered from the share of digits among the tokens, which every selection changes
RANKED = tuple(kind for kind in KINDS if kind not in UNFAIR)
PROMPT, NEW = "read all digits ?", 7


# ---------------------------------------------------------------------------------------------------------- measuring
@dataclasses.dataclass(frozen=True)
class Result:
    """An entry's figures.

    scores: of ``train.scenes.scores``; kept: share of the digits' patches that are left, None where tokens merge; mixed:
    share of them averaged with patches of another digit or of none, None where tokens do not merge; seconds of each batch
    of ``batch`` images; flops and cache (bytes) of one image; slot: int32 [batch, N], the row that carries each patch of
    the first batch into the language model, -1 none.
    """

    entry: Entry
    scores: Mapping[str, Any]
    kept: float | None
    mixed: float | None
    seconds: np.ndarray
    flops: float
    cache: int
    batch: int
    compile_seconds: float
    slot: np.ndarray

    @property
    def mean(self) -> float:
        """Mean accuracy of the kinds of questions that are fair to compare."""
        return float(np.mean([self.scores["accuracy"][kind] for kind in RANKED]))


@functools.partial(jax.jit, static_argnums=0)
def answer(program, arrays, params, batch, key):
    """(words predicted int32 [B, Q], where patches went int32 [B, N] in front of the language model and at its end, visual
    rows int32 [B, 2] at both places) of packed questions."""
    bound = Bound(program, arrays, params)
    meta, mask = vlm.question_meta(program.config, batch)
    text = llm.embed(params["llm"], program.config.llm, batch["tokens"])
    asked = (text, meta.valid & batch["content"])
    visual = vlm.see(bound, batch["image"], prompt=asked, phase="prefill", key=key)
    out, _ = vlm.forward(bound, batch["image"], batch["tokens"], meta=meta, mask=mask, phase="prefill", visual=visual)
    b, q, t = batch["questions"].shape
    last = out.stack.streams.tokens("vision")
    live = jnp.stack([jnp.broadcast_to(m.valid, (b, m.valid.shape[-1])).sum(-1) for m in (visual.meta, last.meta)], -1)
    return out.logits.reshape(b, q, t, -1)[:, :, -1].argmax(-1), visual.slot, last.slot, live


def question_batches(dataset: Batches, count: int, size: int) -> Iterator[dict[str, np.ndarray]]:
    """``count`` scenes in batches of ``size``, with the words that name something marked as "content"."""
    words = dataset.info["vocabulary"].words
    content = np.array([m and any(c.isalnum() for c in w) for w, m in zip(words, content_mask(words), strict=True)])
    for start in range(0, count, size):
        batch = dataset.fetch(np.arange(start, start + size))
        yield {**batch, "content": content[batch["tokens"]]}


def measure(entries: Sequence[Entry], model: vlm.VLMConfig, params: dict, dataset: Batches, *, scenes_count: int, size: int,
            say: Callable[[str], None] = print) -> list[Result]:  # fmt: skip
    """Results in the order of ``entries``, over the first ``scenes_count`` scenes in batches of ``size``."""
    fits = 0 < scenes_count <= dataset.size and scenes_count % size == 0
    expect("scenes", scenes_count, f"a multiple of the batch of {size}, at most {dataset.size}", fits)
    entries = tuple(entries)
    bounds = [vlm.bind(model, params, reduce=dict(e.reduce)) for e in entries]
    first = _inputs(next(question_batches(dataset, size, size)))
    programs, compiled, flops = [], [], []
    for i, (e, bound) in enumerate(zip(entries, bounds, strict=True), 1):
        began = time.perf_counter()
        args = (bound.arrays, bound.params, first, jax.random.key(0))
        flops.append(matmul_flops(functools.partial(answer, bound.program), *args) / size)
        program = answer.lower(bound.program, *args).compile()
        jax.block_until_ready(program(*args))
        programs.append(program)
        compiled.append(time.perf_counter() - began)
        say(f"  compiled {i}/{len(entries)}  {e.label}  {compiled[-1]:.1f} s")

    predicted, kept, seconds, slots, truth = ([[] for _ in entries] for _ in range(5))
    rounds, began = scenes_count // size, time.perf_counter()
    for number, batch in enumerate(question_batches(dataset, scenes_count, size)):
        inputs, key = jax.device_put(_inputs(batch)), jax.random.key(number)
        digit = batch["patch_labels"] != BACKGROUND
        for i in np.roll(np.arange(len(entries)), number):
            start = time.perf_counter()
            words, slot, *_ = jax.block_until_ready(programs[i](bounds[i].arrays, bounds[i].params, inputs, key))
            seconds[i].append(time.perf_counter() - start)
            predicted[i].append(np.asarray(words))
            slot = np.asarray(slot)
            kept[i].append((slot >= 0)[digit] if not entries[i].merges else averaged(slot, batch["patch_labels"])[digit])
            truth[i].append((batch["answers"], batch["kind"]))
            if number == 0:
                slots[i] = slot
        done = number + 1
        if done == rounds or done % max(1, rounds // 10) == 0:
            spent = time.perf_counter() - began
            say(f"  scored {done * size}/{scenes_count} scenes  {spent:.0f} s  left {spent / done * (rounds - done):.0f} s")
    results = []
    for i, e in enumerate(entries):
        answers, kind = (np.concatenate(x) for x in zip(*truth[i], strict=True))
        found = scenes.scores(np.concatenate(predicted[i]), answers, kind)
        share = float(np.concatenate(kept[i]).mean())
        share = (None, share) if e.merges else (share, None)
        cache = cache_bytes(e, model, params)
        results.append(Result(e, found, *share, np.array(seconds[i]), flops[i], cache, size, compiled[i], slots[i]))
    return results


def averaged(slot: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [B, N]: patches that share a row with patches of another label (``slot``, ``labels`` int [B, N])."""
    rows = slot + slot.shape[1] * np.arange(len(slot))[:, None]
    least, most = np.full(slot.size, labels.max()), np.full(slot.size, labels.min())
    live = slot >= 0
    np.minimum.at(least, rows[live], labels[live])
    np.maximum.at(most, rows[live], labels[live])
    return live & (least[rows] != most[rows])


def _inputs(batch: dict) -> dict:
    return {name: batch[name] for name in ("image", "tokens", "segment", "position", "questions", "content")}


def slowdown(result: Result, full: Result) -> float:
    """Median over the batches of the time, as a share of the full model's on the same batch."""
    return float(np.median(result.seconds / full.seconds))


# --------------------------------------------------------------------------------------------------------- generation
def prompt(vocabulary: Vocabulary, count: int, text: str = PROMPT) -> jax.Array:
    """int32 [count, words] of one question."""
    return jnp.broadcast_to(jnp.asarray(vocabulary.encode(text)), (count, len(text.split())))


def cache_bytes(e: Entry, model: vlm.VLMConfig, params: dict) -> int:
    """Bytes of the cache of one image, a prompt of 4 words and ``NEW`` new ones."""
    bound = vlm.bind(model, params, reduce=dict(e.reduce), cache="full")
    shape = jax.ShapeDtypeStruct((1, *model.vision.image, model.vision.channels), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, len(PROMPT.split())), jnp.int32)
    fill = lambda image, tokens: prefill(bound, tokens, image=image, max_new=NEW)[1].caches  # noqa: E731
    return array_bytes(jax.eval_shape(fill, shape, tokens))


def read(e: Entry, model: vlm.VLMConfig, params: dict, vocabulary: Vocabulary, images: np.ndarray) -> list[list[str]]:
    """The words generated behind ``PROMPT`` for each image [B, H, W, ch], up to "end"."""
    bound = vlm.bind(model, params, reduce=dict(e.reduce), cache="full")
    end = vocabulary.ids["end"]
    tokens = prompt(vocabulary, len(images))
    rows = np.asarray(generate(bound, tokens, steps=NEW, image=jnp.asarray(images), stop=end))
    return [vocabulary.decode(row).removesuffix("end").split() for row in rows]
