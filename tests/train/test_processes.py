"""Real processes: killed and resumed, two that train as one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from train import backend
from train.checkpoints import Checkpoints
from train.progress import read_metrics

ROOT = Path(__file__).parents[2]


def start(out, *flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "tests.train.standin", str(out), *map(str, flags)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*programs):
    for program in programs:
        output, _ = program.communicate(timeout=200)
        assert program.returncode == 0, output


def losses(out):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(out / "metrics.jsonl")]


def wait_for_rows(out, count, program):
    path = out / "metrics.jsonl"
    until = time.monotonic() + 200
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        assert program.poll() is None and time.monotonic() < until, program.communicate()[0]
        time.sleep(0.005)


@pytest.mark.slow
def test_kill_in_mid_training_then_resume_continues_the_curve_exactly(tmp_path):
    steps, every = 40, 3
    whole = start(tmp_path / "whole", "--steps", steps)
    killed = start(tmp_path / "killed", "--steps", steps, "--save-every", every, "--sleep", 0.01)
    wait_for_rows(tmp_path / "killed", 13, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = losses(tmp_path / "killed")
    with Checkpoints(tmp_path / "killed" / "checkpoints", keep=None) as checkpoints:
        # The interval whose checkpoint was being written, and the one just begun.
        assert checkpoints.latest >= before[-1][0] // every * every - every
    again = start(tmp_path / "killed", "--steps", steps, "--save-every", every)
    finish(whole, again)
    uninterrupted, resumed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert [row[0] for row in resumed] == list(range(1, steps + 1))
    assert resumed == uninterrupted and before == uninterrupted[: len(before)]
    assert resumed[-1][1] < 0.8 * resumed[0][1]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    alone = start(tmp_path / "one", "--steps", 8)
    shared = ["--mesh", "--coordinator", address, "--processes", 2, "--save-every", 4, "--steps", 8]
    both = [start(tmp_path / "two", *shared, "--devices", 1, "--process", n) for n in range(2)]
    finish(alone, *both)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose([r[1] for r in two], [r[1] for r in one], rtol=1e-6)
    np.testing.assert_allclose([r[2] for r in two], [r[2] for r in one], rtol=1e-5)
    with Checkpoints(tmp_path / "two" / "checkpoints", keep=None) as checkpoints:
        record = checkpoints.record()
        assert checkpoints.steps == [4, 8]
        assert record["devices"] == {"platform": "cpu", "used": 2, "local": 1, "processes": 2}
    resumed = start(tmp_path / "two", "--steps", 10)  # by a single process on a single device
    output, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, output
    assert "used 2 -> 1, processes 2 -> 1" in output and len(losses(tmp_path / "two")) == 10


def test_refusals_before_jax_starts():
    with pytest.raises(ValueError, match="process_id: expected 0 <= id < num_processes=2, got 2"):
        backend.start(num_processes=2, process_id=2, coordinator="localhost:1")
    with pytest.raises(ValueError, match="coordinator: expected host:port for 2 processes, got None"):
        backend.start(num_processes=2)
    with pytest.raises(ValueError, match="devices: expected 1 or more, got 0"):
        backend.start(devices=0)
