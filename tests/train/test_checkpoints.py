"""What a checkpoint holds, and what happens when it is damaged or not there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.checkpoints import CheckpointError, Checkpoints, checksums, from_dict, load_params, to_dict

RNG = np.random.default_rng(0)
PARAMS = {
    "head": {"kernel": jnp.asarray(RNG.normal(size=(64, 100)), jnp.float32)},
    "half": jnp.asarray(RNG.normal(size=5), jnp.bfloat16),
    "on": jnp.array([True, False]),
}


@pytest.fixture
def saved(tmp_path):
    state = {"params": PARAMS, "step": jnp.int32(4)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (2, 3, 4):
            checkpoints.save(step, state, {"config": {"lr": 0.1}})
        checkpoints.wait()
        yield tmp_path, state, checkpoints


def largest(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return max(files, key=lambda p: p.stat().st_size)


def test_round_trip_and_keep(saved):
    folder, state, checkpoints = saved
    assert checkpoints.steps == [3, 4]
    found, record = checkpoints.restore(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert found["params"]["half"].dtype == jnp.bfloat16
    assert record["step"] == 4 and record["config"] == {"lr": 0.1}
    params, _ = load_params(folder, step=3)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


def test_any_optimizer_state_is_a_plain_dict_and_back():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1, 0, 9)))
    state = optimizer.init({"a": jnp.ones(2)})
    plain = to_dict(state)
    assert all(isinstance(x, dict) for x in [plain, *plain.values()])
    back = from_dict(plain, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)


def test_checksums_see_one_bit_and_no_sharding():
    a = jnp.arange(16.0)
    flipped = a.view(jnp.int32).at[3].add(1 << 12).view(jnp.float32)
    assert checksums({"a": a}) != checksums({"a": flipped})
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(a, jax.NamedSharding(mesh, jax.P("x")))
    assert checksums({"a": spread}) == checksums({"a": a})


def test_damage_is_one_clear_error(saved):
    folder, state, checkpoints = saved
    file = largest(folder / "4")
    good = file.read_bytes()
    middle = len(good) // 2
    file.write_bytes(good[:middle] + bytes([good[middle] ^ 0xFF]) + good[middle + 1 :])
    with pytest.raises(CheckpointError, match=rf"{folder}/4/state: expected .*, got"):
        checkpoints.restore(state)
    file.write_bytes(good[:middle])
    with pytest.raises(CheckpointError, match=rf"{folder}/4/state: expected readable arrays, got"):
        load_params(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{folder}/4/state: expected readable arrays, got"):
        checkpoints.restore(state)
    (folder / "4" / "record" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match=rf"{folder}/4/record: expected a JSON record, got"):
        checkpoints.restore(state)
    found, _ = checkpoints.restore(state, step=3)  # the older one is still good
    jax.tree.map(np.testing.assert_array_equal, found["params"], PARAMS)


def test_what_does_not_fit_is_named(saved):
    folder, state, checkpoints = saved
    wider = {**state, "params": {**PARAMS, "head": {"kernel": jnp.zeros((64, 101))}}}
    expected = r"params/head/kernel float32\[64, 101\], got float32\[64, 100\]"
    with pytest.raises(CheckpointError, match=rf"{folder}/4: expected {expected}"):
        checkpoints.restore(wider)
    with pytest.raises(CheckpointError, match="expected params/more float32.*, got nothing of that name"):
        checkpoints.restore({**state, "params": {**PARAMS, "more": jnp.zeros(3)}})
    with pytest.raises(CheckpointError, match="expected params/half absent, got bfloat16"):
        checkpoints.restore({**state, "params": {"head": PARAMS["head"], "on": PARAMS["on"]}})


def test_what_is_not_there_is_named(saved, tmp_path_factory):
    folder, state, checkpoints = saved
    with pytest.raises(CheckpointError, match=r"expected one of the steps \[3, 4\], got step 2"):
        checkpoints.restore(state, step=2)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CheckpointError, match="expected at least one complete step, got none"):
        load_params(empty)
    with pytest.raises(CheckpointError, match="expected a folder of checkpoints, got nothing"):
        load_params(empty / "absent")
    assert not (empty / "absent").exists()
    (empty / "file").write_text("x")
    with pytest.raises(CheckpointError, match="expected a folder, got a file"):
        Checkpoints(empty / "file")
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(9, state, {"config": object()})
    assert checkpoints.steps == [3, 4]
