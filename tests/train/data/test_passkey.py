"""Passkeys: every answer stands in the text, in its range of depths, and rows belong to their numbers."""

import re

import numpy as np
import pytest

from train.data.passkey import WORDS, passkeys

HAYSTACK = list(b"All work and no play makes a dull text. " * 20)


def encode(text):
    return list(text.encode())


def make(count=3, **changes):
    how = dict(encode=encode, haystack=HAYSTACK, length=2048, keys=3, words=4, seed=5) | changes
    return passkeys(count, **how)


def test_answers_stand_in_the_text_at_their_depths():
    record = make(6)
    depths = []
    for row in range(6):
        text = bytes(record["tokens"][row].astype(np.uint8)).decode()
        body, questions = text[: text.index("\nWhat was")], text[text.index("\nWhat was") :]
        counts = record["loss_mask"][row] > 0
        target = bytes(record["targets"][row][counts].astype(np.uint8)).decode()
        answers = [m.strip() for m in re.findall(r"passkey is:((?: \w+)+)", questions)]
        assert len(answers) == 3 and target == "".join(f" {a}" for a in answers)
        for ordinal, answer in zip(("first", "second", "third"), answers, strict=True):
            assert f"The {ordinal} passkey is: {answer}." in body and len(answer.split()) == 4
            assert set(answer.split()) <= set(WORDS)
            depths.append(body.index(f"The {ordinal} passkey") / len(body))
        # A target is the token that follows; nothing else is asked.
        at = np.flatnonzero(counts)
        np.testing.assert_array_equal(record["targets"][row][at], record["tokens"][row][at + 1])
        assert at.min() > len(body)
    assert 0.04 < min(depths) < 0.4 and 0.6 < max(depths) < 0.97


def test_rows_belong_to_their_numbers():
    whole, part = make(5), make(2, start=3)
    for name in whole:
        np.testing.assert_array_equal(whole[name][3:], part[name])
    assert (make(1)["tokens"] != make(1, seed=6)["tokens"]).any()


def test_contexts_are_drawn_and_padded():
    record = make(12, contexts=(1200, 1600, 2048))
    sizes = record["segment"].sum(1)
    assert set(sizes) == {1200, 1600, 2048}
    for row, size in enumerate(sizes):
        assert record["tokens"][row, size - 1] and not record["tokens"][row, size:].any()
        assert not record["loss_mask"][row, size - 1 :].any()
        np.testing.assert_array_equal(record["position"][row, :size], np.arange(size))


@pytest.mark.parametrize("changes, name", [(dict(keys=21), "keys"), (dict(contexts=(4096,)), "contexts"),
                                           (dict(length=300), "contexts"), (dict(depths=(0.9, 0.1)), "depths"),
                                           (dict(haystack=[]), "haystack")])  # fmt: skip
def test_wrong_arguments_are_named(changes, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        make(**changes)
