"""PyTorch in a process of its own: two thread pools in one process would disturb each other.

``Torch`` starts ``python -m benchmarks.boards.torch_peer`` and asks it for one timed call at a time, so that its calls
alternate with ours. Inputs are made on both sides; lists of blocks by ``block_lists``, so that both read the same ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np

from models.cores import KEEP

BLOCK = 128


def block_lists(heads: int, tiles: int, units: int, k: int) -> np.ndarray:
    """int32 [heads, tiles, k]: ascending random units, the same in every process."""
    rng = np.random.default_rng(heads * 1_000_003 + tiles * 1009 + k)
    picked = [np.sort(rng.permutation(units)[:k]) for _ in range(heads * tiles)]
    return np.reshape(picked, (heads, tiles, k)).astype(np.int32)


class Torch:
    """The child process, or what is missing: ``absent`` says why there is none."""

    def __init__(self, device: str):
        self.absent = None if importlib.util.find_spec("torch") else "torch is not installed"
        self.process = None
        if self.absent is None:
            # Idle threads of OpenMP would spin on the cores that JAX needs, and the other way round. Memory stays there, too.
            kept = {name: str(value) for name, (_, value) in KEEP.items()}
            environment = kept | os.environ | {"OMP_WAIT_POLICY": "passive"}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.boards.torch_peer", device],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            )  # fmt: skip

    def seconds(self, spec: dict) -> float | str:
        """One call of what ``spec`` describes (prepared and warmed up when it is new), or why it cannot be made."""
        if self.process is None:
            return self.absent
        self.process.stdin.write(json.dumps(spec) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.absent, self.process = "the process of PyTorch ended", None
            return self.absent
        answer = json.loads(line)
        return answer["seconds"] if "seconds" in answer else answer["error"]

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(30)
            self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
