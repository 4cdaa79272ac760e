"""The table of axes, and a sharded step against an unsharded one."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxattn.nn.partition import constrain
from tests.train import standin
from train import sharding
from train.loop import initial_state, loss_and_gradients, make_step
from train.optim import make_optimizer

PARAMS = standin.init()


def axes_of(tree):
    return {sharding.path_name(p): s.spec for p, s in jax.tree_util.tree_leaves_with_path(tree)}


def test_mesh_sizes():
    mesh = sharding.make_mesh(data=-1, tensor=2, fsdp=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    with pytest.raises(ValueError, match="product is the 8 devices, got data=3"):
        sharding.make_mesh(data=3)
    with pytest.raises(ValueError, match="at most one -1"):
        sharding.make_mesh(data=-1, tensor=-1)
    with pytest.raises(ValueError, match="tensor: expected a positive size"):
        sharding.make_mesh(tensor=0)


def test_parameters_and_optimizer_state_go_the_same_way():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = axes_of(sharding.shardings(PARAMS, mesh))
    assert params["layers/attn/q/kernel"] == P(None, "fsdp", "tensor")
    assert params["layers/attn/o/kernel"] == P(None, "tensor", "fsdp")
    assert params["layers/mlp/up/bias"] == P(None, "tensor")
    assert params["layers/mlp/down/bias"] == P(None, None)
    assert params["layers/norm1/scale"] == P(None, None)
    assert params["embed/embedding"] == P("tensor", "fsdp")
    assert params["head/kernel"] == P("fsdp", "tensor")

    state = jax.eval_shape(make_optimizer("muon").init, PARAMS)
    moments = 0
    for name, spec in axes_of(sharding.shardings(state, mesh)).items():
        owner = [p for p in params if name.endswith("/" + p)]
        if owner:
            moments += 1
            assert spec == params[max(owner, key=len)], name
        else:
            assert all(entry is None for entry in spec), name
    assert moments >= len(params)


def test_indivisible_dimensions_stay_whole_with_a_note(caplog):
    mesh = sharding.make_mesh(data=1, tensor=8)
    tree = {"attn": {"q": {"kernel": jnp.zeros((8, 12))}}, "mlp": {"up": {"kernel": jnp.zeros((8, 16))}}}
    with caplog.at_level(logging.WARNING):
        specs = axes_of(sharding.shardings(tree, mesh))
    assert specs == {"attn/q/kernel": P(None, None), "mlp/up/kernel": P(None, "tensor")}
    assert "heads = 12 is not a multiple of tensor = 8" in caplog.text and "attn/q/kernel" in caplog.text


def test_batches_are_cut_by_rows_and_the_record_by_tokens():
    mesh = sharding.make_mesh(data=2, fsdp=2, sequence=2)
    batch = {"tokens": np.zeros((8, 6), np.int32), "image": np.zeros((8, 4, 4, 1)), "label": np.zeros(8)}
    specs = axes_of(sharding.batch_shardings(batch, mesh))
    rows = ("data", "fsdp")
    assert specs == {"tokens": P(rows, "sequence"), "image": P(rows, None, None, None), "label": P(rows)}


def test_constrain_follows_the_mesh_and_is_nothing_without_one():
    x = jnp.ones((8, 4, 8))
    assert constrain(x, ("batch", None, "heads")) is x
    with jax.set_mesh(sharding.make_mesh(data=4, tensor=2)):
        y = jax.jit(lambda x: constrain(x, ("batch", "length", "heads")))(x)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 4, 4)}
    with pytest.raises(ValueError, match="expected one for each dimension"):
        sharding.spec((2, 3), ("batch",), sharding.make_mesh())
    with pytest.raises(ValueError, match="got 'head'"):
        sharding.spec((2,), ("head",), sharding.make_mesh())


@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, {"fsdp": 2, "sequence": 2, "tensor": 2, "data": 1}])
def test_a_sharded_step_is_the_unsharded_one(sizes):
    mesh = sharding.make_mesh(**sizes)
    batch, key = next(standin.Stream()), jax.random.key(1)

    def both(params, batch):
        loss, _, grads = loss_and_gradients(standin.loss_fn, params, batch, key)
        return loss, grads

    loss, grads = jax.jit(both)(PARAMS, batch)
    got_loss, got = jax.jit(both)(sharding.shard(PARAMS, mesh), sharding.shard_batch(batch, mesh))
    np.testing.assert_allclose(got_loss, loss, rtol=1e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(got), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), sharding.path_name(path)

    optimizer = make_optimizer("adamw", 1e-3)
    step = make_step(standin.loss_fn, optimizer)
    plain, _ = jax.jit(step)(initial_state(PARAMS, optimizer), batch, key)
    state = initial_state(PARAMS, optimizer, mesh)
    with jax.set_mesh(mesh):
        where = jax.tree.map(lambda x: x.sharding, state)
        state, _ = jax.jit(step, out_shardings=(where, None))(state, sharding.shard_batch(batch, mesh), key)
    kernel = state["params"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec[-1] == "tensor"
    # Adam's first step is the sign of the gradient, which rounding may turn where the gradient is nothing.
    moved = plain["params"]["layers"]["mlp"]["up"]["kernel"]
    assert np.linalg.norm(kernel - moved) <= 1e-5 * np.linalg.norm(moved)
