"""Digit scenes: handwritten digits in the named cells of a canvas.

A scene is fully determined by (seed, index, config, bank): any range can be made anywhere, again. Digits
sit on the patch grid inside their cell, because a small vision tower otherwise spends its training on
assembling digits from misaligned patches. Pixels are stored as uint8 (step 0.006, far below the noise) and
read as float32.
"""

from dataclasses import dataclass, replace

import numpy as np

from train.data.digits import CLASSES, DigitBank
from train.data.draws import generator, integers, order, uniforms

BACKGROUND = CLASSES  # the eleventh class of a patch
LOW, HIGH = -0.25, 1.25  # range of stored pixels: ink in [0, 1] plus three standard deviations of noise
BLOCK = 256  # scenes painted at once: bounds the float32 canvases
LAYOUT, NOISE = 0, 1  # random streams; questions use the ones after these


@dataclass(frozen=True)
class SceneConfig:
    """Geometry in pixels. The canvas has grid x grid cells; a digit is shifted inside its cell by multiples
    of `step` (None: the patch) on each axis. `repeat_share` of the scenes draw all digits from
    `repeat_classes` classes, so that repeats occur. Contrast is uniform in its range for each digit, noise
    the deviation of Gaussian noise."""

    canvas: int = 96
    grid: int = 3
    digit: int = 16
    patch: int = 8
    step: int | None = None
    digits: tuple[int, int] = (2, 6)
    repeat_share: float = 0.4
    repeat_classes: int = 3
    contrast: tuple[float, float] = (0.7, 1.0)
    noise: float = 0.08

    def __post_init__(self):
        if self.patch < 1 or self.canvas % self.patch:
            raise ValueError(f"canvas: expected a multiple of patch={self.patch}, got {self.canvas}")
        if self.jitter < 1:
            raise ValueError(f"step: expected at least 1 pixel, got {self.step}")
        if self.grid < 1 or self.cell < self.digit:
            raise ValueError(
                f"grid: expected cells that hold a digit of {self.digit} pixels, got "
                f"{self.grid} x {self.grid} cells of {self.cell} pixels on a canvas of {self.canvas}"
            )
        low, high = self.digits
        if not 1 <= low <= high <= self.cells:
            raise ValueError(f"digits: expected 1 <= low <= high <= {self.cells} cells, got {self.digits}")
        if not 1 <= self.repeat_classes <= CLASSES:
            raise ValueError(f"repeat_classes: expected 1 to {CLASSES}, got {self.repeat_classes}")
        if not 0 <= self.repeat_share <= 1:
            raise ValueError(f"repeat_share: expected a share in [0, 1], got {self.repeat_share}")

    @property
    def cells(self) -> int:
        return self.grid**2

    @property
    def jitter(self) -> int:
        return self.patch if self.step is None else self.step

    @property
    def cell(self) -> int:
        """Side of a cell: a whole number of steps, so that aligned digits stay aligned."""
        return self.canvas // self.grid // self.jitter * self.jitter

    @property
    def origins(self) -> np.ndarray:
        """int64 [grid]: where the cells begin on each axis."""
        begin = np.linspace(0, self.canvas - self.cell, self.grid).astype(np.int64)
        return begin // self.jitter * self.jitter

    def dense(self) -> "SceneConfig":
        """The same canvas with more digits (5 to 9 of 9 cells): more to see for the vision stage."""
        return replace(self, digits=(min(5, self.cells), self.cells))


@dataclass(frozen=True)
class Scenes:
    """S scenes with C = grid^2 cells in raster order.

    pixels uint8 [S, H, W]; digit int32 [S, C], the digit in each cell; instance int32 [S, C], its row in
    scikit-learn's table; box int32 [S, C, 4] (y0, x0, y1, x1; end exclusive); all three -1 where the cell
    is empty; index int64 [S], the scenes' numbers; seed; config.
    """

    pixels: np.ndarray
    digit: np.ndarray
    instance: np.ndarray
    box: np.ndarray
    index: np.ndarray
    seed: int
    config: SceneConfig

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows) -> "Scenes":
        """The scenes at `rows` (slice or integer array)."""
        arrays = (a[rows] for a in (self.pixels, self.digit, self.instance, self.box, self.index))
        return Scenes(*arrays, self.seed, self.config)

    @property
    def images(self) -> np.ndarray:
        """float32 [S, H, W]; ink is about 0.7 to 1, the background noise around 0."""
        return self.pixels * np.float32((HIGH - LOW) / 255) + np.float32(LOW)

    @property
    def presence(self) -> np.ndarray:
        """float32 [S, 10]: 1 where the digit occurs in the scene."""
        return (self.digit[:, :, None] == np.arange(CLASSES)).any(1).astype(np.float32)

    @property
    def patch_labels(self) -> np.ndarray:
        """int32 [S, (H/patch)^2], raster order: the digit whose box holds the patch's centre, else 10."""
        side = self.config.canvas // self.config.patch
        centre = (np.arange(side) + 0.5) * self.config.patch
        low, high = self.box[..., :2, None], self.box[..., 2:, None]
        inside = (low <= centre) & (centre < high)  # [S, C, axis, side]
        held = inside[:, :, 0, :, None] & inside[:, :, 1, None, :]
        held = held.reshape(len(self), self.config.cells, side * side)
        label = np.take_along_axis(self.digit, held.argmax(1), axis=1)
        return np.where(held.any(1), label, BACKGROUND).astype(np.int32)


def _paint(images, row, occupied, corner, contrast, config: SceneConfig) -> np.ndarray:
    """Ink f32 [S, H, W]: images[row] times contrast at `corner` of every occupied cell."""
    canvas = np.zeros((len(row), config.canvas, config.canvas), np.float32)
    span = np.arange(config.digit)
    for cell in range(config.cells):  # cells do not overlap: one scatter per cell paints it in all scenes
        scene = np.flatnonzero(occupied[:, cell])
        ys = corner[scene, cell, 0][:, None, None] + span[None, :, None]
        xs = corner[scene, cell, 1][:, None, None] + span[None, None, :]
        ink = images[row[scene, cell]] * contrast[scene, cell].astype(np.float32)[:, None, None]
        canvas[scene[:, None, None], ys, xs] = ink
    return canvas


def _expose(ink: np.ndarray, noise: float, seed: int, index: np.ndarray, out: np.ndarray) -> None:
    """Add each scene's noise to its ink and quantise into out, uint8 [S, H, W]."""
    for i in range(len(index)):  # one scene at a time stays in the processor's cache
        level = generator(seed, NOISE, int(index[i])).standard_normal(ink.shape[1:], np.float32)
        level *= np.float32(noise)
        level += ink[i]
        level -= np.float32(LOW)
        level *= np.float32(255 / (HIGH - LOW))
        out[i] = np.clip(np.rint(level, out=level), 0, 255, out=level)


def make_scenes(bank: DigitBank, config: SceneConfig, *, seed: int, start: int, stop: int) -> Scenes:
    """Scenes start..stop of the endless sequence that (bank, config, seed) names.

    bank: digits of the split to use (`digits.digit_bank`), of side config.digit. Raises ValueError on a
    bank of another size or without some class, and on an empty or negative range.
    """
    if bank.images.shape[1:] != (config.digit, config.digit):
        raise ValueError(f"bank: expected images of side {config.digit}, got {bank.images.shape[1:]}")
    if not 0 <= start < stop:
        raise ValueError(f"start, stop: expected 0 <= start < stop, got {start}, {stop}")
    per_class = np.bincount(bank.labels, minlength=CLASSES)
    if (per_class == 0).any():
        missing = np.flatnonzero(per_class == 0).tolist()
        raise ValueError(f"bank: expected every digit 0-9, got none of {missing}")

    index = np.arange(start, stop)
    cells, size, count = config.cells, config.digit, stop - start
    u = uniforms(seed, LAYOUT, index, 2 + CLASSES + 6 * cells)
    u_count, u_repeat = u[:, 0], u[:, 1]
    u_classes, u_cell = u[:, 2 : 2 + CLASSES], u[:, 2 + CLASSES :].reshape(count, 6, cells)

    total = integers(u_count, config.digits[0], config.digits[1] + 1)
    rank = np.argsort(order(u_cell[:, 0]), axis=1)
    occupied = rank < total[:, None]

    pool = np.where(u_repeat < config.repeat_share, config.repeat_classes, CLASSES)
    digit = np.take_along_axis(order(u_classes), integers(u_cell[:, 1], 0, pool[:, None]), axis=1)
    first = np.cumsum(per_class) - per_class
    sorted_rows = np.argsort(bank.labels, kind="stable")
    row = sorted_rows[first[digit] + integers(u_cell[:, 2], 0, per_class[digit])]

    places = (config.cell - size) // config.jitter + 1
    shift = integers(u_cell[:, 3:5], 0, places) * config.jitter  # [S, 2, C]
    origin = np.stack([a.ravel() for a in np.meshgrid(config.origins, config.origins, indexing="ij")])
    corner = (origin + shift).transpose(0, 2, 1)
    contrast = config.contrast[0] + u_cell[:, 5] * (config.contrast[1] - config.contrast[0])

    pixels = np.empty((count, config.canvas, config.canvas), np.uint8)
    for begin in range(0, count, BLOCK):
        part = slice(begin, begin + BLOCK)
        ink = _paint(bank.images, row[part], occupied[part], corner[part], contrast[part], config)
        _expose(ink, config.noise, seed, index[part], out=pixels[part])

    box = np.concatenate([corner, corner + size], -1)
    return Scenes(
        pixels=pixels,
        digit=np.where(occupied, digit, -1).astype(np.int32),
        instance=np.where(occupied, bank.instance[row], -1).astype(np.int32),
        box=np.where(occupied[..., None], box, -1).astype(np.int32),
        index=index,
        seed=seed,
        config=config,
    )
