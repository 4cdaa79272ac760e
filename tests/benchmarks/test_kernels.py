"""The board of the kernels: work counted by the book, memory that grows with the length, peers that are missing are named."""

import ctypes
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels as command
from benchmarks.boards import kernels as board
from benchmarks.boards.peers import BLOCK, Torch, block_lists
from models import cores


class Absent:
    """PyTorch that is not there."""

    def seconds(self, spec):
        return "torch is not installed"


def test_memory_is_linear_in_the_length():
    short, middle, long = (board.memory(n, head_dim=16, heads=2, entries=4) for n in (4096, 8192, 16384))
    for name in ("forward", "backward"):
        assert long[name] - middle[name] == pytest.approx(2 * (middle[name] - short[name]), rel=0.02), name
        assert long[name] < 2.05 * middle[name]


def test_lists_are_the_same_in_every_process():
    a, b = block_lists(2, 5, 9, 4), block_lists(2, 5, 9, 4)
    np.testing.assert_array_equal(a, b)
    assert (np.diff(a, axis=-1) > 0).all() and a.max() < 9


def test_a_board_of_small_shapes(tmp_path, monkeypatch):
    """Every operation has a row with figures, missing peers a row that says why, and the three files agree."""
    monkeypatch.setattr(board, "HEADS", 2)
    monkeypatch.setattr(board, "ROWS", 8)
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    found = board.cases(("flash", "gather", "linear", "profile", "indexer"), (512,), mesh, 8, jnp.float32)
    assert found[0].ideal == 1 / 4  # one block, the least, of four
    assert found[0].flops == 4 * 512 * 1 * BLOCK * 8 * 2
    with jax.set_mesh(mesh):
        results = board.measure(found, Absent(), 1, lambda _: None)
    assert {r.case.op for r in results if r.ours and r.error is None} == set(board.OPS)
    assert {r.error for r in results if r.contender.startswith("torch")} == {"torch is not installed"}
    entries = [command._entry(r, results) for r in results]
    record = {"date": "2026-01-01", "device": "cpu", "machine": "m", "devices": 2, "dtype": "float32", "heads": 2,
              "head_dim": 8, "jax": jax.__version__, "repeats": 1, "ceilings": {"flops": [1e9, 2e9], "bytes": [1e9, 1e9]},
              "results": entries, "memory": {"128": {"forward": 1 << 20, "backward": 2 << 20}}}  # fmt: skip
    page = command.markdown(json.loads(json.dumps(record)))
    assert page.count("**jaxattn xla**") == sum(r.ours for r in results)
    assert "absent: torch is not installed" in page and "| 128 | 1 | 2 |" in page
    dense = next(e for e in entries if e["contender"] == "jax.nn" and e["op"] == "flash")
    ours = next(e for e in entries if e["ours"])
    assert dense["of_ideal"] == pytest.approx(dense["ms"] / ours["ms"] / 4)
    command.picture(record, tmp_path / "board.png")
    assert (tmp_path / "board.png").stat().st_size > 1000


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is a peer, not a dependency")
def test_the_peer_answers_and_reports_what_fails():
    size = {"tokens": 4, "keys": 8, "heads": 2, "head_dim": 4}
    with Torch("cpu") as torch:
        assert torch.seconds({"kind": "sdpa"} | size) > 0
        assert "window" in torch.seconds({"kind": "flex window"} | size)


def test_cores_leave_the_user_s_choice(monkeypatch):
    """This process has chosen its devices already; another platform is not touched either."""
    before = jax.config.jax_num_cpu_devices
    cores.one_device_per_core()
    assert jax.config.jax_num_cpu_devices == before


def test_memory_stays_unless_the_user_chose(monkeypatch):
    """In a process of its own: freed arrays do not shrink it, and a user's setting is left alone."""
    code = ("import sys, numpy as np; from models import cores; said = cores.keep_memory();"
            "size = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096;"
            "a = np.ones(1 << 25); del a; print(said, size() > (1 << 28))")  # fmt: skip
    run = lambda **env: subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, text=True, check=True,  # noqa: E731
                                       stdout=subprocess.PIPE).stdout.split()  # fmt: skip
    assert run(MALLOC_ARENA_MAX="2") == ["False", "False"]
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        assert run() == ["True", "True"]
