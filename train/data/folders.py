"""The user's own images: a folder with one subfolder per class, or a jsonl of images with questions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.data.files import (
    IMAGE_SUFFIXES,
    check_channels,
    check_split,
    data_error,
    existing,
    hold_out,
    read_image,
    verify_image,
)

KEYS = ("image", "question", "answer")


@dataclass(frozen=True)
class ImageFolder:
    """Images of one split: paths, labels int32 [n], classes (names of the subfolders, sorted)."""

    paths: tuple[Path, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """image float32 [B, size, size, channels] in [0, 1], label int32 [B]."""
        images = [read_image(self.paths[i], self.size, self.channels, self.paths[i]) for i in rows]
        return {"image": np.stack(images), "label": self.labels[rows]}


def image_folder(
    data: str | Path, *, size: int, channels: int = 3, split: str = "train", validation: float = 0.1
) -> ImageFolder:
    """Open `data`/<class>/<image>; every class is split by a hash of the file names."""
    check_split(split)
    check_channels(channels)
    expected = "a folder with one subfolder of images per class"
    root = existing(data, expected)
    if not root.is_dir():
        raise data_error(root, expected, "a file")
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    if len(folders) < 2:
        raise data_error(root, expected, f"{len(folders)} subfolders")
    paths, labels = [], []
    for label, folder in enumerate(folders):
        images = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        if len(images) < 2:
            raise data_error(folder, "at least two images (one to train, one to validate)", len(images))
        for image in images:
            verify_image(image, image)
        kept = hold_out(images, validation, lambda f: f.relative_to(root).as_posix())[split == "validation"]
        paths += kept
        labels += [label] * len(kept)
    return ImageFolder(
        tuple(paths), np.array(labels, np.int32), tuple(f.name for f in folders), size, channels
    )


@dataclass(frozen=True)
class ImageQuestions:
    """Images with a question and an answer each, tokenized in the layout record.

    A row is bos, question, newline, answer, eos, padding; only the answer and eos are trained.
    """

    entries: tuple[tuple[Path, str, str, str], ...]  # image, question, answer, place for errors
    tokenizer: object
    size: int
    channels: int
    length: int

    def __len__(self) -> int:
        return len(self.entries)

    def _tokens(self, question: str, answer: str) -> tuple[np.ndarray, int]:
        tokenizer = self.tokenizer
        asked, said = tokenizer.encode(question + "\n"), tokenizer.encode(answer)
        row = np.concatenate([[tokenizer.bos], asked, said, [tokenizer.eos]])
        return row, len(asked) + 1

    def fetch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """image float32 [B, size, size, channels] and the layout record [B, length]."""
        shape = (len(rows), self.length)
        out = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment", "position")}
        out["tokens"][:], out["loss_mask"] = self.tokenizer.pad, np.zeros(shape, np.float32)
        images = []
        for r, i in enumerate(rows):
            path, question, answer, where = self.entries[i]
            images.append(read_image(path, self.size, self.channels, where))
            row, begin = self._tokens(question, answer)
            used = len(row) - 1
            out["tokens"][r, :used], out["targets"][r, :used] = row[:-1], row[1:]
            out["loss_mask"][r, begin - 1 : used] = 1
            out["segment"][r, :used] = 1
            out["position"][r, :used] = np.arange(used)
        return {"image": np.stack(images), **out}


def json_lines(path: Path, expected: str) -> Iterator[tuple[str, object]]:
    """(where, value) of the lines of a jsonl that are not blank; a bad one is an error with its number. expected: the file in
    words."""
    if path.is_dir():
        raise data_error(path, expected, "a folder")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise data_error(path, expected, f"{type(error).__name__}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise data_error(where, "a JSON object", f"{error.msg} at column {error.colno}") from error


def question_image(path: Path, where: str, record: dict, keys: tuple[str, ...] = KEYS) -> Path:
    """The image of a line of the jsonl ``path`` (a path relative to it), readable; every one of ``keys`` must be a text."""
    for key in keys:
        if not isinstance(record.get(key), str) or not record[key].strip():
            got = repr(record[key]) if key in record else f"no {key!r} among {sorted(record)}"
            raise data_error(where, f"a text under {key!r}", got)
    image = path.parent / record["image"]
    verify_image(image, where)
    return image


def image_questions(
    data: str | Path,
    *,
    tokenizer,
    size: int,
    channels: int = 3,
    length: int = 128,
    split: str = "train",
    validation: float = 0.1,
) -> ImageQuestions:
    """Open a jsonl whose lines hold image (path relative to the file), question and answer.

    The split is by image, so that no validation image was seen. Every line is checked here: a bad one is an
    error with its number. Rows longer than `length` are errors too.
    """
    check_split(split)
    check_channels(channels)
    expected = "a jsonl file with one object of image, question, answer per line"
    path, entries, named = existing(data, expected), [], {}
    for where, record in json_lines(path, expected):
        if not isinstance(record, dict):
            raise data_error(where, "a JSON object", f"a {type(record).__name__}")
        image = question_image(path, where, record)
        named[image] = record["image"]
        entries.append((image, record["question"], record["answer"], where))
    images = sorted(named)
    if len(images) < 2:
        raise data_error(path, expected + " about at least two images", f"{len(images)} images")
    kept = set(hold_out(images, validation, named.get)[split == "validation"])
    found = ImageQuestions(tuple(e for e in entries if e[0] in kept), tokenizer, size, channels, length)
    for _, question, answer, where in found.entries:
        tokens = len(found._tokens(question, answer)[0]) - 1
        if tokens > length:
            raise data_error(where, f"question and answer within length={length} tokens", tokens)
    return found
