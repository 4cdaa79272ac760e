"""Documents to fixed-length windows in the layout record of every language objective.

The record, all [B, T]: tokens int32, targets int32 (the next token), loss_mask float32 (0 where the target
belongs to another document or is padding), segment int32 (documents of the window from 1, 0 = padding),
position int32 (from 0 at the start of each segment).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenWindows:
    """One stream of documents cut every `length` tokens: tokens and document (-1 = padding), int32 [n *
    length + 1]; starts int64 [documents], where each begins."""

    tokens: np.ndarray
    document: np.ndarray
    starts: np.ndarray
    length: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def fetch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The layout record of the windows at `rows`."""
        begin = np.asarray(rows)[:, None] * self.length
        at = begin + np.arange(self.length + 1)
        tokens, document = self.tokens[at], self.document[at]
        here, following = document[:, :-1], document[:, 1:]
        live = here >= 0
        position = at[:, :-1] - np.maximum(self.starts[here], begin)
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "loss_mask": (live & (here == following)).astype(np.float32),
            "segment": np.where(live, here - here[:, :1] + 1, 0).astype(np.int32),
            "position": np.where(live, position, 0).astype(np.int32),
        }


def pack(documents: Sequence[np.ndarray], length: int, *, pad: int) -> TokenWindows:
    """Lay documents (int arrays, with whatever begins and ends them) end to end; the last window is
    padded."""
    if length < 1:
        raise ValueError(f"length: expected at least 1 token, got {length!r}")
    sizes = np.array([len(document) for document in documents])
    if len(sizes) == 0 or sizes.sum() < 2:
        raise ValueError(f"documents: expected at least two tokens, got {int(sizes.sum())}")
    total = int(sizes.sum())
    padded = -(-(total - 1) // length) * length + 1
    tokens = np.full(padded, pad, np.int32)
    tokens[:total] = np.concatenate(documents)
    document = np.full(padded, -1, np.int32)
    document[:total] = np.repeat(np.arange(len(sizes)), sizes)
    return TokenWindows(tokens, document, np.cumsum(sizes) - sizes, length)
