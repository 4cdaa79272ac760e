"""Entries on digit scenes: one compiled program for all checkpoints of a model, what it answers and what it costs."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.boards import latency
from benchmarks.boards.budgets import FULL, Entry, Unfit
from benchmarks.boards.cost import array_bytes, matmul_flops
from benchmarks.boards.outcomes import Exam, Outcome, Store, entry_key
from benchmarks.boards.tokens import NEW, PROMPT, RANKED, answer, averaged, question_batches
from models.generate import decode, prefill
from models.multimodal import vlm
from train.data import Batches
from train.data.questions import KINDS
from train.data.scenes import BACKGROUND
from train.scenes import MIX
from train.tasks import with_params

INPUTS = ("image", "tokens", "segment", "position", "questions", "content")


def exam_of(batches: Sequence[Mapping[str, np.ndarray]], yes: int, no: int) -> Exam:
    """Columns: the kinds of questions, then presence split by its answer (``yes`` and ``no``: those words' ids)."""
    kind, answers = (np.concatenate([b[name] for b in batches]) for name in ("kind", "answers"))
    presence = kind == KINDS.index("presence")
    member = [kind == number for number in range(len(KINDS))] + [presence & (answers == word) for word in (yes, no)]
    return Exam((*KINDS, "yes", "no"), RANKED, np.stack(member))


def batches_of(dataset: Batches, count: int, size: int) -> list[dict[str, np.ndarray]]:
    return list(question_batches(dataset, count, size))


class Compiled(NamedTuple):
    """A program for the batches' shape; ``run(params, batch, number)``; flops of one image."""

    run: Callable[[Any, Any, int], tuple]
    flops: float


def compiled(e: Entry, model: vlm.VLMConfig, params: Any, batch: Mapping[str, np.ndarray]) -> Compiled:
    """The entry's program. Raises ValueError where the method refuses the model."""
    bound = vlm.bind(model, None, reduce=dict(e.reduce))
    first = {name: batch[name] for name in INPUTS}
    ready = with_params(bound, params)
    args = (ready.arrays, ready.params, first, jax.random.key(0))
    flops = matmul_flops(functools.partial(answer, bound.program), *args) / len(first["image"])
    program = answer.lower(bound.program, *args).compile()

    def run(params, batch, number):
        ready = with_params(bound, params)
        return program(ready.arrays, ready.params, {name: batch[name] for name in INPUTS}, jax.random.key(number))

    return Compiled(run, flops)


def examine(e: Entry, program: Compiled, params: Any, batches: Sequence[Mapping[str, np.ndarray]], show: int) -> Outcome:
    """Every batch answered with one checkpoint's parameters. show: images whose slots are kept."""
    inside = any(site.startswith("llm") for site, _ in e.reduce) and e.layers[-1] > 0
    right, slots, rows = [], [], []
    for number, batch in enumerate(batches):
        words, before, behind, live = (np.asarray(x) for x in program.run(params, batch, number))
        right.append(words == batch["answers"])
        slots.append(behind if inside else before)
        rows.append(live)
    slot, labels = np.concatenate(slots), np.concatenate([b["patch_labels"] for b in batches])
    digit, (entered, left) = labels != BACKGROUND, np.concatenate(rows).mean(0)
    mixed = averaged(slot, labels)
    merged = bool(mixed.any()) or _shared(slot)
    return Outcome(np.concatenate(right), float((slot >= 0)[digit].mean()), float(mixed[digit].mean()), merged,
                   (float(entered), float(left)), slot[:show])  # fmt: skip


def _shared(slot: np.ndarray) -> bool:
    """Whether some row carries two patches."""
    for row in slot[:1]:
        rows = row[row >= 0]
        if len(np.unique(rows)) < len(rows):
            return True
    return False


# ------------------------------------------------------------------------------------------------------------ decoding
def decoding(e: Entry, model: vlm.VLMConfig, params: Any, size: int):
    """Shapes of what lies between two steps, after a prompt of 4 words and an image each for ``size`` rows."""
    bound = vlm.bind(model, params, reduce=dict(e.reduce), cache="full")
    image = jax.ShapeDtypeStruct((size, *model.vision.image, model.vision.channels), jnp.float32)
    tokens = jax.ShapeDtypeStruct((size, len(PROMPT.split())), jnp.int32)
    return jax.eval_shape(lambda image, tokens: prefill(bound, tokens, image=image, max_new=NEW)[1], image, tokens)


def cache_bytes(shapes) -> int:
    """Of all rows of a batch."""
    return array_bytes(shapes.caches)


def step(model: vlm.VLMConfig, params: Any, shapes) -> Callable[[], object]:
    """A decoding step from a state of these shapes, ready to be timed: its time depends on nothing else."""

    def filled(s):
        if jnp.issubdtype(s.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.ones(s.shape, s.dtype) if s.dtype == bool else jnp.zeros(s.shape, s.dtype)

    state = jax.tree.map(filled, shapes)
    bound = vlm.bind(model, params, cache="full")
    program = jax.jit(lambda params, state: decode(bound._replace(params=params), state))
    return lambda: program(params, state)


# ------------------------------------------------------------------------------------------------------------ the work
GROUP = latency.GROUP
QUESTIONS = sum(n for _, n in MIX)  # of a scene


class Board:
    """All entries on all checkpoints, through a store: what is there is not done again.

    checkpoints: (name, what identifies it, parameters).  rounds: timed runs; 0 times nothing.  show: images whose slots stay.
    runs: {(method, checkpoint's name): run} of methods that were trained from a checkpoint (``boards.trained``).
    """

    def __init__(self, model, checkpoints, batches, store: Store, rounds: int, show: int, say: Callable[[str], None],
                 runs: Mapping[tuple[str, str], Any] | None = None):  # fmt: skip
        self.model, self.checkpoints, self.batches, self.store = model, checkpoints, batches, store
        self.rounds, self.show, self.say, self.runs = rounds, show, say, runs or {}
        self.params = checkpoints[0][2]
        self.size = len(batches[0]["image"])
        self.images = self.size * len(batches)
        self.device = f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}"
        self.steps: dict[str, Callable[[], object]] = {}
        self.full: Compiled | None = None

    def asked(self, e: Entry) -> list[tuple[str, str, Any]]:
        """The checkpoints that answer an entry: all, or the runs of a trained method in their place."""
        if not any(method == e.method for method, _ in self.runs):
            return list(self.checkpoints)
        return [(c[0], run.identity, run.params) for c in self.checkpoints if (run := self.runs.get((e.method, c[0])))]

    def answer_key(self, e: Entry, name: str, identity: str) -> dict[str, Any]:
        together = self.batches[0]["questions"].shape[1]
        other = {} if together == QUESTIONS else {"questions": together}
        return {"what": "answers", **entry_key(e), "checkpoint": name, "identity": identity, "images": self.images,
                "batch": self.size, "show": self.show, **other}  # fmt: skip

    def cost_key(self, e: Entry) -> dict[str, Any]:
        return {"what": "cost", **entry_key(e), "model": repr(self.model), "batch": self.size, "rounds": self.rounds,
                "device": self.device}  # fmt: skip

    def read(self, entries: Sequence[Entry]) -> tuple[dict, dict, list[Unfit]]:
        """What ``work`` returns, of what is there."""
        found, costs = {}, {}
        for e in entries:
            loaded = {name: self.store.load(self.answer_key(e, name, identity)) for name, identity, _ in self.asked(e)}
            found |= {(e.label, name): Outcome.of_json(x) for name, x in loaded.items() if x is not None}
            cost = self.store.load(self.cost_key(e))
            if cost is not None:
                costs[e.label] = cost
        return found, costs, []

    def work(self, entries: Sequence[Entry]) -> tuple[dict, dict, list[Unfit]]:
        """(outcomes by (label, checkpoint), costs by label, what the model refused)."""
        from benchmarks.tokens import Progress

        found, costs, refused = self.read(entries)
        group, progress = [], Progress(len(entries))
        for e in entries:
            missing = [c for c in self.asked(e) if (e.label, c[0]) not in found]
            if not missing and e.label in costs:
                progress(f"{e.label}  kept from before")
                continue
            try:
                program = compiled(e, self.model, self.params, self.batches[0])
                for name, identity, params in missing:
                    outcome = examine(e, program, params, self.batches, self.show)
                    self.store.save(self.answer_key(e, name, identity), outcome.as_json())
                    found[e.label, name] = outcome
            except ValueError as error:
                refused.append(Unfit(e.method, e.budget, str(error).splitlines()[0]))
                progress(f"{e.label}  refused: {refused[-1].reason}")
                continue
            if e.method == FULL:
                self.full = program
            if e.label not in costs:
                group.append((e, program))
            if len(group) == GROUP:
                costs |= self.timed(group)
                group = []
                self.let_go()
            progress(e.label)
        return found, costs | self.timed(group), refused

    def let_go(self) -> None:
        """Programs that are done: each holds hundreds of memory maps, of which Linux allows a process 65,530 by default."""
        self.steps.clear()
        jax.clear_caches()
        gc.collect()

    def timed(self, group: Sequence[tuple[Entry, Compiled]]) -> dict[str, dict[str, Any]]:
        """Costs of a group of entries, timed in turns with the full model."""
        if not group:
            return {}
        shapes = {e.label: decoding(e, self.model, self.params, self.size) for e, _ in group}
        found = {e.label: {"flops": p.flops, "cache": cache_bytes(shapes[e.label]) / self.size, "prefill": None, "decode": None,
                           "batch": self.size} for e, p in group}  # fmt: skip
        if self.rounds:
            times = self.times(group, shapes)
            found = {label: {**x, **times[label]} for label, x in found.items()}
        for e, _ in group:
            self.store.save(self.cost_key(e), found[e.label])
        return found

    def times(self, group, shapes) -> dict[str, dict[str, Any]]:
        """Medians of the rounds, as shares of the full model's time in the same round."""
        whole = Entry(FULL, self.model.visual, (), (self.model.visual,) * self.model.llm.layers)
        self.full = self.full or compiled(whole, self.model, self.params, self.batches[0])
        call = lambda program: lambda: program.run(self.params, self.batches[0], 0)  # noqa: E731
        prefill = {e.label: call(p) for e, p in group}
        decode = {label: self.step(x) for label, x in shapes.items()}
        base = self.step(decoding(whole, self.model, self.params, self.size))
        before, at_full = latency.ratios(call(self.full), prefill, self.rounds)
        after, step_full = latency.ratios(base, decode, self.rounds, repeat=5)
        middle = {"full_prefill": float(np.median(at_full)), "full_decode": float(np.median(step_full))}
        return {label: {"prefill": float(np.median(before[label])), "decode": float(np.median(after[label])), **middle}
                for label in shapes}  # fmt: skip

    def step(self, shapes) -> Callable[[], object]:
        """One program per shape of the caches: entries with as many rows share it."""
        key = repr(jax.tree.map(lambda s: (s.shape, s.dtype), shapes))
        if key not in self.steps:
            self.steps[key] = step(self.model, self.params, shapes)
        return self.steps[key]
