"""The long board of token methods: every registered one, at five budgets, on several trained models of digit scenes, or on
one's own checkpoint and questions.

What each method answered is kept in <out>/results, a file per method, budget and checkpoint; the tables and pictures are made
of these files. A board that was stopped continues, and a method that is new is added.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.config import VLM


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Compare every token method at equal budgets: tables with intervals, pictures, and the figures as JSON."""

    methods: tuple[str, ...] = ()
    """Token methods as "name" or "name:arg=value,..."; none: all of the registry."""
    trained: tuple[Path, ...] = ()
    """Runs of `python -m train vlm --init <checkpoint> --tokens METHOD`: trained methods, answered with the runs' parameters
    beside their checkpoints."""
    questions: int | None = None
    """Of a scene that are asked together, in turn of its nine; None: all. One for methods that answer to the question."""
    budgets: tuple[float, ...] = (50, 33, 22, 11, 5)
    """Percent of the visual tokens that the language model reads, on average over its layers; worked off in this order."""
    scenes: int = 400
    """Held-out scenes per checkpoint, nine questions each."""
    batch: int = 20
    """Images answered at once."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Trained models; those that are not in <checkpoints>/seed<number> yet are trained first (about 25 minutes each)."""
    checkpoints: Path = Path("runs/tokens")
    train: bool = True
    """--no-train leaves missing models out."""
    positions: str = "original"
    """Rotary positions of the tokens that are left, for every method that has the argument: "original" (these models were
    trained to read them) or "fresh"."""
    rounds: int = 9
    """Times that each program is timed, in turns with the full model; 0: not at all."""
    out: Path = Path("runs/tokens-board")
    report: Path = Path("benchmarks/results")
    """Folder of the board, whose files carry the date."""
    answer: bool = True
    """--no-answer writes the board of what is in <out>/results and runs nothing."""
    show: int = 2
    """Scenes in the picture of what is kept."""
    model: Path | None = None
    """Directory of a LLaVA checkpoint in the Hugging Face format, in place of the digit scenes."""
    data: Path | None = None
    """jsonl of image, question, answer and, if there are kinds of questions, kind; with --model."""
    prompt: str | None = None
    """Of --model, with "{question}" and, where the picture goes, "{image}"; None: the checkpoint's chat template, or the
    picture and the question."""
    new: int = 16
    """Tokens of an answer at most, with --model."""

    def training(self, seed: int) -> VLM:
        """What `python -m train vlm` would be told."""
        return VLM(out=self.checkpoints / f"seed{seed}", seed=seed, steps=2600, layers=4, log_every=100, eval_every=1300,
                   save_every=650, keep=1)  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)


def run(options: Tokens) -> int:
    """Answer, measure and write; returns the exit status."""
    from benchmarks.boards import plots

    plots.require()
    if (options.model is None) != (options.data is None):
        raise ValueError("model, data: expected both or neither")
    if options.model is not None and options.trained:
        raise ValueError("trained: expected none with --model, whose parameters would answer in place of the runs'")
    if options.model is not None:
        from benchmarks.boards import llava_exam

        return llava_exam.run(options)
    return on_scenes(options)


def counts_of(percents: Sequence[float], n: int) -> tuple[int, ...]:
    """Whole numbers of tokens, of ``n``."""
    for p in percents:
        if not 0 < p <= 100:
            raise ValueError(f"budgets: expected percent in (0, 100], got {p}")
    return tuple(dict.fromkeys(max(1, round(p / 100 * n)) for p in percents))


def planned(options: Tokens, model, runs=()) -> tuple[list, list]:
    """(entries in the order of work, what does not fit). runs: trained methods (``boards.trained``)."""
    from benchmarks.boards import budgets, trained
    from jaxattn import registry

    order = counts_of(options.budgets, model.visual)
    methods = options.methods or registry.names("tokens")
    if "random" not in methods:
        methods = ("random", *methods)
    entries, unfit = budgets.plan(methods, order, model, positions=options.positions)
    more, not_met = trained.plan(runs, order, model, positions=options.positions)
    entries, unfit = [*entries, *more], [*unfit, *not_met]
    rank = {b: i for i, b in enumerate(order)}
    return sorted(entries, key=lambda e: -1 if e.method == budgets.FULL else rank[e.budget]), list(unfit)


# -------------------------------------------------------------------------------------------------------------- scenes
def trained_models(options: Tokens) -> Iterator[tuple[str, str, Any]]:
    """(name, what identifies it, parameters) of each checkpoint."""
    from benchmarks.boards.trained import answering
    from benchmarks.demo import trained
    from train.__main__ import run as train
    from train.checkpoints import load_params

    for seed in options.seeds:
        config = options.training(seed)
        found = trained(config)
        if found is None and not options.train:
            say(f"{config.folder}: no finished model, left out")
            continue
        if found is None:
            say(f"== training {config.folder}")
            if train(config):
                raise ValueError(f"{config.folder}: the training was stopped; the same command continues it")
            found = load_params(config.folder / "checkpoints")
        yield f"seed{seed}", *answering(*found)


def on_scenes(options: Tokens) -> int:
    from benchmarks.boards import budgets, outcomes, ranking, scene_exam, token_page, trained
    from benchmarks.boards.budgets import Unfit
    from train import scenes, tasks
    from train.data import vlm_dataset
    from train.data.questions import Vocabulary

    vocabulary = Vocabulary()
    model = tasks.scene_model(options.training(0), len(vocabulary))
    taught = [trained.read(run) for run in options.trained]
    entries, unfit = planned(options, model, taught)  # mistakes are found before any training
    if options.scenes < 1 or options.scenes % options.batch:
        raise ValueError(f"scenes: expected a multiple of the batch of {options.batch}, got {options.scenes}")
    checkpoints = list(trained_models(options))
    if not checkpoints:
        raise ValueError(f"checkpoints: expected a trained model in {options.checkpoints}/seed<number>, got none")
    say(f"{len(entries)} programs, {len(checkpoints)} checkpoints, {options.scenes} scenes; results in {options.out}")
    dataset = vlm_dataset(split="validation", count=options.scenes, mix=scenes.MIX, scene_seed=0, together=options.questions)
    batches = scene_exam.batches_of(dataset, options.scenes, options.batch)
    exam = scene_exam.exam_of(batches, vocabulary.ids["yes"], vocabulary.ids["no"])
    store = outcomes.Store(options.out / "results")
    whole = [e for e in entries if e.method == budgets.FULL]
    folders = {name: options.training(int(name.removeprefix("seed"))).folder for name, _, _ in checkpoints}
    runs = trained.by_checkpoint(taught, folders)
    board = scene_exam.Board(model, checkpoints, batches, store, options.rounds, options.show, say, runs)
    go = board.work if options.answer else board.read
    full, *_ = go(whole)  # a model that has not learned a kind is not asked any further
    failed = {c[0]: ranking.unlearned(full["full", c[0]], exam) for c in checkpoints if ("full", c[0]) in full}
    fine = [c[0] for c in checkpoints if not failed.get(c[0])] or [c[0] for c in checkpoints]
    board.checkpoints = [c for c in checkpoints if c[0] in fine]
    found, costs, refused = go(entries)
    there = {e.label for e in entries if all((e.label, name) in found for name in fine)}
    refused += [Unfit(e.method, e.budget, "not answered yet") for e in entries if e.label not in there
                and (e.method, e.budget) not in {(u.method, u.budget) for u in refused}]  # fmt: skip
    name = f"{datetime.date.today().isoformat()}-tokens"
    why = {c: ", ".join(f"{k} ({100 * x:.1f} %)" for k, x in kinds.items()) for c, kinds in failed.items()}
    left_out = [f"{c} is left out: its full model has not learned {why[c]}" for c in failed if c not in fine]
    facts = {"checkpoints": fine, "left_out": left_out, "images": options.scenes, "tokens": model.visual,
             "layers": model.llm.layers, "positions": options.positions, "batch": options.batch,
             "title": "Visual tokens of digit-scene models: every method at equal budgets",
             "about": f"{options.scenes} held-out scenes of handwritten digits, {options.questions or 9} questions each, "
                      f"models: {', '.join(fine)}, pruned without retraining{' unless so named' if runs else ''}"}  # fmt: skip
    images = np.concatenate([b["image"] for b in batches])[: options.show, ..., 0]
    token_page.write(options.report / name, entries, found, costs, [*unfit, *refused], exam, facts,
                     unfair=tuple(k for k in exam.names if k not in (*exam.ranked, "yes", "no")), images=images,
                     grid=model.vision.grid)  # fmt: skip
    say((options.report / f"{name}.md").read_text())
    return 0


def device() -> str:
    found = jax.devices()[0]
    return f"{found.platform} ({found.device_kind}), JAX {jax.__version__}"


class Progress:
    """Lines with the time that is left."""

    def __init__(self, total: int):
        self.total, self.done, self.began = total, 0, time.perf_counter()

    def __call__(self, text: str) -> None:
        self.done += 1
        spent = time.perf_counter() - self.began
        say(f"  {self.done}/{self.total}  {text}  left about {spent / self.done * (self.total - self.done) / 60:.0f} min")
