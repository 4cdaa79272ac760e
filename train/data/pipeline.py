"""Batches for training: a grain pipeline over record numbers, and one vectorised fetch per batch.

Shuffling, epochs and batching act on record numbers, so a batch costs one gather and the state of the
stream is one integer. Every process sees the same global order and keeps its rows of each global batch: the
processes' batches put side by side are the batch of a single process.

    batches = lm_dataset(length=256, batch_size=16)
    stream = iter(batches)          # a grain DatasetIterator
    batch = next(stream)            # dict of numpy arrays
    state = stream.get_state()      # JSON-like; stream.set_state(state) continues exactly there
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import numpy as np

from train.data import packing, recall, text
from train.data.digits import CLASSES, DigitBank, digit_bank
from train.data.files import check_split
from train.data.folders import image_folder, image_questions
from train.data.questions import KINDS, MIX, Vocabulary, ask, pack, transcripts
from train.data.scenes import SceneConfig, Scenes, make_scenes

Batch = dict[str, np.ndarray]
FIRST = {"train": 0, "validation": 2**40}  # numbers of generated records: the splits' ranges never meet


@dataclass(frozen=True, eq=False)
class Batches:
    """A stream of batches; `iter` starts it (again) from the beginning.

    fetch maps record numbers int64 [b] to a dict of arrays [b, ...]; size is the number of records;
    batch_size is global, each of `process_count` processes gets batch_size / process_count rows. epochs
    None never ends. A batch may span two epochs; when the stream ends, an incomplete last batch is dropped
    unless drop_remainder is False. info: what a model needs to know (vocab_size, tokenizer, classes, ...).
    """

    fetch: Callable[[np.ndarray], Batch]
    size: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    drop_remainder: bool = True
    process_index: int = 0
    process_count: int = 1
    prefetch: int = 2
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size: expected at least one record, got {self.size}")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index: expected 0 <= index < process_count={self.process_count}, "
                f"got {self.process_index}"
            )
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size: expected a positive multiple of process_count={self.process_count}, "
                f"got {self.batch_size}"
            )
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs: expected at least 1, or None for an endless stream, got {self.epochs}")
        if not self.drop_remainder and self.process_count > 1:
            raise ValueError(
                "drop_remainder: expected True with several processes (equal batches), got False"
            )
        if self.drop_remainder and self.epochs is not None and self.size * self.epochs < self.batch_size:
            raise ValueError(
                f"batch_size: expected at most {self.size * self.epochs}, the records of "
                f"{self.epochs} epochs, got {self.batch_size}"
            )

    def __len__(self) -> int:
        """Batches in one epoch (the last one may reach into the next)."""
        return -(-self.size // self.batch_size)

    def dataset(self) -> grain.IterDataset:
        rows = self.batch_size // self.process_count
        mine = slice(self.process_index * rows, (self.process_index + 1) * rows)
        numbers = grain.MapDataset.range(self.size)
        if self.shuffle:
            numbers = numbers.shuffle(seed=self.seed)
        numbers = numbers.repeat(self.epochs).batch(self.batch_size, drop_remainder=self.drop_remainder)
        fetch = self.fetch
        batches = numbers.map(lambda batch: fetch(np.asarray(batch)[mine]))
        # One reading thread: fetching is a few gathers, more threads would only compete with the step.
        reading = grain.ReadOptions(num_threads=min(1, self.prefetch), prefetch_buffer_size=self.prefetch)
        return batches.to_iter_dataset(reading)

    def __iter__(self) -> grain.DatasetIterator:
        return iter(self.dataset())


def make_tokenizer(
    kind: str,
    *,
    data: str | Path | None = None,
    vocab_size: int = 4096,
    cache: str | Path | None = None,
    validation: float = 0.05,
) -> text.ByteTokenizer | text.BPETokenizer:
    """The tokenizer that `kind` names: "byte", "bpe", or the path of a tokenizer.json.

    "bpe" is learned from the training documents of `data` and kept in the folder `cache`, if there is one.
    """
    if kind == "byte":
        return text.ByteTokenizer()
    if kind == "bpe":
        found = text.documents(data, validation=validation)
        return text.trained_bpe([document.text for document in found], vocab_size, cache)
    if kind.endswith(".json"):
        return text.BPETokenizer.load(kind)
    raise ValueError(f"tokenizer: expected 'byte', 'bpe' or the path of a tokenizer.json, got {kind!r}")


def lm_dataset(
    data: str | Path | None = None,
    *,
    length: int = 256,
    batch_size: int = 16,
    split: str = "train",
    tokenizer: Any = "byte",
    vocab_size: int = 4096,
    cache: str | Path | None = None,
    validation: float = 0.05,
    max_documents: int | None = None,
    **stream,
) -> Batches:
    """Packed windows of text: the layout record of `packing`, all [b, length].

    data: None for the standard library, a text file, or a folder of them. tokenizer: as in
    `make_tokenizer`, or one already made. max_documents keeps the first so many of the split. stream:
    fields of Batches (seed, epochs, ...). info: tokenizer, vocab_size, tokens (of the split).
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = make_tokenizer(
            str(tokenizer), data=data, vocab_size=vocab_size, cache=cache, validation=validation
        )
    found = text.documents(data, split=split, validation=validation)[:max_documents]
    encoded = text.tokenize(found, tokenizer)
    windows = packing.pack(encoded, length, pad=tokenizer.pad)
    info = {
        "tokenizer": tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "tokens": sum(len(document) for document in encoded),
    }
    return Batches(windows.fetch, len(windows), batch_size, info=info, **stream)


TASKS = {
    "mqar": (recall.mqar, 512),
    "needle": (recall.needle, 256),
    "induction": (recall.induction, 64),
}


def recall_dataset(
    task: str,
    *,
    count: int = 10000,
    batch_size: int = 16,
    split: str = "train",
    task_seed: int = 0,
    options: Mapping[str, Any] | None = None,
    **stream,
) -> Batches:
    """Sequences of one task of `recall` ("mqar", "needle", "induction"): the layout record, all [b, T].

    options: arguments of the task (length, pairs, vocab, ...). Validation takes another range of sequences.
    info: vocab_size.
    """
    check_split(split)
    if task not in TASKS:
        raise ValueError(f"task: expected one of {list(TASKS)}, got {task!r}")
    make, vocab = TASKS[task]
    record = make(count, seed=task_seed, start=FIRST[split], **(options or {}))

    def fetch(rows: np.ndarray) -> Batch:
        return {name: array[rows] for name, array in record.items()}

    info = {"vocab_size": (options or {}).get("vocab", vocab)}
    return Batches(fetch, count, batch_size, info=info, **stream)


def vit_dataset(
    data: str | Path | None = None,
    *,
    size: int = 16,
    batch_size: int = 64,
    split: str = "train",
    channels: int | None = None,
    bank: DigitBank | None = None,
    validation: float = 0.1,
    **stream,
) -> Batches:
    """Images with a class: image float32 [b, size, size, channels], label int32 [b].

    data: None for the handwritten digits (1 channel; augmented when training; `bank` replaces them), or a
    folder with one subfolder per class (3 channels unless said otherwise). info: classes (names), channels,
    size.
    """
    check_split(split)
    if data is not None:
        folder = image_folder(data, size=size, channels=channels or 3, split=split, validation=validation)
        info = {"classes": folder.classes, "channels": folder.channels, "size": size}
        return Batches(folder.fetch, len(folder), batch_size, info=info, **stream)
    if channels not in (None, 1):
        raise ValueError(f"channels: expected 1 (the digits are grey), got {channels!r}")
    bank = digit_bank(split, size=size) if bank is None else bank

    def fetch(rows: np.ndarray) -> Batch:
        return {"image": bank.images[rows][..., None], "label": bank.labels[rows]}

    info = {"classes": tuple(str(d) for d in range(CLASSES)), "channels": 1, "size": bank.images.shape[1]}
    return Batches(fetch, len(bank), batch_size, info=info, **stream)


def split_scenes(split: str, count: int, config: SceneConfig | None = None, *, seed: int = 0) -> Scenes:
    """`count` scenes of one split; validation scenes hold validation digits only, and differ in layout as
    well."""
    config = SceneConfig() if config is None else config
    bank = digit_bank(split, size=config.digit)
    return make_scenes(bank, config, seed=seed, start=FIRST[split], stop=FIRST[split] + count)


def vlm_dataset(
    data: str | Path | None = None,
    *,
    batch_size: int = 8,
    split: str = "train",
    count: int | None = None,
    config: SceneConfig | None = None,
    scenes: Scenes | None = None,
    scene_seed: int = 0,
    mix: tuple[tuple[str, int], ...] = MIX,
    with_transcript: bool = False,
    together: int | None = None,
    tokenizer: Any = "byte",
    size: int = 96,
    channels: int | None = None,
    length: int = 128,
    validation: float = 0.1,
    **stream,
) -> Batches:
    """Images with questions: image float32 [b, H, W, channels] and the layout record, all [b, L].

    data None: digit scenes (1 channel), `count` of them (None: 12000 to train, 2000 to validate) of
    `config`, or those given as `scenes`; made once and held as uint8 (9 KB each). The batch also has
      patch_labels int32 [b, P], presence float32 [b, 10], box int32 [b, C, 4];
      questions int32 [b, Q, T], answers int32 [b, Q], kind int32 [b, Q]; the record has L = Q * T;
      with_transcript: transcript_question int32 [b, T], transcript_answer int32 [b, A], and one more segment
      in the record, L = Q * T + T + A - 1;
      together: Q, questions of a scene that are asked in turn of those in `mix`; None: all.
    An empty `mix` leaves questions and record out (the vision stage needs none).

    data a jsonl of image, question, answer: see `folders.image_questions` (tokenizer, size, length apply);
    3 channels unless said otherwise, L = length.

    info: vocab_size, channels, size, and kinds and vocabulary (scenes) or tokenizer (jsonl).
    """
    check_split(split)
    if data is not None:
        if isinstance(tokenizer, str | Path):
            if str(tokenizer) == "bpe":
                raise ValueError("tokenizer: expected 'byte', a tokenizer.json or a tokenizer, got 'bpe'")
            tokenizer = make_tokenizer(str(tokenizer))
        found = image_questions(
            data,
            tokenizer=tokenizer,
            size=size,
            channels=channels or 3,
            length=length,
            split=split,
            validation=validation,
        )
        info = {
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer,
            "channels": channels or 3,
            "size": size,
        }
        return Batches(found.fetch, len(found), batch_size, info=info, **stream)

    if channels not in (None, 1):
        raise ValueError(f"channels: expected 1 (digit scenes are grey), got {channels!r}")
    if scenes is None:
        count = (12000 if split == "train" else 2000) if count is None else count
        scenes = split_scenes(split, count, config, seed=scene_seed)
    vocabulary = Vocabulary(scenes.config.grid)
    words: Batch = {}
    if mix:
        asked = ask(scenes, mix)
        asked = asked if together is None else asked.turn(scenes.index, together)
        words |= {"questions": asked.questions, "answers": asked.answers, "kind": asked.kind}
        more = ()
        if with_transcript:
            question, answer = transcripts(scenes)
            words |= {"transcript_question": question, "transcript_answer": answer}
            more = ((question, answer),)
        words |= pack(asked.questions, asked.answers, *more)
    elif with_transcript:
        raise ValueError("with_transcript: expected False without questions (mix is empty), got True")

    def fetch(rows: np.ndarray) -> Batch:
        chosen = scenes.take(rows)
        return {
            "image": chosen.images[..., None],
            "patch_labels": chosen.patch_labels,
            "presence": chosen.presence,
            "box": chosen.box,
            **{name: array[rows] for name, array in words.items()},
        }

    info = {
        "vocab_size": len(vocabulary),
        "vocabulary": vocabulary,
        "kinds": KINDS,
        "channels": 1,
        "size": scenes.config.canvas,
    }
    return Batches(fetch, len(scenes), batch_size, info=info, **stream)
