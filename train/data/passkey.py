"""Passkeys in a long text: the task on which DuoAttention (arXiv:2410.10819) trains its gates.

Sequences of random spelling words are hidden at random depths of a haystack, each under its ordinal; at the end all are
asked for, and only the words of the answers count in the loss. Nothing but a look across the whole text helps.
"""

from collections.abc import Callable, Sequence

import numpy as np

from train.data.draws import generator, integers

PASSKEY = 43  # random stream
WORDS = (
    "alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
).split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
).split()
GRID = 1000  # depths between the shallowest and the deepest


def passkeys(
    count: int,
    *,
    encode: Callable[[str], Sequence[int]],
    haystack: Sequence[int],
    length: int,
    contexts: Sequence[int] | None = None,
    keys: int = 10,
    words: int = 32,
    depths: tuple[float, float] = (0.05, 0.95),
    seed: int = 0,
    start: int = 0,
) -> dict[str, np.ndarray]:
    """Layout records [count, length]; row start + i depends on (seed, start + i) alone.

    Args:
        encode: text to token ids.
        haystack: token ids of a long text, read cyclically from a random place.
        length: tokens per row.
        contexts: lengths to draw a row's from, the rest being padding (segment 0); default `length` alone.
        keys: passkeys per row, at most 20. words: spelling words per passkey, drawn with replacement.
        depths: range of the share of the haystack before a passkey; distinct places on a grid of 1000.
    """
    contexts = (length,) if contexts is None else tuple(contexts)
    haystack = np.asarray(haystack, np.int64)
    low, high = depths
    if not 1 <= keys <= len(ORDINALS) or words < 1:
        raise ValueError(f"keys, words: expected 1 to {len(ORDINALS)} keys of at least 1 word, got {keys}, {words}")
    if not contexts or max(contexts) > length:
        raise ValueError(f"contexts: expected lengths of at most length = {length}, got {contexts}")
    if not 0 <= low < high <= 1:
        raise ValueError(f"depths: expected a range in [0, 1], got {depths}")
    if len(haystack) < 1:
        raise ValueError("haystack: expected at least one token, got none")
    record = {name: np.zeros((count, length), np.int32) for name in ("tokens", "targets", "segment", "position")}
    record["loss_mask"] = np.zeros((count, length), np.float32)
    for row in range(count):
        draw = generator(seed, PASSKEY, start + row)
        size = contexts[int(integers(draw.random(), 0, len(contexts)))]
        tokens, answer = _row(draw, size, encode, haystack, keys, words, depths)
        record["tokens"][row, :size] = tokens
        record["targets"][row, : size - 1] = np.where(answer[1:], tokens[1:], 0)
        record["loss_mask"][row, : size - 1] = answer[1:]
        record["segment"][row, :size] = 1
        record["position"][row, :size] = np.arange(size)
    return record


def _row(draw, size: int, encode, haystack: np.ndarray, keys: int, words: int, depths) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [size], which of them are answers)."""
    secrets = [" ".join(WORDS[i] for i in integers(draw.random(words), 0, len(WORDS))) for _ in range(keys)]
    ids = lambda text: np.asarray(encode(text), np.int64)  # noqa: E731
    hidden = [ids(f"\nThe {o} passkey is: {s}.\n") for o, s in zip(ORDINALS, secrets, strict=False)]
    tail, asked = [], []
    for ordinal, secret in zip(ORDINALS, secrets, strict=False):
        question, answer = ids(f"\nWhat was the {ordinal} passkey? The {ordinal} passkey is:"), ids(f" {secret}")
        tail += [question, answer]
        asked += [np.zeros(len(question), bool), np.ones(len(answer), bool)]
    room = size - sum(map(len, hidden)) - sum(map(len, tail))
    if room < keys:
        raise ValueError(f"contexts: expected more than {size - room + keys} tokens for {keys} passkeys, got {size}")
    text = haystack[(int(integers(draw.random(), 0, len(haystack))) + np.arange(room)) % len(haystack)]
    grid = np.sort(draw.permutation(GRID)[:keys])
    places = np.floor((depths[0] + grid / (GRID - 1) * (depths[1] - depths[0])) * room).astype(int)
    order = draw.permutation(keys)  # ordinals say nothing about depth
    pieces, before = [], 0
    for place, which in zip(places, order, strict=True):
        pieces += [text[before:place], hidden[which]]
        before = place
    body = np.concatenate([*pieces, text[before:]])
    return np.concatenate([body, *tail]), np.concatenate([np.zeros(len(body), bool), *asked])
