import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import _compat, _dispatch

BODIES = {name: name for name in ("reference", "xla", "tpu", "gpu")}


def pick(measured=("xla", "tpu", "gpu"), implementation=None, why=None):
    return _dispatch.choose(BODIES, measured, implementation, lambda name: why)


@pytest.mark.parametrize("backend, body", [("tpu", "tpu"), ("gpu", "gpu"), ("cpu", "xla")])
def test_the_body_of_the_backend_is_chosen_where_it_works(monkeypatch, backend, body):
    """Kernels are not partitioned by the compiler: with several devices they run inside a shard_map only."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    mesh = _compat.make_mesh((2,), ("data",), jax.devices()[:2])
    found = {}

    def note(name, x):
        found[name] = pick()
        return x

    x = jnp.zeros(2)
    jax.jit(lambda x: note("many devices", x))(x)
    jax.jit(jax.shard_map(lambda x: note("shard_map", x), mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)
    assert found == {"many devices": "xla", "shard_map": body}
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert pick() == body
    assert pick(measured=("xla",)) == "xla"
    assert pick(why="this call") == "xla"


def test_a_named_body_is_used_or_says_why_not():
    assert pick(implementation="tpu", measured=("xla",)) == "tpu"
    assert pick(implementation="reference", why="this call") == "reference"
    with pytest.raises(ValueError, match="implementation: 'gpu' does not support this call"):
        pick(implementation="gpu", why="this call")
    with pytest.raises(ValueError, match="implementation: expected None or one of .*'xla'.*, got 'cuda'"):
        pick(implementation="cuda")
