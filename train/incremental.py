"""python -m train.incremental: digits that arrive a few classes at a time, each task a lane beside a frozen tower (MULTI-LANE).

Scenes hold several digits; in the stage of a task only its own classes have labels. After every task all tasks so far are
scored on held-out scenes, beside one lane that learns the same tasks one after the other and forgets.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable
from functools import partial
from typing import ClassVar

import jax
import numpy as np
import tyro

from models.vision import multi_lane
from train import backend, scenes
from train.config import Common
from train.data import SceneConfig, vlm_dataset
from train.loop import INTERRUPTED, fit


@dataclasses.dataclass(frozen=True)
class Lanes(Common):
    """Learn digits in tasks of two classes, without forgetting."""

    task: ClassVar[str] = "lanes"

    steps: int = 150
    """Of each task."""
    batch: int = 32
    lr: float = 0.03
    weight_decay: float = 0.0
    warmup: int = 20
    vision_steps: int = 400
    """Of training the tower on crowded scenes, before it is frozen; like a published backbone it sees all kinds of things."""
    vision_lr: float = 2e-3
    tasks: int = 5
    """The ten digits in order, in as many parts."""
    selectors: int = 8
    prompts: int = 8
    prompt_layers: int = 2
    tome: int = 0
    """Tokens of repeated merging in place of selectors; 0: selectors."""
    size: int = 64
    dim: int = 64
    layers: int = 3
    heads: int = 4
    scenes: int = 3000
    held_out: int = 500
    baseline: bool = True
    """Also train one lane on all tasks in turn."""


def average_precision(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[K]: of ranking the scenes by the scores [N, K] of each class, truth [N, K] of 0 and 1."""
    order = np.argsort(-scores, axis=0, kind="stable")
    right = np.take_along_axis(truth, order, axis=0)
    precision = np.cumsum(right, 0) / np.arange(1, len(right) + 1)[:, None]
    return (precision * right).sum(0) / np.maximum(right.sum(0), 1)


@partial(jax.jit, static_argnums=(0, 4))
def _logits(c, vision, lanes, image, alone: bool):
    out = multi_lane.forward(c, vision, lanes, image, tasks=tuple(range(len(lanes))))
    return out.lanes[0] if alone else out.logits


def score(c, vision, lanes: tuple, batches: Iterable, *, alone: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(mean average precision [tasks], logits [N, K]) on held-out scenes; tasks without a lane get nan."""
    found = [(_logits(c, vision, lanes, b["image"], alone), b["presence"]) for b in batches]
    logits, truth = (np.concatenate([np.asarray(x) for x in part]) for part in zip(*found, strict=True))
    each = average_precision(np.where(np.isfinite(logits), logits, 0), truth)
    known = np.isfinite(logits).all(0)
    return np.array([each[list(t)].mean() if known[list(t)].all() else np.nan for t in c.tasks]), logits


def run(o: Lanes) -> int:
    backend.start(devices=o.devices, **vars(o.hosts))
    per = 10 // o.tasks
    classes = tuple(tuple(range(i * per, 10 if i == o.tasks - 1 else (i + 1) * per)) for i in range(o.tasks))
    model = scenes.scene_config(8, canvas=o.size, vision_dim=o.dim, vision_layers=o.layers, vision_heads=o.heads, dim=32,
                                n_layers=1, heads=2, hidden=32)  # fmt: skip
    c = multi_lane.MultiLaneConfig(model.vision, classes, selectors=o.selectors, prompts=o.prompts,
                                   prompt_layers=min(o.prompt_layers, o.layers), tome=o.tome)  # fmt: skip
    some = SceneConfig(canvas=o.size, grid=o.size // 32, digits=(1, 3))
    data = partial(vlm_dataset, mix=(), batch_size=o.batch, seed=o.seed)
    train = data(split="train", config=some, count=o.scenes)
    held_out = data(split="validation", config=some, count=o.held_out // o.batch * o.batch, shuffle=False)
    exam = [held_out.fetch(np.arange(i, i + o.batch)) for i in range(0, held_out.size, o.batch)]

    def stage(name, loss_fn, params, steps, lr, frozen=None, batches=train, optimizer="adamw"):
        settings = dataclasses.replace(o, lr=lr, optimizer=optimizer)
        result = fit(loss_fn, params, iter(batches), optimizer=settings.make_optimizer(steps), steps=steps, seed=o.seed,
                     checkpoint_dir=o.folder / name / "checkpoints", save_every=o.save_every, keep=1, resume=o.resume,
                     config=o.record(), log_every=50, metrics_path=o.folder / name / "metrics.jsonl", title=f"lanes {name}",
                     unit="images", frozen=frozen)  # fmt: skip
        return result.params, result.interrupted

    fresh = scenes.init(model, o.seed)
    bound = scenes.bound_model(model)
    crowded = data(split="train", config=some.dense(), count=o.scenes, scene_seed=1)
    tower, stopped = stage("tower", lambda p, batch, key: scenes.vision_loss(bound, p, batch, key),
                           {name: fresh[name] for name in ("vision", "aux")}, o.vision_steps, o.vision_lr, None, crowded,
                           "muon")  # fmt: skip
    if stopped:
        return INTERRUPTED
    vision = tower["vision"]

    def lane_loss(number: int, p, batch, key):
        lane = {name: p[name] for name in p if name != "vision"}
        logits = multi_lane.forward(c, p["vision"], (lane,), batch["image"], tasks=(number,)).lanes[0]
        return multi_lane.loss(c, logits, batch["presence"], number), {}

    tables: dict[str, list[list[float]]] = {"lanes": []}
    lanes, single = [], None
    before = None
    for number in range(o.tasks):
        lane = dict(lanes[-1]) if lanes else multi_lane.init(c, jax.random.key(o.seed))
        lane, stopped = stage(f"task{number}", partial(lane_loss, number), lane, o.steps, o.lr, {"vision": vision})
        if stopped:
            return INTERRUPTED
        lanes.append(lane)
        found, logits = score(c, vision, tuple(lanes), exam)
        tables["lanes"].append(found.tolist())
        if before is not None:
            known = np.isfinite(before)
            print(f"  largest change of a logit of earlier tasks: {np.abs(logits[known] - before[known]).max():.2e}")
        before = logits
        if o.baseline:
            start = single or multi_lane.init(c, jax.random.key(o.seed))
            single, stopped = stage(f"one{number}", partial(lane_loss, number), start, o.steps, o.lr, {"vision": vision})
            if stopped:
                return INTERRUPTED
            tables.setdefault("one lane", []).append(score(c, vision, (single,), exam, alone=True)[0].tolist())
    for name, table in tables.items():
        print(table_text(name, np.array(table)))
    (o.folder / "scores.json").write_text(json.dumps({"classes": classes, **tables}, indent=1) + "\n")
    return 0


def table_text(name: str, table: np.ndarray) -> str:
    """Mean average precision of every task (columns) after every task (rows), and what was forgotten."""
    lines = [f"{name}: mean average precision, percent, of each task after each task"]
    for i, row in enumerate(table):
        cells = ("    -" if np.isnan(x) or j > i else f"{100 * x:5.1f}" for j, x in enumerate(row))
        lines.append(f"  after {i}: " + "  ".join(cells))
    seen = np.tril(np.ones(table.shape, bool))
    best = np.where(seen, table, -np.inf).max(0)
    lost = (best - table[-1])[:-1]
    lines.append(f"  at the end {100 * table[-1].mean():.1f}, forgotten {100 * lost.mean():.2f} on average")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> int:
    return run(tyro.cli(Lanes, prog="python -m train.incremental", args=args))


if __name__ == "__main__":
    sys.exit(main())
