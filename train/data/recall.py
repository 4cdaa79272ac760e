"""Synthetic recall: what was said earlier in the sequence must be said again.

Every task gives the layout record of `packing` ([N, T]) for sequences start..start + count, determined by
(seed, number); the loss is on the answers alone, and each answer is the token that followed the same cue
before.
"""

import numpy as np

from train.data.draws import integers, order, uniforms

MQAR, NEEDLE, INDUCTION = 40, 41, 42  # random streams


def _record(tokens: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """targets: -1 where nothing is asked."""
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.maximum(targets, 0).astype(np.int32),
        "loss_mask": (targets >= 0).astype(np.float32),
        "segment": np.ones(tokens.shape, np.int32),
        "position": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape).copy(),
    }


def mqar(
    count: int,
    *,
    length: int = 128,
    pairs: int = 8,
    vocab: int = 512,
    power: float = 0.01,
    seed: int = 0,
    start: int = 0,
) -> dict[str, np.ndarray]:
    """Multi-query associative recall (Zoology, arXiv:2312.04927).

    `pairs` key-value pairs (distinct keys from the lower half of the vocabulary without 0, values from the
    upper half) come first; each key is asked once more at an even offset after them, its slot drawn with a
    weight that falls as slot^(power - 1), so that most are asked soon. All else is token 0.
    """
    slots = (length - 2 * pairs) // 2
    if pairs < 1 or slots < pairs:
        raise ValueError(f"length: expected at least 4 * pairs = {4 * pairs} with pairs >= 1, got {length}")
    half = vocab // 2
    if half - 1 < pairs:
        raise ValueError(f"vocab: expected at least {2 * (pairs + 1)} for {pairs} distinct keys, got {vocab}")
    if power <= 0:
        raise ValueError(f"power: expected a positive number, got {power!r}")
    u = uniforms(seed, MQAR, np.arange(start, start + count), half - 1 + pairs + slots)
    keys = 1 + order(u[:, : half - 1])[:, :pairs]
    values = integers(u[:, half - 1 : half - 1 + pairs], half, vocab)
    # Smallest exponential race times: draws without replacement, in proportion to the weights.
    weight = np.arange(1, slots + 1, dtype=float) ** (power - 1)
    slot = np.argsort(-np.log1p(-u[:, -slots:]) / weight, axis=1)[:, :pairs]
    tokens = np.zeros((count, length), np.int64)
    targets = np.full((count, length), -1)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    at = 2 * pairs + 2 * slot
    np.put_along_axis(tokens, at, keys, 1)
    np.put_along_axis(targets, at, values, 1)
    return _record(tokens, targets)


def needle(
    count: int,
    *,
    length: int = 256,
    vocab: int = 256,
    depth: float | None = None,
    seed: int = 0,
    start: int = 0,
) -> dict[str, np.ndarray]:
    """Needle in a haystack: random filler, one marker (token 1) followed by a value, the marker again as
    last token.

    depth: where the needle lies, 0 = first position, 1 = last possible; None draws it. The filler never
    uses tokens 0 and 1.
    """
    if length < 3 or vocab < 3:
        raise ValueError(f"length, vocab: expected at least 3 each, got {length}, {vocab}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth: expected a share in [0, 1], got {depth!r}")
    u = uniforms(seed, NEEDLE, np.arange(start, start + count), length + 1)
    tokens = integers(u[:, :length], 2, vocab)
    last = length - 3  # the value follows, then the question
    at = integers(u[:, length], 0, last + 1) if depth is None else np.full(count, round(depth * last))
    row = np.arange(count)
    tokens[row, at] = 1
    tokens[:, -1] = 1
    targets = np.full((count, length), -1)
    targets[:, -1] = tokens[row, at + 1]
    return _record(tokens, targets)


def induction(
    count: int, *, period: int = 32, repeats: int = 2, vocab: int = 64, seed: int = 0, start: int = 0
):
    """Repeated random sequences (arXiv:2209.11895): from the second round on each token predicts its old
    successor.

    The `period` tokens of a sequence are distinct, so the answer is unique; token 0 is not used. T = period
    * repeats.
    """
    if repeats < 2 or period < 1:
        raise ValueError(f"repeats, period: expected repeats >= 2 and period >= 1, got {repeats}, {period}")
    if vocab - 1 < period:
        raise ValueError(f"vocab: expected more than period = {period} tokens, got {vocab}")
    u = uniforms(seed, INDUCTION, np.arange(start, start + count), vocab - 1)
    once = 1 + order(u)[:, :period]
    tokens = np.tile(once, repeats)
    targets = np.roll(tokens, -1, 1)
    targets[:, :period] = -1
    targets[:, -1] = once[:, 0]
    return _record(tokens, targets)
