"""Methods with parts of their own: they train from a finished run, and come back from the checkpoint."""

import jax
import numpy as np
import pytest

from jaxattn.core.types import State, contract
from train import methods, tasks
from train.__main__ import main
from train.checkpoints import load_params
from train.config import VLM, ViT

FLAGS = "--dim 16 --layers 3 --heads 2 --mlp 32".split()
SHORT = "--batch 8 --eval-batches 1 --log-every 1 --mesh.data 1".split()
METHOD = "as_vit:layers=(1,2),thresholds=(0.02,0.02)"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(a dense run, one with a method that started from it)."""
    dense, slim = (tmp_path_factory.mktemp("runs") / name for name in ("dense", "slim"))
    assert main(["vit", "--out", str(dense), "--steps", "1", *FLAGS, *SHORT]) == 0
    assert main(["vit", "--init", str(dense), "--out", str(slim), "--tokens", METHOD, "--steps", "2", *SHORT]) == 0
    return dense, slim


def test_a_method_starts_from_a_run_and_is_saved_with_it(runs, capsys):
    dense, slim = runs
    (before, _), (after, record) = (load_params(run / "checkpoints") for run in runs)
    assert record["config"]["layers"] == 3 and record["config"]["tokens"] == [METHOD]
    assert set(after) == {*before, "sockets"}
    model = {name: after[name] for name in before}
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(before), strict=True)]
    assert 0 < max(moved) < 2e-3 * 0.01 * 3  # two steps at a hundredth of the rate, not another model
    bound = tasks.load(slim)
    assert [cut.layer for cut in bound.program.stack("vision").cuts] == [1, 2]
    np.testing.assert_array_equal(bound.arrays["trained"]["vision"]["cut.1"]["threshold"],
                                  after["sockets"]["vision"]["cut.1"]["threshold"])  # fmt: skip
    np.testing.assert_array_equal(bound.params["norm"]["scale"], after["norm"]["scale"])
    assert "sockets" not in bound.params
    gathered = tasks.load(slim, tokens=(f"{METHOD},capacity=(8,4)@vision",))
    assert gathered.program.stack("vision").cuts[1].transform.rows(16) == 4
    capsys.readouterr()
    assert main(["vit", "--init", str(slim), "--steps", "0", "--tokens", METHOD, *SHORT]) == 0
    assert "flops" in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "message"), [
    ({"dim": 32}, "dim: expected 16 as the run of --init has"),
    ({"objective": "as_vit", "init": None}, "init: expected a run: the objective compares"),
    ({"tokens": ("uniform:keep=4@vision.1", "uniform:keep=2@vision.1")}, "tokens: expected one method at 'vision.1'"),
    ({"out": "same"}, "out: expected another folder than that of init"),
])  # fmt: skip
def test_what_does_not_fit_is_said(runs, changes, message):
    given = {"init": runs[0], "tokens": (METHOD,), "batch": 8, **changes}
    given["out"] = runs[0] if given.get("out") == "same" else None
    shape = {} if given["init"] else {"dim": 16, "layers": 3, "heads": 2, "mlp": 32}
    with pytest.raises(ValueError, match=message):
        tasks.build(ViT(**{**shape, **given}))


def test_runs_of_other_parts_are_refused(runs):
    found = methods.load(runs[1])[0]
    model = {name: tree for name, tree in found.items() if name != "sockets"}
    with pytest.raises(ValueError, match="init: sockets/vision/cut.0/threshold: expected"):
        methods.filled(model, found)
    with pytest.raises(ValueError, match="init: expected one with all of the model's parameters, got a run without extra"):
        methods.filled({**found, "extra": np.zeros(2)}, found)
    with pytest.raises(ValueError, match="init: expected a run of the task 'vlm'"):
        tasks.started(VLM(init=runs[0]))


@contract
class _Frozen:
    """Trains the method alone."""

    rates = {"model": 0}

    def loss(self, params, state: State, forward, batch, key):
        out = forward(batch)
        assert state.shared == () and "cut.0" in params["method"]["vision"]
        return out.loss, out.metrics


def test_a_rate_of_zero_freezes_the_model(runs):
    task = tasks.build(ViT(init=runs[0], tokens=(METHOD,), batch=8))
    batch = task.stages[0].held_out.fetch(np.arange(8))
    outcome = lambda params, batch, key, phase: tasks.class_outcome(task.bound, params, batch, key, phase=phase)  # noqa: E731
    plan = methods.prepare(outcome, outcome, task.params, _Frozen(), batch, key=jax.random.key(0), groups={}, trained=True)
    assert plan.groups["layers"] == 0 and plan.groups["sockets"] == 1
    grads = jax.jit(jax.grad(lambda p: plan.loss_fn(p, batch, jax.random.key(0))[0]))(task.params)
    still = {name: tree for name, tree in grads.items() if name != "sockets"}
    assert not any(np.any(x) for x in jax.tree.leaves(still))
