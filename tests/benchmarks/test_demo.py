"""The demo from the command line: it trains once, uses the model again, and never harms it."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.demo import Demo, exact, trained

ROOT = Path(__file__).parents[2]
TINY = "--steps 2 --vision-steps 2 --train-scenes 24 --scenes 8 --batch 8 --readings 4 --show 2 --budgets 16".split()


def demo(*flags):
    command = [sys.executable, "-m", "benchmarks", "demo", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_demo_trains_once(tmp_path, capsys):
    out = tmp_path / "demo"
    flags = ["--out", str(out), *TINY, "--methods", "full", "mmtok"]
    first = demo(*flags)
    assert first.returncode == 0, first.stderr
    assert "== training" in first.stdout and "vlm vision  2/2" in first.stdout and "mmtok" in first.stdout
    board = (out / "board.md").read_text()
    assert "| 16 | mmtok |" in board and "unfair to pruning" in board and "training" in board
    answers = (out / "answers.md").read_text()
    assert "mmtok 16" in answers and "Scene 2:" in answers
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in ("accuracy.png", "overlays.png"))
    saved = {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()}

    assert main(["demo", *flags]) == 0
    second = capsys.readouterr().out
    assert "using the model trained before" in second and "== training" not in second

    # Other settings, and damage: an error that says so, and nothing written.
    assert main(["demo", *flags, "--seed", "1"]) == 1
    assert "expected a run with seed 1 (or name another --out), got seed 0" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in saved} == saved
    for path in (p for p in saved if "state" in p.parts and p.stat().st_size > 1000):
        path.write_bytes(b"\0" * 100)
    saved = {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()}
    assert main(["demo", *flags]) == 1
    assert capsys.readouterr().err.startswith("error: checkpoint ")
    assert {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()} == saved


def test_mistakes_are_found_before_training(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "run"), "--methods", "fastvlm"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: unknown tokens 'fastvlm'; did you mean fastervlm") and error.count("\n") == 1
    assert main(["demo", "--out", str(tmp_path / "run"), "--budgets", "200"]) == 1
    assert "budgets: expected a number of tokens from 1 to 144, got 200" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_trained_is_nothing_found(tmp_path):
    assert trained(Demo(out=tmp_path).training()) is None
    assert exact([["1", "2"], ["3"]], [["1", "2"], ["4"]]) == 0.5
