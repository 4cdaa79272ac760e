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


def start(out, *flags, program=("tests.train.standin",)):
    # Compiling is most of such a run: half as long unoptimised.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", *program, str(out), *map(str, flags)]
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
def test_two_processes_train_the_language_model_as_one(tmp_path):
    source = "".join(f"def f{n}(x):\n    return x + {n * n}\n" for n in range(200))
    (tmp_path / "source.py").write_text(source)
    sizes = "--batch 8 --length 32 --dim 16 --layers 2 --heads 2 --kv-heads 1 --mlp 32"
    run = f"--data {tmp_path / 'source.py'} {sizes} --log-every 1 --eval-batches 2 --save-every 4".split()
    program = ("train", "lm", "--out")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    hosts = f"--hosts.coordinator {address} --hosts.num-processes 2 --hosts.process-id".split()
    alone = start(tmp_path / "one", *run, "--steps", 8, program=program)
    both = [start(tmp_path / "two", *run, "--steps", 8, *hosts, n, program=program) for n in range(2)]
    finish(alone, *both)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == list(range(1, 9)) and two[-1]["loss"] < 0.9 * two[0]["loss"]
    for name, rtol in {"loss": 1e-6, "weight": 0, "grad_norm": 1e-5}.items():
        np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=rtol, err_msg=name)
    np.testing.assert_allclose(two[-1]["eval/loss"], one[-1]["eval/loss"], rtol=1e-5)
    with Checkpoints(tmp_path / "two" / "checkpoints", keep=None) as checkpoints:
        record = checkpoints.record()
        assert checkpoints.steps == [4, 8] and record["config"]["dim"] == 16
        assert record["devices"] == {"platform": "cpu", "used": 2, "local": 1, "processes": 2}


def test_refusals_before_jax_starts():
    with pytest.raises(ValueError, match="process_id: expected 0 <= id < num_processes=2, got 2"):
        backend.start(num_processes=2, process_id=2, coordinator="localhost:1")
    with pytest.raises(ValueError, match="coordinator: expected host:port for 2 processes, got None"):
        backend.start(num_processes=2)
    with pytest.raises(ValueError, match="devices: expected 1 or more, got 0"):
        backend.start(devices=0)
