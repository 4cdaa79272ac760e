"""python -m train.detection: find the digits of scenes with Focus-DETR; how well its selector tells digits from background,
and what that is worth: the same detector with tokens chosen at random.
"""

import dataclasses
import json
import sys
from functools import partial
from typing import ClassVar

import jax
import numpy as np
import tyro

from models.detection import boxes, focus_detr
from train import backend
from train.config import Common
from train.data import SceneConfig, vlm_dataset
from train.loop import INTERRUPTED, fit


@dataclasses.dataclass(frozen=True)
class Detection(Common):
    """A detector of handwritten digits that works on the tokens its foreground selector finds."""

    task: ClassVar[str] = "detection"

    steps: int = 900
    batch: int = 8
    lr: float = 2e-3
    weight_decay: float = 1e-4
    clip: float = 0.1
    size: int = 64
    dim: int = 64
    heads: int = 4
    points: int = 2
    rho: float = 0.3
    """Share of the tokens that may be focused."""
    cascade: tuple[float, ...] = (1.0, 0.6)
    """Share of those that each encoder layer updates."""
    fine: int = 32
    queries: int = 12
    decoder_layers: int = 2
    scenes: int = 4000
    held_out: int = 400


def model(o: Detection) -> focus_detr.FocusDETRConfig:
    """Maps of strides 4 and 8; digits of 16 pixels belong to both (their ranges overlap)."""
    return focus_detr.FocusDETRConfig(
        (o.size, o.size), 10, ((0, 14), (8, 64)), channels=1, stride=4, dim=o.dim, heads=o.heads, points=o.points,
        hidden=2 * o.dim, rho=o.rho, cascade=o.cascade, fine=o.fine, queries=o.queries, decoder_layers=o.decoder_layers,
    )  # fmt: skip


def labelled(batch: dict, patch: int) -> dict[str, np.ndarray]:
    """image, box float32 [b, K, 4] of (x0, y0, x1, y1) and digit int32 [b, K] (-1: an empty cell) of a batch of scenes."""
    box, labels = batch["box"], batch["patch_labels"]
    side = int(labels.shape[1] ** 0.5)
    row, column = (np.maximum(box[..., i] + patch // 2, 0) // patch for i in (0, 1))
    digit = np.take_along_axis(labels, row * side + column, axis=1)
    digit = np.where(box[..., 0] >= 0, digit, -1).astype(np.int32)
    return {"image": batch["image"], "box": box[..., [1, 0, 3, 2]].astype(np.float32), "digit": digit}


class Boxes:
    """Batches of a scene dataset with "box" and "digit" as a detector reads them."""

    def __init__(self, batches, patch: int):
        self.batches, self.patch = batches, patch

    def __iter__(self):
        return self

    def __next__(self):
        return labelled(next(self.batches), self.patch)

    def get_state(self):
        return self.batches.get_state()

    def set_state(self, state):
        self.batches.set_state(state)


@partial(jax.jit, static_argnums=0)
def _look(c, params, image, scores):
    out = focus_detr.forward(c, params, image, scores=scores)
    logits, box = out.predictions[-1]
    return out.scores, out.focus, logits, boxes.corners(box)


def score(c, params, batches, *, chosen: str = "selector", seed: int = 0) -> dict[str, float]:
    """Average precision at an overlap of one half; of the selector, the share of digits' cells (that stand for a box) among
    the focused, and how often a digit's cell outscores a background cell (AUC). chosen: "selector" or "random" tokens."""
    rng, found = np.random.default_rng(seed), []
    for batch in batches:
        cells = np.asarray(boxes.cell_classes(batch["box"], batch["digit"], c.shapes, c.strides, c.ranges)) >= 0
        given = rng.random(cells.shape).astype(np.float32) if chosen == "random" else None
        scores, focus, logits, box = (np.asarray(x) for x in _look(c, params, batch["image"], given))
        kept = np.zeros(cells.shape, bool)
        np.put_along_axis(kept, focus, True, axis=1)
        rank = np.argsort(np.argsort(scores, axis=1), axis=1)
        n = cells.sum(1)
        auc = ((rank * cells).sum(1) - n * (n - 1) / 2) / np.maximum(n * (cells.shape[1] - n), 1)
        found.append((logits, box, batch["box"], batch["digit"], (kept & cells).sum(1) / np.maximum(n, 1), auc))
    logits, box, truth, digit, recall, auc = (np.concatenate(x) for x in zip(*found, strict=True))
    flat = logits.reshape(len(logits), -1)  # every class of every query is a detection, as in DETR
    kind = np.broadcast_to(np.tile(np.arange(c.classes), logits.shape[1]), flat.shape)
    side = np.array(c.image[::-1] * 2, np.float32)
    every = np.repeat(box * side, c.classes, axis=1)
    ap = boxes.average_precision(flat, every, kind, truth, digit)
    return {"ap50": ap, "recall": float(recall.mean()), "auc": float(auc.mean())}


def run(o: Detection) -> int:
    backend.start(devices=o.devices, **vars(o.hosts))
    geometry = SceneConfig(canvas=o.size, grid=o.size // 32, digits=(1, 4), step=4)
    c = model(o)
    data = partial(vlm_dataset, mix=(), config=geometry, batch_size=o.batch, seed=o.seed)
    train = Boxes(iter(data(split="train", count=o.scenes)), geometry.patch)
    held_out = data(split="validation", count=o.held_out // o.batch * o.batch, shuffle=False)
    exam = [labelled(held_out.fetch(np.arange(i, i + o.batch)), geometry.patch) for i in range(0, held_out.size, o.batch)]

    def loss_fn(params, batch, key):
        return focus_detr.loss(c, focus_detr.forward(c, params, batch["image"]), batch["box"], batch["digit"])

    result = fit(loss_fn, focus_detr.init(c, o.seed), train, optimizer=o.make_optimizer(o.steps), steps=o.steps, seed=o.seed,
                 checkpoint_dir=o.folder / "checkpoints", save_every=o.save_every, keep=1, resume=o.resume, config=o.record(),
                 log_every=50, metrics_path=o.folder / "metrics.jsonl", title="detection", unit="images")  # fmt: skip
    if result.interrupted:
        return INTERRUPTED
    found = {name: score(c, result.params, exam, chosen=name) for name in ("selector", "random")}
    for name, figures in found.items():
        print(f"{name}: " + "  ".join(f"{k} {100 * v:.1f} %" for k, v in figures.items()))
    (o.folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def main(args: list[str] | None = None) -> int:
    return run(tyro.cli(Detection, prog="python -m train.detection", args=args))


if __name__ == "__main__":
    sys.exit(main())
