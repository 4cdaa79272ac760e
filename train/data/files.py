"""Reading the user's own files: one kind of error, one way to split them."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def data_error(where: object, expected: str, got: object) -> ValueError:
    """The error of every unreadable input: the argument `data`, the place, what was expected, what came."""
    return ValueError(f"data: {where}: expected {expected}, got {got}")


def existing(data: str | Path, expected: str) -> Path:
    path = Path(data).expanduser()
    if not path.exists():
        raise data_error(path, expected, "no such file or folder")
    return path


def hold_out(items: Sequence, fraction: float, name: Callable[..., str]) -> tuple[list, list]:
    """Split into (train, validation) by a hash of the name, so that listing order does not matter.

    Validation gets round(fraction * n) items, at least one and never all; order is that of `items`.
    """
    count = min(max(1, round(fraction * len(items))), len(items) - 1)
    by_hash = sorted(range(len(items)), key=lambda i: hashlib.sha256(name(items[i]).encode()).digest())
    held = set(by_hash[:count])
    return (
        [item for i, item in enumerate(items) if i not in held],
        [item for i, item in enumerate(items) if i in held],
    )


def check_split(split: str) -> None:
    if split not in ("train", "validation"):
        raise ValueError(f"split: expected 'train' or 'validation', got {split!r}")


def pillow():
    """`PIL.Image`, or an error that names the extra which brings it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'jaxattn[data]'") from error
    return Image


def verify_image(path: Path, where: object) -> None:
    """Read the header only: a folder of thousands must open quickly; decoding checks the body."""
    try:
        with pillow().open(path):
            pass
    except OSError as error:
        raise data_error(where, "a readable image", f"{path} ({error})") from error


def read_image(path: Path, size: int, channels: int, where: object) -> np.ndarray:
    """Decode, convert to grey (1) or RGB (3), resize to [size, size, channels] float32 in [0, 1]."""
    image_module = pillow()
    try:
        with image_module.open(path) as image:
            image = image.convert("L" if channels == 1 else "RGB")
            image = image.resize((size, size), image_module.Resampling.BILINEAR)
            pixels = np.asarray(image, np.float32) / 255
    except OSError as error:
        raise data_error(where, "a readable image", f"{path} ({error})") from error
    return pixels.reshape(size, size, channels)


def check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 (grey) or 3 (RGB), got {channels!r}")
