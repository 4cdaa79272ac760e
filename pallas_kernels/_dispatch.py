"""Which body of an operation runs: the same rules for every operation.

A call that names a body gets it, or a ValueError saying what it does not support. A call that names none always works:
the accelerator's body where it has been measured on a device and takes the call, plain XLA otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

# The bodies written for a backend, best first.
ACCELERATORS = {"tpu": ("tpu",), "gpu": ("hopper", "gpu"), "cuda": ("hopper", "gpu")}


def choose(bodies: Mapping[str, Callable], measured, implementation: str | None, refusal: Callable) -> Callable:
    """The body to call.

    ``bodies``: {name: function}. ``measured``: names that a call without a name may get. ``refusal(name)``: what that
    body cannot do with this call, in words, or None.
    """
    if implementation is None:
        for name in ACCELERATORS.get(jax.default_backend(), ()):
            if name in bodies and name in measured and alone() and refusal(name) is None:
                return bodies[name]
        return bodies["xla"]
    if implementation not in bodies:
        raise ValueError(f"implementation: expected None or one of {sorted(bodies)}, got {implementation!r}")
    if implementation not in ("reference", "xla") and (why := refusal(implementation)) is not None:
        raise ValueError(f"implementation: {implementation!r} does not support {why}")
    return bodies[implementation]


def alone() -> bool:
    """One device, or inside a shard_map over every mesh axis: kernels do not partition by themselves."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 or bool(mesh.axis_names and set(mesh.manual_axes) == set(mesh.axis_names))
