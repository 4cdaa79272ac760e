"""Images as a checkpoint's preprocessor_config.json asks: resize, crop, rescale, normalise, and tiles of large ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from jaxattn.core.types import expect
from models.multimodal.pictures import best_pinpoint

DEFAULTS = dict(do_convert_rgb=True, do_resize=True, size=224, resample=3, do_center_crop=False, crop_size=None,
                do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                do_pad=False, image_grid_pinpoints=None, patch_size=None, merge_size=None, temporal_patch_size=2,
                min_pixels=None, max_pixels=None)  # fmt: skip
ANY_SIZE = dict(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}, patch_size=14, merge_size=2)  # Qwen2-VL's
INERT = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "data_format", "image_seq_length",
         "input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square",
         "aspect_ratio_setting", "_valid_processor_keys"}  # fmt: skip


def read_processor(path: str | Path) -> dict:
    """The fields of preprocessor_config.json over the usual defaults; ValueError names those that are not supported."""
    file = Path(path) / "preprocessor_config.json"
    if file.is_file():
        raw = json.loads(file.read_text())
    else:  # transformers 5 writes one file for tokenizer and images
        file = Path(path) / "processor_config.json"
        raw = json.loads(file.read_text()).get("image_processor") if file.is_file() else None
    if not isinstance(raw, dict):
        raise ValueError(f"path: expected preprocessor_config.json in {path}, or an image_processor in processor_config.json")
    raw = {k: v for k, v in raw.items() if v is not None}
    unknown = {k: v for k, v in raw.items() if k not in DEFAULTS and k not in INERT}
    if unknown or (raw.get("do_pad") and "image_grid_pinpoints" not in raw):  # of tiles it pads the batch, not the picture
        raise ValueError(f"{file}: fields that are not supported: {unknown or 'do_pad'}")
    merges = "merge_size" in raw or "Qwen2VL" in raw.get("image_processor_type", "")
    found = {**DEFAULTS, **(ANY_SIZE if merges else {}), **{k: v for k, v in raw.items() if k in DEFAULTS}}
    if found["merge_size"] is None:
        return found
    given = {"shortest_edge": found["min_pixels"], "longest_edge": found["max_pixels"]}
    size = found["size"] if isinstance(found["size"], dict) else {"size": found["size"]}
    size = {**ANY_SIZE["size"], **size, **{k: v for k, v in given.items() if v is not None}}
    if set(size) != set(ANY_SIZE["size"]):
        raise ValueError(f"{file}: size: expected shortest_edge and longest_edge, in pixels, got {size}")
    return {**found, "size": size}


def picture(image):
    """A PIL image in RGB, of a PIL image or uint8 [H, W] (grey), [H, W, 3] or [H, W, 4]; what is transparent is white."""
    from PIL import Image

    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_picture(file: str | Path):
    """A picture from a file. Raises ValueError for a file that is missing or holds none."""
    from PIL import Image, UnidentifiedImageError

    try:
        return picture(Image.open(file))
    except UnidentifiedImageError:
        raise ValueError(f"image: expected a picture, got {str(file)!r}") from None
    except OSError as error:
        raise ValueError(f"image: {error}") from None


def crops(image, fields: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """(float32 [crops, H', W', 3], (height, width) of the picture): one crop, or a thumbnail and the tiles of the best of
    ``image_grid_pinpoints`` in raster order, the picture fitted into them and padded with black.

    Where the tower merges patches: ([1, patches, patch * patch * 3] in blocks, (height, width) that was cut into them)."""
    image = picture(image)
    size = image.size[::-1]
    if fields["merge_size"]:
        return in_blocks(image, fields)
    if not fields["image_grid_pinpoints"]:
        return prepare(image, fields)[None], size
    thumbnail, tile = _sides(fields["size"]), _sides(fields["crop_size"] or fields["size"])
    parts = tiles(image, fields["image_grid_pinpoints"], thumbnail, tile[0], fields["resample"])
    return np.stack([prepare(part, fields) for part in parts]), size


def tiles(image, pinpoints, thumbnail: tuple[int, int], side: int, resample: int) -> list:
    """PIL images: the whole picture at ``thumbnail`` (height, width), then squares of ``side`` pixels."""
    from PIL import Image

    size, how = image.size[::-1], Image.Resampling(resample)
    target = best_pinpoint(size, pinpoints)
    scale = min(t / s for t, s in zip(target, size, strict=True))
    new = [t if t / s == scale else min(math.ceil(s * scale), t) for t, s in zip(target, size, strict=True)]
    canvas = Image.new("RGB", target[::-1])
    canvas.paste(image.resize(new[::-1], how), ((target[1] - new[1]) // 2, (target[0] - new[0]) // 2))
    boxes = [(x, y, x + side, y + side) for y in range(0, target[0], side) for x in range(0, target[1], side)]
    return [image.resize(thumbnail[::-1], how), *(canvas.crop(box) for box in boxes)]


def in_blocks(image, fields: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """(patches of an RGB picture, block after block, at the nearest size of whole blocks within the limits; that size)."""
    p, m = fields["patch_size"], fields["merge_size"]
    size = whole_blocks(image.size[::-1], p * m, *(fields["size"][k] for k in ("shortest_edge", "longest_edge")))
    size = size if fields["do_resize"] else image.size[::-1]
    expect("image", image.size[::-1], f"sides in multiples of {p * m}", not any(s % (p * m) for s in size))
    x = prepare(image, {**fields, "size": dict(height=size[0], width=size[1])})
    x = x.reshape(size[0] // (p * m), m, p, size[1] // (p * m), m, p, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    return x.reshape(1, -1, p * p * 3), size


def whole_blocks(size: tuple[int, int], block: int, least: int, most: int) -> tuple[int, int]:
    """(height, width) in multiples of ``block`` nearest to ``size``, with between ``least`` and ``most`` pixels."""
    expect("image", size, "sides that differ by a factor of 200 at most", max(size) <= 200 * min(size))
    near = [round(s / block) * block for s in size]
    if near[0] * near[1] > most:
        by = math.sqrt(size[0] * size[1] / most)
        near = [max(block, math.floor(s / by / block) * block) for s in size]
    elif near[0] * near[1] < least:
        by = math.sqrt(least / (size[0] * size[1]))
        near = [math.ceil(s * by / block) * block for s in size]
    return tuple(near)


def _sides(size) -> tuple[int, int]:
    """(height, width) of a size that names a square, or both sides."""
    if isinstance(size, dict):
        return (size["shortest_edge"],) * 2 if "shortest_edge" in size else (size["height"], size["width"])
    return size, size


def prepare(image, fields: dict) -> np.ndarray:
    """A PIL image, or uint8 [H, W, 3], as float32 [H', W', 3]: what the vision tower reads."""
    from PIL import Image

    image = picture(image)
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
