"""The loop: accumulation, precision, metrics, resuming, interrupts, refusals."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import standin
from train.checkpoints import CheckpointError, Checkpoints, load_params
from train.loop import fit, loss_and_gradients
from train.optim import make_optimizer, schedule
from train.progress import Metrics, plot_curve, read_metrics
from train.sharding import make_mesh, path_name

PARAMS = standin.init()


def run(stream=None, *, steps=12, loss_fn=standin.loss_fn, **kwargs):
    optimizer = make_optimizer("muon", schedule("wsd", 0.02, steps=12, warmup=3), weight_decay=0.01)
    kwargs = {"log_every": 1, "quiet": True, **kwargs}
    return fit(loss_fn, PARAMS, stream or standin.Stream(), optimizer=optimizer, steps=steps, **kwargs)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def losses(path):
    return [(row["step"], row["loss"]) for row in read_metrics(path)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption: its result and its loss curve."""
    path = tmp_path_factory.mktemp("whole") / "metrics.jsonl"
    return run(metrics_path=path), losses(path)


def test_training_learns_logs_and_draws(tmp_path, capsys, whole):
    seen = []

    def evaluate(params, step):
        seen.append(step)
        return {"loss": jnp.float32(1.5)}

    result = run(
        metrics_path=tmp_path / "m" / "metrics.jsonl",
        plot_path=tmp_path / "m" / "loss.png",
        eval_fn=evaluate,
        eval_every=5,
        quiet=False,
        log_every=4,
    )
    rows = read_metrics(tmp_path / "m" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 5, 8, 10, 12] and seen == [5, 10, 12]
    assert rows[1]["eval/loss"] == 1.5 and "loss" not in rows[1]
    assert {"loss", "accuracy", "grad_norm", "tokens_per_second", "eval/loss"} <= rows[-1].keys()
    assert rows[-1]["loss"] < rows[0]["loss"] and result.step == 12 and not result.interrupted
    assert (tmp_path / "m" / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert len(lines) == 3 and "12/12" in lines[-1] and "left 0:00" in lines[-1]
    assert_same(result.params, whole[0].params)
    assert PARAMS["head"]["kernel"].shape  # the caller's arrays were not donated


def test_no_matplotlib_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert plot_curve([{"step": 1, "loss": 1.0}], tmp_path / "a.png") is False


def test_resume_repeats_the_uninterrupted_run_bit_for_bit(tmp_path, whole):
    kwargs = {"checkpoint_dir": tmp_path / "c", "metrics_path": tmp_path / "m.jsonl", "save_every": 3}
    run(steps=7, **kwargs)
    result = run(**kwargs)
    assert_same((result.params, result.opt_state), (whole[0].params, whole[0].opt_state))
    assert losses(tmp_path / "m.jsonl") == whole[1]
    again = run(**kwargs)  # nothing left to do, nothing written
    assert_same(again.params, result.params)
    params, record = load_params(tmp_path / "c")
    assert_same(params, result.params)
    assert record["step"] == 12 and record["devices"]["used"] == 1 and record["data"] == {"at": 12}


def test_interrupt_finishes_the_step_saves_and_continues(tmp_path, whole, capsys):
    class Interrupted(standin.Stream):
        def __next__(self):
            if self.at == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__next__()

    kwargs = {"checkpoint_dir": tmp_path / "c", "metrics_path": tmp_path / "m.jsonl"}
    handler = signal.getsignal(signal.SIGINT)
    result = run(Interrupted(), quiet=False, **kwargs)
    assert result.interrupted and result.step == 5 and signal.getsignal(signal.SIGINT) is handler
    assert "interrupted after step 5; saved in" in capsys.readouterr().out
    assert_same(run(**kwargs).params, whole[0].params)
    assert losses(tmp_path / "m.jsonl") == whole[1]


def test_restored_on_another_mesh(tmp_path, whole):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    run(steps=6, checkpoint_dir=tmp_path / "c")
    result = run(checkpoint_dir=tmp_path / "c", mesh=mesh)
    kernel = result.params["layers"]["attn"]["q"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(result.opt_state)} == {8}
    # Another order of sums, so near and not equal.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), result.params, whole[0].params)
    params, record = load_params(tmp_path / "c", mesh=make_mesh(fsdp=8, data=1))
    assert record["devices"]["used"] == 8
    assert params["head"]["kernel"].sharding.spec[0] == "fsdp"
    assert_same(params, result.params)


def test_accumulated_parts_are_the_big_batch():
    quiet_loss = lambda p, b, k: standin.loss_fn(p, b, k, noise=0.0)  # noqa: E731
    batch, key = next(standin.Stream()), jax.random.key(0)
    step = jax.jit(lambda b, n: loss_and_gradients(quiet_loss, PARAMS, b, key, accumulate=n), static_argnums=1)
    whole_batch, parts = step(batch, 1), step(batch, 4)
    (loss, metrics, grads), (got_loss, got_metrics, got) = whole_batch, parts
    np.testing.assert_allclose(got_loss, loss, rtol=1e-6)
    assert got_metrics["weight"] == metrics["weight"] == batch["loss_mask"].sum()
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6, err_msg=path_name(path))
    with pytest.raises(ValueError, match="accumulate: expected a divisor of the batch of 8, got 3"):
        loss_and_gradients(quiet_loss, PARAMS, batch, key, accumulate=3)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_checkpoint(tmp_path):
    class Poisoned(standin.Stream):
        def __next__(self):
            batch = super().__next__()
            return {**batch, "loss_mask": batch["loss_mask"] * (np.nan if self.at > 6 else 1)}

    with pytest.raises(FloatingPointError, match="step 9: expected a finite loss"):
        run(Poisoned(), checkpoint_dir=tmp_path / "c", save_every=3, log_every=100, keep=1)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps == [6]


def test_refusals(tmp_path):
    run(steps=2, checkpoint_dir=tmp_path / "c")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"without checkpoints \(resume is off\), got steps \[2\]"):
        run(steps=4, checkpoint_dir=tmp_path / "c", resume=False)
    with pytest.raises(CheckpointError, match="float32"):
        optimizer = make_optimizer("muon", 0.1)
        small = {**PARAMS, "head": {"kernel": jnp.zeros((8, 5))}}
        fit(standin.loss_fn, small, standin.Stream(), optimizer=optimizer, steps=4, checkpoint_dir=tmp_path / "c")
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="data_iterator: expected get_state and set_state"):
        run(iter([next(standin.Stream())]), checkpoint_dir=tmp_path / "c")
    with pytest.raises(ValueError, match="expected batches for 3 steps, got its end after 2"):
        run(iter([next(standin.Stream())] * 2), steps=3)
    with pytest.raises(ValueError, match="save_every: expected 1 or more, got 0"):
        run(save_every=0)


def test_metrics_file_survives_a_torn_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert len(read_metrics(path)) == 2
    writer = Metrics(path, after=1)
    writer.write({"step": 2, "loss": 1.5})
    writer.close()
    assert [json.loads(x)["loss"] for x in path.read_text().splitlines()] == [2.0, 1.5]
    path.write_text('nonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1: expected a JSON object with a step, got 'nonsense'"):
        read_metrics(path)
