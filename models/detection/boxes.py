"""Boxes, what they say about the cells of feature maps, and losses of detectors.

A box is (x0, y0, x1, y1) in pixels, or (centre x, centre y, width, height) in shares of the picture. Rows of padding are
marked by a class of -1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattn.core.types import Array


def centres(shapes, strides) -> np.ndarray:
    """float32 [S, 2]: (x, y) in pixels of the cells of all maps, one map after the other."""
    rows = []
    for (h, w), stride in zip(shapes, strides, strict=True):
        y, x = np.divmod(np.arange(h * w), w)
        rows.append((np.stack([x, y], -1) + 0.5) * stride)
    return np.concatenate(rows).astype(np.float32)


def cell_classes(box: Array, classes: Array, shapes, strides, ranges) -> Array:
    """int32 [B, S]: the class of the smallest box that a cell stands for, -1 for none (after FCOS).

    A cell stands for a box that holds its centre and whose farthest side is as far as its map's range allows.
    Args: box: [B, K, 4] (x0, y0, x1, y1).  classes: int [B, K], -1 for padding.  ranges: ((low, high) pixels, ...) of each map;
      those of neighbouring maps may overlap.
    """
    at = centres(shapes, strides)
    limits = np.repeat(np.asarray(ranges, np.float32), [h * w for h, w in shapes], axis=0)
    near, far = at - box[:, :, None, :2], box[:, :, None, 2:] - at  # [B, K, S, 2]
    sides = jnp.concatenate([near, far], -1)
    reach = sides.max(-1)
    stands = (sides.min(-1) > 0) & (limits[:, 0] <= reach) & (reach <= limits[:, 1]) & (classes >= 0)[..., None]
    area = jnp.prod(box[..., 2:] - box[..., :2], -1)[..., None]
    nth = jnp.where(stands, area, jnp.inf).argmin(1)
    return jnp.where(stands.any(1), jnp.take_along_axis(classes, nth, axis=1), -1).astype(jnp.int32)


def focal(logits: Array, labels: Array, count: Array) -> Array:
    """Focal loss (gamma 2, alpha 0.25) of logits and labels of one shape, summed over ``count`` (at least 1)."""
    return optax.losses.sigmoid_focal_loss(logits, labels, alpha=0.25, gamma=2.0).sum() / jnp.maximum(count, 1.0)


def corners(box: Array) -> Array:
    """(centre x, centre y, width, height) -> (x0, y0, x1, y1)."""
    return jnp.concatenate([box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2], -1)


def overlap(a: Array, b: Array) -> tuple[Array, Array]:
    """(IoU, generalised IoU) of boxes [..., 4] (x0, y0, x1, y1)."""
    area = lambda x: jnp.prod(jnp.maximum(x[..., 2:] - x[..., :2], 0), -1)  # noqa: E731
    shared = jnp.concatenate([jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], -1)
    hull = jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], -1)
    union = area(a) + area(b) - area(shared)
    iou = area(shared) / jnp.maximum(union, 1e-9)
    return iou, iou - (area(hull) - union) / jnp.maximum(area(hull), 1e-9)


def match(logits: Array, box: Array, truth: Array, classes: Array) -> Array:
    """int32 [B, K]: the prediction that each true box is matched with, one to one, by DETR's costs.

    logits: [B, N, C].  box: [B, N, 4] and truth: [B, K, 4] in shares.  classes: int [B, K], -1 for padding, K <= N."""
    p = jax.nn.sigmoid(logits)
    own = jnp.take_along_axis(p, jnp.maximum(classes, 0)[:, None], axis=2)  # [B, N, K]
    hit = 0.25 * (1 - own) ** 2 * -jnp.log(own + 1e-8) - 0.75 * own**2 * -jnp.log(1 - own + 1e-8)
    far = jnp.abs(box[:, :, None] - truth[:, None]).sum(-1)
    giou = overlap(corners(box)[:, :, None], corners(truth)[:, None])[1]
    cost = jax.lax.stop_gradient(2 * hit + 5 * far - 2 * giou)
    cost = jnp.where((classes >= 0)[:, None], cost, 0.0)  # padding takes what is left, at no cost

    def one(cost):
        rows, columns = optax.assignment.hungarian_algorithm(cost)
        return jnp.zeros(cost.shape[1], jnp.int32).at[columns].set(rows.astype(jnp.int32))

    return jax.vmap(one)(cost)


def set_loss(logits: Array, box: Array, truth: Array, classes: Array) -> Array:
    """Loss of a set of predictions after matching: focal, 5 L1 and 2 (1 - generalised IoU), per true box."""
    nth, real = match(logits, box, truth, classes), classes >= 0
    count = jnp.maximum(real.sum(), 1)
    where = jnp.arange(logits.shape[0])[:, None]
    labels = jnp.zeros(logits.shape).at[where, nth, jnp.maximum(classes, 0)].add(real.astype(logits.dtype))
    mine = jnp.take_along_axis(box, nth[..., None], axis=1)
    l1 = jnp.abs(mine - truth).sum(-1)
    giou = overlap(corners(mine), corners(truth))[1]
    return 2 * focal(logits, labels, count) + jnp.where(real, 5 * l1 + 2 * (1 - giou), 0).sum() / count


def average_precision(scores, box, kind, truth, classes, *, iou: float = 0.5) -> float:
    """Mean over classes of the area under precision and recall (numpy, for evaluation).

    scores, kind: [B, N] of predictions with box [B, N, 4]; truth [B, K, 4], classes int [B, K], -1 for padding; all corners."""
    found = []
    for c in np.unique(classes[classes >= 0]):
        picture, n = np.nonzero(kind == c)
        taken = np.zeros(classes.shape, bool)
        right = []
        for i in np.argsort(-scores[picture, n], kind="stable"):
            b = picture[i]
            mine = np.where((classes[b] == c) & ~taken[b], _iou(truth[b], box[b, n[i]]), 0)
            best = int(mine.argmax())
            right.append(mine[best] >= iou)
            taken[b, best] |= right[-1]
        hits = np.cumsum(right)
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]  # never rising with recall
        found.append(float((precision * right).sum() / (classes == c).sum()) if len(hits) else 0.0)
    return float(np.mean(found)) if found else 0.0


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    shared = np.prod(np.maximum(high - low, 0), -1)
    area = lambda x: np.prod(x[..., 2:] - x[..., :2], -1)  # noqa: E731
    return shared / np.maximum(area(a) + area(b) - shared, 1e-9)


__all__ = ["average_precision", "cell_classes", "centres", "corners", "focal", "match", "overlap", "set_loss"]
