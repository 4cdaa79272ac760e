"""Scores of tasks that arrive one after the other, and the labels that a detector learns from."""

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from models.detection import focus_detr
from train import detection, incremental
from train.data import SceneConfig, split_scenes, vlm_dataset

RNG = np.random.default_rng(0)


def test_average_precision_is_scikit_learns():
    scores, truth = RNG.normal(size=(40, 3)), (RNG.random((40, 3)) < 0.3).astype(float)
    expected = [average_precision_score(truth[:, k], scores[:, k]) for k in range(3)]
    np.testing.assert_allclose(incremental.average_precision(scores, truth), expected)


def test_what_was_forgotten_is_told():
    table = np.array([[0.9, np.nan, np.nan], [0.7, 0.8, np.nan], [0.6, 0.8, 0.5]])
    text = incremental.table_text("one lane", table)
    assert "after 1:  70.0   80.0      -" in text
    assert "at the end 63.3, forgotten 15.00 on average" in text  # 30 and 0 of the two tasks before the last


def test_boxes_have_the_digits_of_their_cells():
    config = SceneConfig(canvas=64, grid=2, digits=(1, 4), step=4)
    batch = vlm_dataset(split="validation", config=config, count=6, mix=(), batch_size=6, shuffle=False).fetch(np.arange(6))
    found = detection.labelled(batch, config.patch)
    scenes = split_scenes("validation", 6, config)
    np.testing.assert_array_equal(found["digit"], scenes.digit)
    real = scenes.digit >= 0
    np.testing.assert_array_equal(found["box"][real][:, [1, 0, 3, 2]], scenes.box[real])


def test_scores_of_a_selector(monkeypatch):
    c = detection.model(detection.Detection(size=32, dim=16, heads=2, fine=4, queries=2))
    batch = {"image": np.zeros((3, 32, 32, 1)), "box": np.full((3, 2, 4), -1.0, np.float32), "digit": np.full((3, 2), -1)}
    batch["box"][:, 0], batch["digit"][:, 0] = (4, 4, 20, 20), (1, 2, 3)
    cells = np.asarray(detection.boxes.cell_classes(batch["box"], batch["digit"], c.shapes, c.strides, c.ranges)) >= 0
    scores = RNG.normal(size=cells.shape) + cells
    focus = np.argsort(-scores, axis=1)[:, : c.capacity]
    logits = np.full((3, 2, 10), -9.0)
    logits[np.arange(3), 1, [1, 2, 3]] = 3.0
    box = np.broadcast_to(np.array([[0, 0, 1, 1], [4, 4, 20, 20]]) / np.array([[1], [32]]), (3, 2, 4))
    monkeypatch.setattr(detection, "_look", lambda *_: (scores, focus, logits, box))
    found = detection.score(c, {}, [batch])
    assert found["ap50"] == 1.0 and isinstance(c, focus_detr.FocusDETRConfig)
    np.testing.assert_allclose(found["auc"], np.mean([roc_auc_score(cells[b], scores[b]) for b in range(3)]))
    kept = [np.isin(np.flatnonzero(cells[b]), focus[b]).mean() for b in range(3)]
    np.testing.assert_allclose(found["recall"], np.mean(kept))
