import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import _compat
from pallas_kernels import flash as op
from tests.pallas_kernels.flash.calls import call


@pytest.mark.parametrize("backend, body", [("tpu", "tpu"), ("gpu", "gpu"), ("cpu", None)])
def test_the_body_of_the_backend_is_chosen_where_it_works(rng, monkeypatch, backend, body):
    """Kernels are not partitioned by the compiler: with several devices they run inside a shard_map only."""
    o, opt = call(rng, n=16, b=2, h=2, tile=8, unit=8)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert op._kernel_for(o, opt) is None or body in op.MEASURED
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(op, "MEASURED", {"tpu", "gpu"})
    mesh = _compat.make_mesh((2,), ("data",), jax.devices()[:2])
    found = {}

    def note(name, q):
        found[name] = op._kernel_for(o | {"q": q[:1], "k": o["k"][:1], "v": o["v"][:1]}, opt)
        return q

    jax.jit(lambda q: note("many devices", q))(o["q"])
    jax.jit(jax.shard_map(lambda q: note("shard_map", q), mesh=mesh, in_specs=P("data"), out_specs=P("data")))(o["q"])
    assert found == {"many devices": None, "shard_map": body}
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert op._kernel_for(o, opt) == body
    assert op._kernel_for(o | {"bias": jnp.zeros((1, 1, 16, 16))}, opt) is None


def test_an_unknown_name_is_refused(rng):
    o, opt = call(rng, n=4)
    with pytest.raises(ValueError, match="implementation: expected None or one of .*'xla'.*, got 'cuda'"):
        op.flash(o, opt, "cuda")
    assert np.isfinite(op.flash(o, opt)[0]).all()
