"""Text: the source of the standard library of the running interpreter, or the user's files, and two
tokenizers."""

import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.data.files import check_split, data_error, existing, hold_out

# Installed packages are not the library, and its own tests are three times its size and mostly tables.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
EXPECTED = "a UTF-8 text file or a folder of them"
SPECIALS = ("<pad>", "<bos>", "<eos>", "<mask>")


@dataclass(frozen=True)
class Document:
    name: str
    text: str


def standard_library(root: str | Path | None = None) -> list[Document]:
    """Every *.py of the interpreter's standard library (without tests and installed packages), by path."""
    root = Path(root or sysconfig.get_path("stdlib"))
    documents = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for file in files:
            if file.endswith(".py"):
                raw = (Path(folder) / file).read_bytes()
                try:
                    text = raw.decode()
                except UnicodeDecodeError:  # a few sources declare another encoding
                    continue
                if text.strip():
                    documents.append(Document((Path(folder) / file).relative_to(root).as_posix(), text))
    if not documents:
        raise data_error(root, "the *.py files of the standard library", "none")
    return sorted(documents, key=lambda document: document.name)


def _read(path: Path, name: str) -> Document:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise data_error(path, EXPECTED, f"{type(error).__name__}: {error.strerror}") from error
    if b"\0" in raw:
        raise data_error(path, EXPECTED, "a binary file (it holds a zero byte)")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise data_error(path, EXPECTED, f"bytes that are not UTF-8 at offset {error.start}") from error
    if not text.strip():
        raise data_error(path, EXPECTED, "an empty file")
    return Document(name, text)


def read_documents(data: str | Path) -> list[Document]:
    """The user's text: one file, or every file below a folder (hidden ones left out), in order of path."""
    path = existing(data, EXPECTED)
    if path.is_file():
        return [_read(path, path.name)]
    names = [file for file in path.rglob("*") if file.is_file()]
    names = [file.relative_to(path) for file in names]
    names = sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    if not names:
        raise data_error(path, EXPECTED, "a folder without files")
    return [_read(path / name, name) for name in names]


def documents(
    data: str | Path | None = None, *, split: str = "train", validation: float = 0.05
) -> list[Document]:
    """Documents of one split; data None is the standard library.

    The split is by file, by a hash of its name; a single file is cut at the line break nearest to its last
    `validation` share.
    """
    check_split(split)
    if not 0 < validation < 1:
        raise ValueError(f"validation: expected a share in (0, 1), got {validation!r}")
    found = standard_library() if data is None else read_documents(data)
    if len(found) == 1:
        name, text = found[0].name, found[0].text
        cut = text.rfind("\n", 0, max(1, round(len(text) * (1 - validation)))) + 1
        cut = cut or round(len(text) * (1 - validation))
        parts = text[:cut], text[cut:]
        if not all(part.strip() for part in parts):
            raise data_error(
                data, "enough text for a training and a validation part", f"{len(text)} characters"
            )
        return [Document(name, parts[split == "validation"])]
    return hold_out(found, validation, lambda document: document.name)[split == "validation"]


class ByteTokenizer:
    """UTF-8 bytes are tokens 0-255; the four special tokens follow."""

    pad, bos, eos, mask = 256, 257, 258, 259
    vocab_size = 260

    def encode(self, text: str) -> np.ndarray:
        """int32 [bytes of text]."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids) -> str:
        """Special tokens are left out; bytes that are no UTF-8 become the replacement character."""
        ids = np.ravel(np.asarray(ids))
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")


class BPETokenizer:
    """Byte-level BPE held in a `tokenizer.json` of the tokenizers library; special tokens are the first
    four ids."""

    pad, bos, eos, mask = range(4)

    def __init__(self, tokenizer):
        found = [tokenizer.token_to_id(name) for name in SPECIALS]
        if found != [0, 1, 2, 3]:
            raise ValueError(f"tokenizer: expected {SPECIALS} as ids 0-3, got {found}")
        tokenizer.encode_special_tokens = True  # "<bos>" in a text is text
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        from tokenizers import Tokenizer

        expected = "a tokenizer.json written by BPETokenizer.save"
        if not Path(path).is_file():
            raise ValueError(f"path: {path}: expected {expected}, got no such file")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception on malformed files
            raise ValueError(f"path: {path}: expected {expected}, got {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges until `vocab_size` tokens (or until no pair repeats); 256 bytes and 4 specials are
        the floor."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocab_size < 256 + len(SPECIALS):
            raise ValueError(f"vocab_size: expected at least {256 + len(SPECIALS)}, got {vocab_size!r}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json; a reader sees the old file or the new one, never half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        try:
            self.tokenizer.save(draft)
            os.replace(draft, path)
        finally:
            Path(draft).unlink(missing_ok=True)

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens]."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids) -> str:
        """Special tokens are left out."""
        return self.tokenizer.decode([int(i) for i in np.ravel(ids)], skip_special_tokens=True)


class CheckpointTokenizer:
    """The tokenizer of a checkpoint directory. Documents begin with its bos, if it has one, and end with its eos; padding,
    which nothing learns from, is the eos."""

    def __init__(self, folder: str | Path):
        from models.hub.text import read_text

        found = read_text(folder)
        self.tokenizer = found.tokenizer
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())
        self.bos = self.tokenizer.token_to_id(found.tokens.get("bos_token", ""))
        if not found.stop:
            raise ValueError(f"tokenizer: expected {folder} to say which token ends a text, got no eos_token")
        self.eos = self.pad = found.stop[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]


def trained_bpe(texts: Sequence[str], vocab_size: int, cache: str | Path | None) -> BPETokenizer:
    """BPE of these texts, from `cache`/bpe-<vocab>-<digest of the texts>/tokenizer.json if it is there."""
    if cache is None:
        return BPETokenizer.train(texts, vocab_size)
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    path = Path(cache) / f"bpe-{vocab_size}-{digest.hexdigest()[:16]}" / "tokenizer.json"
    if not path.exists():
        BPETokenizer.train(texts, vocab_size).save(path)
    return BPETokenizer.load(path)


def tokenize(found: Sequence[Document], tokenizer) -> list[np.ndarray]:
    """int32 token arrays, each beginning with bos (where the tokenizer has one) and ending with eos."""
    bos = np.array([] if tokenizer.bos is None else [tokenizer.bos], np.int32)
    eos = np.array([tokenizer.eos], np.int32)
    return [
        np.concatenate([bos, ids, eos]) for ids in tokenizer.encode_all([document.text for document in found])
    ]
