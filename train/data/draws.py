"""Random numbers that belong to an index: row i is the same whoever asks for it and in whatever range."""

import numpy as np


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """A Philox generator for one (seed, stream, index); streams are independent uses of the same seed."""
    # The index sits in the highest counter word, so two rows never share a block of the sequence.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))


def uniforms(seed: int, stream: int, indices: np.ndarray, count: int) -> np.ndarray:
    """float64 [S, count] in [0, 1): row s depends on (seed, stream, indices[s]) alone."""
    out = np.empty((len(indices), count))
    for row, index in enumerate(indices):
        generator(seed, stream, int(index)).random(out=out[row])
    return out


def integers(u: np.ndarray, low, high) -> np.ndarray:
    """Uniform draws in [0, 1) to int64 in [low, high), bounds broadcast."""
    return (low + np.floor(u * (np.asarray(high) - low))).astype(np.int64)


def order(u: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """A random permutation of the last axis from uniforms, allowed entries first: int64, shape of u."""
    return np.argsort(u if allowed is None else u + ~allowed, axis=-1, kind="stable")


def pick_cyclic(u: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
    """`count` allowed entries per row, distinct as long as there are enough: int64 [S, count]."""
    rank = np.arange(count)[None, :] % np.maximum(allowed.sum(-1), 1)[:, None]
    return np.take_along_axis(order(u, allowed), rank, axis=-1)
