"""Boxes: labels of cells, overlaps, matching and average precision against plain loops."""

import itertools

import jax.numpy as jnp
import numpy as np

from models.detection import boxes

RNG = np.random.default_rng(0)


def test_cells_stand_for_boxes_of_their_range():
    shapes, strides, ranges = ((4, 4), (2, 2)), (4, 8), ((0, 6), (5, 64))
    box = np.array([[[1, 1, 9, 9], [3, 3, 7, 15], [0, 0, 16, 16]]], np.float32)
    classes = np.array([[4, 2, -1]])
    found = np.asarray(boxes.cell_classes(jnp.asarray(box), jnp.asarray(classes), shapes, strides, ranges))[0]
    expected = []
    for (h, w), stride, (low, high) in zip(shapes, strides, ranges, strict=True):
        for y, x in itertools.product(range(h), range(w)):
            cx, cy, best = (x + 0.5) * stride, (y + 0.5) * stride, (np.inf, -1)
            for (x0, y0, x1, y1), c in zip(box[0], classes[0], strict=True):
                sides = (cx - x0, cy - y0, x1 - cx, y1 - cy)
                if c >= 0 and min(sides) > 0 and low <= max(sides) <= high:
                    best = min(best, ((x1 - x0) * (y1 - y0), c))
            expected.append(best[1])
    np.testing.assert_array_equal(found, expected)
    assert {2, 4, -1} == set(found.tolist()) and (found[:16] >= 0).any() and (found[16:] >= 0).any(), "ranges overlap"


def test_focal_and_overlap():
    logits, labels = np.array([[0.5, -1.0, 2.0]]), np.array([[1.0, 0, 0]])
    p = 1 / (1 + np.exp(-logits))
    by_hand = 0.25 * (1 - p[0, 0]) ** 2 * -np.log(p[0, 0]) + 0.75 * sum(p[0, i] ** 2 * -np.log(1 - p[0, i]) for i in (1, 2))
    np.testing.assert_allclose(boxes.focal(jnp.asarray(logits), jnp.asarray(labels), 2.0), by_hand / 2, rtol=1e-5)
    iou, giou = boxes.overlap(jnp.array([[0.0, 0, 2, 2]]), jnp.array([[1.0, 0, 3, 1]]))
    np.testing.assert_allclose([iou[0], giou[0]], [1 / 5, 1 / 5 - 1 / 6], rtol=1e-6)


def test_matching_is_the_cheapest():
    logits, box = jnp.asarray(RNG.normal(size=(1, 4, 3)), jnp.float32), jnp.asarray(RNG.random((1, 4, 4)), jnp.float32)
    truth, classes = jnp.asarray(RNG.random((1, 3, 4)), jnp.float32), jnp.array([[2, 0, -1]])
    nth = np.asarray(boxes.match(logits, box, truth, classes))[0]
    assert len(set(nth.tolist())) == 3
    p = 1 / (1 + np.exp(-np.asarray(logits[0])))

    def cost(n, k):
        q = p[n, classes[0, k]]
        giou = boxes.overlap(boxes.corners(box[0, n]), boxes.corners(truth[0, k]))[1]
        hit = 0.25 * (1 - q) ** 2 * -np.log(q) - 0.75 * q**2 * -np.log(1 - q)
        return 2 * hit + 5 * np.abs(box[0, n] - truth[0, k]).sum() - 2 * giou

    table = [[float(cost(n, k)) for k in (0, 1)] for n in range(4)]
    best = min(itertools.permutations(range(4), 2), key=lambda pair: table[pair[0]][0] + table[pair[1]][1])
    assert tuple(nth[:2].tolist()) == best
    sure = jnp.where(jnp.arange(3) == 1, 20.0, -20.0)[None, None]
    exact = boxes.set_loss(sure, truth[:, :1], truth[:, :1], jnp.array([[1]]))
    assert float(exact) < 1e-4


def test_average_precision():
    truth, classes = np.array([[[0, 0, 10, 10], [20, 20, 30, 30.0]]]), np.array([[1, 1]])
    box = np.array([[[0, 0, 10, 9], [0, 0, 10, 10], [40, 40, 50, 50], [20, 20, 30, 29.0]]])
    kind, scores = np.array([[1, 1, 1, 1]]), np.array([[0.9, 0.8, 0.7, 0.6]])
    # right, a second one on the same box is wrong, wrong, right: precision 1 up to recall 1/2, then 2/4
    assert boxes.average_precision(scores, box, kind, truth, classes) == 0.5 * 1 + 0.5 * 0.5
    assert boxes.average_precision(scores, box, kind * 0, truth, classes) == 0.0
