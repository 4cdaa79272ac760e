"""The three models on the command line: they train, answer errors in one line, and shard without another result."""

import jax
import numpy as np
import pytest

from tests.train.test_loop import losses
from train import tasks
from train.__main__ import main
from train.checkpoints import load_params
from train.config import LM, VLM, Mesh, ViT
from train.loop import loss_and_gradients
from train.sharding import make_mesh, path_name, shard, shard_batch

TINY = {"dim": 16, "layers": 2, "heads": 2, "mlp": 32, "batch": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source.py"
    path.write_text("".join(f"def f{n}(x):\n    return x + {n * n}\n" for n in range(200)))
    return path


def config(kind, source, **changes):
    if kind is LM:
        return LM(**{**TINY, "data": source, "length": 32, "kv_heads": 2, "qk_norm": True, **changes})
    if kind is ViT:
        return ViT(**{**TINY, **changes})
    vision = {"vision_dim": 16, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 32, "size": 48}
    return VLM(**{**TINY, **vision, "kv_heads": 2, "scenes": 32, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LM, ViT, VLM])
def test_one_sharded_step_has_the_loss_and_gradients_of_the_whole(kind, source):
    task = tasks.build(config(kind, source))
    stage = task.stages[-1]
    batch, key = next(iter(stage.batches)), jax.random.key(0)
    # Unoptimised, it compiles in half the time; the sums are the same.
    options = {"xla_backend_optimization_level": 0}
    step = jax.jit(lambda p, b: loss_and_gradients(stage.loss_fn, p, b, key)[::2], compiler_options=options)
    loss, grads = step(task.params, batch)
    mesh = make_mesh(data=4, tensor=2)
    params = shard(task.params, mesh)
    cut = [x for x in jax.tree.leaves(params) if not x.sharding.is_fully_replicated]
    assert len(cut) >= 6
    got_loss, got = step(params, shard_batch(batch, mesh))
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    whole = np.sqrt(sum(float((x * x).sum()) for x in jax.tree.leaves(grads)))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(got), strict=True):
        # A bias of keys moves all scores of a row alike: its gradient is rounding, of no size of its own.
        room = 1e-5 * np.linalg.norm(a) + 1e-8 * whole
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= room, path_name(path)


@pytest.mark.slow
def test_the_program_trains_resumes_and_explains(tmp_path, source, capsys):
    flags = "--length 32 --dim 16 --layers 2 --heads 2 --kv-heads 2 --mlp 32 --batch 8 --mesh.data 1 --log-every 2"
    run = ["lm", "--data", str(source), "--out", str(tmp_path / "run"), *flags.split()]
    assert main([*run, "--steps", "4"]) == 0
    params, record = load_params(tmp_path / "run" / "checkpoints")
    assert record["config"]["task"] == "lm" and record["config"]["dim"] == 16
    assert [step for step, _ in losses(tmp_path / "run" / "metrics.jsonl")] == [2, 4]
    assert (tmp_path / "run" / "loss.png").exists()
    capsys.readouterr()

    assert main([*run, "--steps", "4", "--dim", "32"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected params/embed/embedding float32[260, 32], got float32[260, 16]" in error
    assert main([*run, "--steps", "4", "--attention", "flexprefil"]) == 1
    assert "did you mean flexprefill?" in capsys.readouterr().err
    assert main(["lm", "--data", str(tmp_path / "absent")]) == 1
    assert "absent: expected a UTF-8 text file" in capsys.readouterr().err
    again, _ = load_params(tmp_path / "run" / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_stages_of_the_scenes(source):
    task = tasks.build(config(VLM, source, vision_steps=7, steps=9, tokens="uniform:keep=8 + fastv:keep=4@llm.1"))
    assert [x for x, _ in task.bound.program.sites] == ["vision"] and task.bound.program.stack("llm").cuts[0].layer == 1
    first, second = task.stages
    assert (first.steps, first.folder, second.steps, second.folder) == (7, "vision", 9, "")
    assert set(first.params) == {"vision", "aux"} and set(task.params) == {"vision", "projector", "llm", "aux"}
    assert "questions" not in next(iter(first.batches)) and "answers" in next(iter(second.batches))
    assert second.groups == {"vision": 0.3}
    with pytest.raises(ValueError, match="config: expected one of LM, ViT and VLM, got dict"):
        tasks.build({})


def test_a_mesh_only_where_there_is_something_to_share():
    assert Mesh(data=1).make() is None
    assert dict(Mesh(tensor=2).make().shape) == {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 2}
    with pytest.raises(ValueError, match="mesh: expected sizes whose product is the 8 devices"):
        Mesh(data=1, tensor=2).make()
