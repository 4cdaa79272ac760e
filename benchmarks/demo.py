"""The demo: a small vision-language model learns scenes of handwritten digits, then published methods take most of its
visual tokens away.

Everything goes to one folder: checkpoints/ (used again by the next run), board.md, accuracy.png, overlays.png, answers.md.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from train.checkpoints import CheckpointError, Checkpoints, load_params
from train.config import VLM

METHODS = (
    "full", "random", "uniform", "fastervlm", "hiprune", "mmtok", "aim_merge", "aim_merge:positions=original",
    "aim:positions=original",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small vision-language model on digit scenes, then prune its visual tokens: a table and pictures."""

    out: Path = Path("runs/demo")
    """Folder of everything; a model trained there before is used again."""
    methods: tuple[str, ...] = METHODS
    """full, aim, aim_merge, or token methods as "name" or "name:arg=value,..."."""
    budgets: tuple[int, ...] = (72, 36, 16)
    """Visual tokens that stay, of 144."""
    scenes: int = 1000
    """Held-out scenes to answer, nine questions each."""
    batch: int = 50
    """Scenes answered at once."""
    show: int = 4
    """Scenes in the pictures and the generated answers."""
    readings: int = 100
    """Held-out scenes whose digits are all read aloud, word by word."""
    seed: int = 0
    steps: int = VLM.steps
    """Of training on questions."""
    vision_steps: int = VLM.vision_steps
    """Of training the vision tower alone, before."""
    train_scenes: int = VLM.scenes

    def training(self) -> VLM:
        """What `python -m train vlm` would be told."""
        return VLM(out=self.out, seed=self.seed, steps=self.steps, vision_steps=self.vision_steps, scenes=self.train_scenes)


class Clock:
    """Phases with their times: printed as they begin and end, and listed in the board."""

    def __init__(self):
        self.phases: list[tuple[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        yield
        self.phases.append((name, time.perf_counter() - began))
        print(f"   {self.phases[-1][1]:.1f} s", flush=True)

    def __str__(self) -> str:
        parts = [f"{name} {seconds:.0f} s" for name, seconds in self.phases]
        return ", ".join([*parts, f"total {sum(s for _, s in self.phases):.0f} s"])


def say(text: str) -> None:
    print(text, flush=True)


def trained(config: VLM) -> tuple[dict, dict[str, Any]] | None:
    """(parameters, record) of a finished run of ``config``, or None where there is none yet. Raises CheckpointError for a
    damaged checkpoint and for one of other settings, which is never trained over."""
    folder = config.folder / "checkpoints"
    if not folder.exists():
        return None
    with Checkpoints(folder, keep=None) as checkpoints:
        if checkpoints.latest is None:
            return None
        record = checkpoints.record()
    now, before = config.record(), record.get("config", {})
    other = [k for k in now if k in before and before[k] != now[k]]  # a setting that is newer than the run had its default
    if other:
        wanted, got = (", ".join(f"{k} {x[k]}" for k in other) for x in (now, before))
        raise CheckpointError(folder, f"a run with {wanted} (or name another --out)", got)
    return load_params(folder) if record["step"] >= config.steps else None


def run(demo: Demo) -> int:
    """Train or load, measure, draw; returns the exit status."""
    # Imported here, so that --help and mistakes on the command line answer at once.
    from benchmarks.boards import budgets, plots, table, tokens
    from train import tasks
    from train.__main__ import run as train
    from train.data import vlm_dataset
    from train.data.questions import Vocabulary
    from train.scenes import MIX

    plots.require()
    config, clock, console = demo.training(), Clock(), Console()
    vocabulary = Vocabulary()
    model = tasks.scene_model(config, len(vocabulary))
    entries, unfit = budgets.plan(demo.methods, demo.budgets, model)  # a wrong name is an error before any training
    if unfit:
        raise ValueError(f"methods: expected some that meet the budgets, got {unfit[0].method}: {unfit[0].reason}")

    found = trained(config)
    if found is not None:
        say(f"using the model trained before: {demo.out / 'checkpoints'}, step {found[1]['step']} (no training)")
    else:
        with clock.phase("training"):
            status = train(config)
        if status:
            return status
        found = load_params(config.folder / "checkpoints")
    params = {name: tree for name, tree in found[0].items() if name != "aux"}

    with clock.phase("held-out scenes"):
        count = max(demo.scenes, demo.readings, demo.show)
        dataset = vlm_dataset(split="validation", count=count, mix=MIX, scene_seed=0)
        say(f"  {count} scenes of digits that were never trained on")
    with clock.phase(f"methods: {len(entries)} programs over {demo.scenes} scenes"):
        results = tokens.measure(entries, model, params, dataset, scenes_count=demo.scenes, size=demo.batch, say=say)
    with clock.phase("generated answers"):
        images = dataset.fetch(np.arange(demo.readings))["image"]
        readings = read_all(entries, demo.budgets, model, params, vocabulary, images)
        truths = truth_of(vocabulary, dataset, demo.readings)
    with clock.phase("pictures"):
        plots.chart(results, demo.out / "accuracy.png")
        shown = dataset.fetch(np.arange(min(demo.show, demo.batch)))["image"][..., 0]
        plots.overlays(results, min(demo.budgets), shown, model.vision.grid, demo.out / "overlays.png")
    (demo.out / "answers.md").write_text(answers_page(readings, truths, demo.show))
    (demo.out / "board.md").write_text(board_page(demo, results, readings, truths, clock))

    title = f"{model.visual} visual tokens and fewer, {demo.scenes} held-out scenes; percent of answers right"
    console.print(table.rich_table(results, title))
    for sentence in table.below_random(results):
        say(sentence)
    say(f"{clock}")
    say(f"wrote board.md, answers.md, accuracy.png and overlays.png to {demo.out}")
    return 0


# ------------------------------------------------------------------------------------------------------------ answers
def read_all(entries, budgets: Sequence[int], model, params, vocabulary, images) -> dict[str, list[list[str]]]:
    """What the full model and every method at the middle budget read in each image."""
    from benchmarks.boards import tokens
    from benchmarks.boards.budgets import FULL

    middle = sorted(budgets)[len(budgets) // 2]
    chosen = [e for e in entries if e.method == FULL or e.budget == middle]
    found = {}
    for number, e in enumerate(chosen, 1):
        began = time.perf_counter()
        found[e.label] = tokens.read(e, model, params, vocabulary, images)
        say(f"  {number}/{len(chosen)}  {e.label}  {time.perf_counter() - began:.1f} s")
    return found


def truth_of(vocabulary, dataset, count: int) -> list[list[str]]:
    """The digits of the first scenes, in raster order: read off the boxes and the patches' labels."""
    batch = dataset.fetch(np.arange(count))
    words = []
    for box, labels in zip(batch["box"], batch["patch_labels"], strict=True):
        side = int(len(labels) ** 0.5)
        patch = batch["image"].shape[1] // side
        labels = labels.reshape(side, side)
        words.append([str(labels[y // patch, x // patch]) for y, x, *_ in box if y >= 0])
    return words


def exact(readings: Sequence[Sequence[str]], truths: Sequence[Sequence[str]]) -> float:
    """Share of the scenes that are read without a mistake."""
    return float(np.mean([list(a) == list(b) for a, b in zip(readings, truths, strict=True)]))


def answers_page(readings: dict[str, list[list[str]]], truths: list[list[str]], show: int) -> str:
    from benchmarks.boards.tokens import PROMPT

    lines = [f'# "{PROMPT}"', "", "Generated word by word, greedily, from the cache of a prefill.", ""]
    lines += ["| method | scenes read without a mistake |", "| --- | ---: |"]
    lines += [f"| {label} | {100 * exact(found, truths):.0f} % of {len(truths)} |" for label, found in readings.items()]
    for number in range(min(show, len(truths))):
        lines += ["", f"Scene {number + 1}: {' '.join(truths[number])}", "", "| method | answer |", "| --- | --- |"]
        for label, found in readings.items():
            right = found[number] == truths[number]
            lines.append(f"| {label} | {' '.join(found[number]) or '(nothing)'}{'' if right else ' (wrong)'} |")
    return "\n".join(lines) + "\n"


def board_page(demo: Demo, results, readings, truths, clock: Clock) -> str:
    from benchmarks.boards import table

    device = jax.devices()[0]
    least = min(demo.budgets)
    notes = [
        *table.LEGEND,
        "All questions of an image share one selection; mmtok covers the words of all of them.",
        "aim_merge halves the tokens until the budget is met (the paper's default stops at a quarter) and numbers the merged "
        "ones anew; positions=original leaves them where they stood, which this model was trained to read. aim merges, then "
        "prunes after every layer of the language model from the first on (the paper: from half of 28 layers), to the "
        "budget on average over the layers; its last layer sees no visual token.",
        "Reading a whole scene aloud ends with knowing when to stop, which is counting: unfair to pruning in the same way.",
        "Budgets run in gathered programs of a few sizes, so 36 tokens take 40 rows, 4 of them empty.",
        *table.below_random(results),
    ]
    say_read = ", ".join(f"{label} {100 * exact(found, truths):.0f} %" for label, found in readings.items())
    head = [
        "# Visual tokens of a digit-scene model, pruned without retraining",
        "",
        f"{demo.scenes} held-out scenes, one model (seed {demo.seed}, {demo.vision_steps} + {demo.steps} steps), "
        f"{device.platform} ({device.device_kind}), JAX {jax.__version__}.",
        "",
        table.markdown(results),
        "",
        f"Scenes read aloud without a mistake, of {len(truths)}: {say_read}.",
        "",
        "![accuracy](accuracy.png)",
        "",
        f"Tokens kept at {least} (dropped patches dark; patches merged into one token share a colour):",
        "",
        "![overlays](overlays.png)",
        "",
        *(f"- {note}" for note in notes),
        "",
        f"Times: {clock}.",
        "",
    ]
    return "\n".join(head)
