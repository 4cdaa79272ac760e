"""The handwritten digits that ship with scikit-learn (UCI optical recognition, 1797 images of 8 x 8).

Split by instance: 1437 for training, 360 for validation, every class in proportion. Whatever is composed
from them (scenes, augmented variants) keeps the instance number, so that a held-out digit can be shown
never to have been seen.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from train.data.files import check_split

CLASSES = 10
SPLIT_SEED = 20
ROTATION, SCALE, SHEAR = 0.1, 0.06, 0.1  # standard deviations: radians, relative, relative


@dataclass(frozen=True)
class DigitBank:
    """Digit images with what they are: images f32 [n, size, size] in [0, 1], labels int32 [n], and instance
    int32 [n], the row in scikit-learn's table (several variants share one)."""

    images: np.ndarray
    labels: np.ndarray
    instance: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the handwritten digits need scikit-learn: pip install 'jaxattn[data]'") from error
    table = load_digits()
    return (table.images / 16).astype(np.float32), table.target.astype(np.int32)


def load(split: str) -> DigitBank:
    """The original 8 x 8 images of one split ("train": 1437, "validation": 360)."""
    check_split(split)
    images, labels = _table()
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    held_out = np.zeros(len(labels), bool)
    held_out[by_class[::5]] = True  # every fifth of the class-sorted order: stratified, 360 of 1797
    rows = np.flatnonzero(held_out == (split == "validation"))
    return DigitBank(images[rows], labels[rows], rows.astype(np.int32))


def resample(images: np.ndarray, size: int, matrix: np.ndarray | None = None) -> np.ndarray:
    """Bilinear resampling of [n, h, w] to [n, size, size]; outside the image is 0.

    matrix f32 [n, 2, 2] maps output offsets from the centre (rows, columns) to input offsets; None: identity.
    """
    n, height, width = images.shape
    centre = np.array([height, width], np.float32) / 2
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    grid = np.stack(np.meshgrid(ticks * height, ticks * width, indexing="ij"), -1)
    if matrix is None:
        at = np.broadcast_to(grid, (n, size, size, 2))
    else:
        at = np.einsum("nij,yxj->nyxi", matrix.astype(np.float32), grid)
    limit = np.array([height + 1, width + 1], np.float32)
    at = np.clip(at + centre + np.float32(0.5), 0, limit)  # in the padded image
    low = np.minimum(at.astype(np.int32), [height, width])
    part = at - low.astype(np.float32)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1))).reshape(n, -1)
    flat = low[..., 0] * (width + 2) + low[..., 1]
    corner = [
        np.take_along_axis(padded, (flat + shift).reshape(n, -1), 1).reshape(flat.shape)
        for shift in (0, 1, width + 2, width + 3)
    ]
    top = corner[0] + part[..., 1] * (corner[1] - corner[0])
    bottom = corner[2] + part[..., 1] * (corner[3] - corner[2])
    return top + part[..., 0] * (bottom - top)


def augment(images: np.ndarray, size: int, *, seed: int) -> np.ndarray:
    """Resample [n, h, w] to [n, size, size] through a mild random rotation, scale and shear each."""
    rng = np.random.default_rng(seed)
    draws = np.clip(rng.standard_normal((4, len(images))), -2, 2).astype(np.float32)
    angle, shear = ROTATION * draws[0], SHEAR * draws[1]
    stretch = 1 + SCALE * draws[2:]
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]]).transpose(2, 0, 1)
    zero = np.zeros_like(shear)
    shape = np.array([[stretch[0], zero], [shear, stretch[1]]]).transpose(2, 0, 1)
    return resample(images, size, rotation @ shape)


def digit_bank(split: str, *, size: int = 16, variants: int | None = None, seed: int = 0) -> DigitBank:
    """Digits of one split at `size` x `size`.

    variants: augmented copies of each digit; 0 gives the plain ones. None: 8 for training, 0 for validation.
    """
    plain = load(split)
    if size < 1:
        raise ValueError(f"size: expected a positive image size, got {size!r}")
    if variants is None:
        variants = 8 if split == "train" else 0
    if variants < 0:
        raise ValueError(f"variants: expected 0 (plain) or more, got {variants!r}")
    if variants == 0:
        return DigitBank(resample(plain.images, size), plain.labels, plain.instance)
    repeated = np.tile(np.arange(len(plain)), variants)
    images = augment(plain.images[repeated], size, seed=seed)
    return DigitBank(images, plain.labels[repeated], plain.instance[repeated])
