import re

import numpy as np
import pytest

from train.data import packing, text
from train.data.pipeline import make_tokenizer

SAMPLE = "def f(x):\n    return x + 1  # <bos> is text, naïve too: ß 日本\n"


@pytest.fixture(scope="module")
def library():
    return text.standard_library()


@pytest.fixture(scope="module")
def bpe(library):
    return text.BPETokenizer.train([d.text for d in library[:60]], 600)


def test_standard_library_is_found_in_a_fixed_order(library):
    names = [d.name for d in library]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {"dataclasses.py", "json/decoder.py"} <= set(names)
    assert not any(set(name.split("/")) & text.SKIPPED_FOLDERS for name in names)
    assert sum(len(d.text) for d in library) > 3e6


def test_splits_share_no_file_and_miss_none(library):
    train = {d.name for d in text.documents(split="train")}
    held = {d.name for d in text.documents(split="validation")}
    assert not train & held and train | held == {d.name for d in library}
    assert abs(len(held) / len(library) - 0.05) < 0.01
    assert held == {d.name for d in text.documents(split="validation")}


def test_byte_tokenizer():
    tokenizer = text.ByteTokenizer()
    ids = tokenizer.encode(SAMPLE)
    assert ids.dtype == np.int32 and ids.tolist() == list(SAMPLE.encode())
    assert tokenizer.decode(ids) == SAMPLE
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad, tokenizer.mask]) == SAMPLE
    specials = {tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask}
    assert specials == set(range(256, tokenizer.vocab_size))


def test_bpe_round_trip_and_compression(bpe):
    ids = bpe.encode(SAMPLE)
    assert bpe.decode(ids) == SAMPLE  # "<bos>" written in a text stays text
    assert ids.min() >= 4 and ids.max() < bpe.vocab_size == 600
    assert len(ids) < len(SAMPLE.encode()) * 0.8
    assert bpe.decode([bpe.bos, *ids, bpe.eos]) == SAMPLE
    np.testing.assert_array_equal(bpe.encode_all(["x", SAMPLE])[1], ids)


def test_bpe_training_is_reproducible_and_cached(bpe, library, tmp_path, monkeypatch):
    texts = [d.text for d in library[:60]]
    first = text.trained_bpe(texts, 600, tmp_path)
    assert first.tokenizer.get_vocab() == bpe.tokenizer.get_vocab()
    assert len(list(tmp_path.rglob("tokenizer.json"))) == 1 and not list(tmp_path.rglob("*.tmp"))
    other = text.trained_bpe(texts[:10], 400, tmp_path)
    assert other.vocab_size == 400 and len(list(tmp_path.rglob("tokenizer.json"))) == 2

    monkeypatch.setattr(text.BPETokenizer, "train", None)  # a second time nothing is trained
    again = text.trained_bpe(texts, 600, tmp_path)
    np.testing.assert_array_equal(again.encode(SAMPLE), bpe.encode(SAMPLE))


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(ValueError, match="vocab_size: expected at least 260, got 100"):
        text.BPETokenizer.train(["a"], 100)
    with pytest.raises(ValueError, match="path: .* got no such file"):
        make_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="path: .*expected a tokenizer.json"):
        make_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer: expected 'byte', 'bpe' or .* got 'words'"):
        make_tokenizer("words")


def test_own_folder_of_text(tmp_path):
    for i in range(10):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / f"{i}.txt").write_text(f"text {i}\n")
    (tmp_path / ".hidden").write_bytes(b"\0")
    train, held = (
        text.documents(tmp_path, validation=0.2),
        text.documents(tmp_path, split="validation", validation=0.2),
    )
    assert len(train) == 8 and len(held) == 2
    assert {d.text for d in train + held} == {f"text {i}\n" for i in range(10)}


def test_own_single_file_is_cut_at_a_line(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("".join(f"line {i}\n" for i in range(100)))
    (train,), (held,) = (
        text.documents(file, validation=0.1),
        text.documents(file, split="validation", validation=0.1),
    )
    assert train.text + held.text == file.read_text()
    assert train.text.endswith("\n") and 8 <= held.text.count("\n") <= 12


@pytest.mark.parametrize(
    "content, got",
    [
        (None, "no such file or folder"),
        (b"", "an empty file"),
        (b" \n\t", "an empty file"),
        (b"\x7fELF\0\1", "a binary file"),
        (b"caf\xe9", "not UTF-8 at offset 3"),
        (b"x", "1 characters"),
    ],
)
def test_unreadable_text_names_argument_path_and_finding(tmp_path, content, got):
    file = tmp_path / "file.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^data: {re.escape(str(file))}: expected .*{got}"):
        text.documents(file)


def test_one_bad_file_in_a_folder_is_named_and_an_empty_folder_too(tmp_path):
    with pytest.raises(ValueError, match="a folder without files"):
        text.documents(tmp_path)
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.bin").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match=r"b\.bin: expected a UTF-8 text file"):
        text.documents(tmp_path)


def test_packing_loses_nothing_and_marks_documents():
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 99, n).astype(np.int32) for n in (5, 1, 17, 30, 2)]
    windows = packing.pack(documents, 8, pad=0)
    record = windows.fetch(np.arange(len(windows)))
    assert all(array.shape == (7, 8) for array in record.values())
    stream = np.concatenate(documents)
    live = record["segment"] > 0
    np.testing.assert_array_equal(record["tokens"][live], stream)
    trained = record["loss_mask"] > 0
    # Every token but the first of each document is a target exactly once.
    np.testing.assert_array_equal(record["targets"][trained], np.concatenate([d[1:] for d in documents]))
    np.testing.assert_array_equal(record["targets"].ravel()[: len(stream) - 1], stream[1:])

    owner = np.concatenate([np.full(len(d), i) for i, d in enumerate(documents)])
    place = np.concatenate([np.arange(len(d)) for d in documents])
    for w in range(7):
        mine = slice(8 * w, 8 * w + 8)
        number = record["segment"][w][live[w]]
        np.testing.assert_array_equal(number, owner[mine] - owner[8 * w] + 1)
        first = place[mine] - np.where(
            number == 1, place[8 * w], 0
        )  # a document cut by the window begins again
        np.testing.assert_array_equal(record["position"][w][live[w]], first)
    types = {name: array.dtype.name for name, array in record.items()}
    assert types.pop("loss_mask") == "float32" and set(types.values()) == {"int32"}


def test_bad_packing_is_named():
    with pytest.raises(ValueError, match="length: expected at least 1"):
        packing.pack([np.arange(4)], 0, pad=0)
    with pytest.raises(ValueError, match="documents: expected at least two tokens, got 1"):
        packing.pack([np.arange(1)], 4, pad=0)
