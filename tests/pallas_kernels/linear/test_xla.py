import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import _compat
from pallas_kernels import linear as op
from pallas_kernels.linear import xla
from tests.jaxprs import intermediates
from tests.pallas_kernels.linear.calls import CALLS, call, check, results


def head_by_head(o, opt):
    return xla.chunked(o, opt.chunk or 32, opt.scale, True)


@pytest.mark.parametrize("name", [x for x in CALLS if "bfloat16" not in x])  # it is widened before anything else
def test_values_and_gradients_are_the_references(name):
    check(head_by_head, name)


def test_heads_together_is_head_by_head(rng):
    o, opt = call(rng, n=50, b=2, h=6, k_heads=2, v_heads=3, f=8, dv=5, decay="shared channels", reset=(7,))
    want = results(lambda o, opt: xla.chunked(o, 16, opt.scale, True), o, opt)
    got = results(lambda o, opt: xla.chunked(o, 16, opt.scale, False), o, opt)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=1e-5 * float(jnp.abs(x).max()), err_msg=name)


def test_a_mesh_cuts_heads_and_each_device_works_on_one_at_a_time(rng):
    """On two devices of a CPU as on one, and with arrays that XLA cuts by itself."""
    o, opt = call(rng, n=40, b=2, h=4, k_heads=2, decay="head", chunk=16)
    mesh = _compat.make_mesh((2,), ("tensor",), jax.devices()[:2])
    want, end = op.linear(o, opt, "reference")
    with jax.set_mesh(mesh):
        out, state = jax.jit(lambda o: op.linear(o, opt))(o)
        names = [x for x, _ in intermediates(jax.make_jaxpr(lambda o: op.linear(o, opt))(o))]
    assert "shard_map" in names and out.sharding.spec == P(None, None, "tensor")
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(state, end, atol=1e-5)


def test_strong_decays_cost_their_neighbours_no_precision(rng):
    """Fifty resets in a chunk of sixty-four: their sum is 6000, where float32 knows three decimals."""
    o, opt = call(rng, n=64, f=4, decay="token", reset=range(3, 53))
    o["log_decay"] = jnp.where(jnp.isfinite(o["log_decay"]), -0.01, -jnp.inf)
    want, _ = op.linear(o, opt, "reference")
    out, _ = xla.chunked(o, 64, opt.scale, True)
    np.testing.assert_allclose(out, want, atol=3e-7 * float(jnp.abs(want).max()))


def test_an_empty_sequence_keeps_the_state(rng):
    o, opt = call(rng, n=0, h=2, decay="token")
    out, state = op.linear(o, opt)
    assert out.shape == (1, 0, 2, 8)
    np.testing.assert_array_equal(state, o["state"])
    with pytest.raises(ValueError, match="implementation: 'gpu' does not support an empty sequence"):
        op.linear(o, opt, "gpu")
