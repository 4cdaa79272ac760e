import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxattn.core import mask as masks
from pallas_kernels import _dispatch, _mesh
from pallas_kernels import flash as op
from pallas_kernels.flash import gpu, xla
from tests.pallas_kernels.flash.calls import Slopes, call, compare

SIZES = {"data": 2, "sequence": 2, "tensor": 2}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(kind,) * 3, devices=jax.devices()[:8])


def rich(rng):
    """Lists and facts of kv heads, of query heads and of all, per batch row and shared."""
    return call(rng, n=64, b=2, h=4, g=2, tile=16, unit=8, hs=2, k=4, mask=masks.causal(), key_bias=2, score_mod=Slopes(),
                padded=3, bounds=True)  # fmt: skip


def test_a_kernel_on_eight_devices_has_the_values_and_gradients_of_one(rng):
    o, opt = rich(rng)
    calls = []

    def body(operands, opt):
        calls.append({x: operands[x].shape for x in ("q", "k", "index")})
        return gpu.flash(operands, opt, interpret=True)

    with jax.set_mesh(mesh_of()):
        compare(_mesh.spread(body, op.dims(o, opt)), o, opt, 1e-5)
    # half of the batch, of the queries and of the heads each; all keys of the half's heads
    assert calls[0] == {"q": (1, 32, 2, 8), "k": (1, 64, 1, 8), "index": (1, 1, 2, 4)}


def test_what_does_not_divide_stays_whole(rng):
    o, opt = call(rng, n=30, b=3, h=4, g=1, tile=15, unit=8, hs=4)
    assert _mesh.cuts(o, op.dims(o, opt), SIZES) == {"batch": (), "length": ("sequence",), "heads": ("tensor",)}
    assert _mesh.cuts(o, op.dims(o, opt), SIZES | {"tensor": 8})["heads"] == ()
    o, opt = call(rng, n=31, b=4, h=6, g=3, tile=16, unit=8)  # the last tile is not whole
    sizes = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 2}
    assert _mesh.cuts(o, op.dims(o, opt), sizes) == {"batch": ("data", "fsdp"), "heads": ()}
    with jax.set_mesh(mesh_of()):
        out, lse = jax.jit(lambda o: _mesh.spread(xla.flash, op.dims(o, opt))(o, opt))(o)
    want = op.flash(o, opt, "reference")
    np.testing.assert_allclose(out, want[0], atol=1e-5)
    np.testing.assert_allclose(lse, want[1], atol=1e-5)


@pytest.mark.parametrize("where", ["explicit axes", "a mesh that is given", "inside a shard_map over one axis", "vmap"])
def test_where_a_call_may_stand(rng, where):
    o, opt = rich(rng)
    want = op.flash(o, opt, "reference")[0]
    dims = op.dims(o, opt)
    if where == "a mesh that is given":
        got = _mesh.spread(xla.flash, dims, mesh=mesh_of())(o, opt)[0]
    elif where == "explicit axes":
        with jax.set_mesh(mesh_of(AxisType.Explicit)):
            got = jax.jit(lambda o: _mesh.spread(xla.flash, dims)(o, opt)[0])(o)
    elif where == "vmap":
        with jax.set_mesh(mesh_of()):
            got = jax.jit(jax.vmap(lambda s: _mesh.spread(xla.flash, dims)(o | {"v": o["v"] * s}, opt)[0]))(jnp.array([0.0, 1]))
        assert not got[0].any()
        got = got[1]
    else:
        with jax.set_mesh(mesh_of()):
            inner = lambda v: _mesh.spread(xla.flash, dims)(o | {"v": v}, opt)[0]  # noqa: E731
            got = jax.jit(jax.shard_map(inner, in_specs=P(), out_specs=P(), axis_names={"data"}, check_vma=False))(o["v"])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_dispatch_cuts_kernels_and_leaves_the_rest_to_xla(rng, monkeypatch):
    o, opt = call(rng, n=32, b=2, h=2, tile=16, unit=8)
    seen = []

    def note(name):
        def body(operands, opt):
            seen.append((name, operands["q"].shape[0]))
            return operands["q"], operands["q"][..., 0]

        return body

    bodies = {name: note(name) for name in ("reference", "xla", "gpu")}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for name in (None, "gpu", "xla"):
        with jax.set_mesh(mesh_of()):
            _dispatch.choose(bodies, ("xla", "gpu"), name, lambda name: None, lambda: op.dims(o, opt))(o, opt)
    _dispatch.choose(bodies, ("xla", "gpu"), None, lambda name: None, lambda: op.dims(o, opt))(o, opt)  # no mesh is set
    assert seen == [("gpu", 1), ("gpu", 1), ("xla", 2), ("xla", 2)]
