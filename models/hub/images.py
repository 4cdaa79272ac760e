"""Images as a checkpoint's preprocessor_config.json asks: resize, crop, rescale, normalise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jaxattn.core.types import expect

DEFAULTS = dict(do_convert_rgb=True, do_resize=True, size=224, resample=3, do_center_crop=False, crop_size=None,
                do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                do_pad=False)  # fmt: skip
INERT = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "data_format", "image_seq_length",
         "input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square"}  # fmt: skip


def read_processor(path: str | Path) -> dict:
    """The fields of preprocessor_config.json over the usual defaults; ValueError names those that are not supported."""
    file = Path(path) / "preprocessor_config.json"
    if not file.is_file():
        raise ValueError(f"path: expected preprocessor_config.json in {path}")
    raw = {k: v for k, v in json.loads(file.read_text()).items() if v is not None}
    unknown = {k: v for k, v in raw.items() if k not in DEFAULTS and k not in INERT}
    if unknown or raw.get("do_pad"):
        raise ValueError(f"{file}: fields that are not supported: {unknown or 'do_pad'}")
    return {**DEFAULTS, **{k: v for k, v in raw.items() if k in DEFAULTS}}


def prepare(image, fields: dict) -> np.ndarray:
    """A PIL image, or uint8 [H, W, 3], as float32 [H', W', 3]: what the vision tower reads."""
    from PIL import Image

    image = Image.fromarray(np.asarray(image)) if not isinstance(image, Image.Image) else image
    image = image.convert("RGB")
    if fields["do_resize"]:
        image = image.resize(_target(image.size, fields["size"]), Image.Resampling(fields["resample"]))
    x = np.asarray(image, np.float32)
    if fields["do_center_crop"]:
        x = _crop(x, fields["crop_size"] or fields["size"])
    x = x * np.float32(fields["rescale_factor"]) if fields["do_rescale"] else x
    if fields["do_normalize"]:
        x = (x - np.asarray(fields["image_mean"], np.float32)) / np.asarray(fields["image_std"], np.float32)
    return x.astype(np.float32)


def _target(now: tuple[int, int], size) -> tuple[int, int]:
    """(width, height) after resizing: a side for the shorter edge, or both sides."""
    width, height = now
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return size["width"], size["height"]
    if isinstance(size, dict):
        expect("size", size, "height and width, or shortest_edge", set(size) == {"shortest_edge"})
        short = size["shortest_edge"]
        long = int(short * max(now) / min(now))
        return (short, long) if width <= height else (long, short)
    return size, size


def _crop(x: np.ndarray, size) -> np.ndarray:
    h, w = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
    expect("crop_size", (h, w), f"at most the resized image, {x.shape[:2]}", h <= x.shape[0] and w <= x.shape[1])
    top, left = (x.shape[0] - h) // 2, (x.shape[1] - w) // 2
    return x[top : top + h, left : left + w]
