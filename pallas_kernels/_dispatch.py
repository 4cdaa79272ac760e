"""Which body of an operation runs: the same rules for every operation.

A call that names a body gets it, or a ValueError saying what it does not support. A call that names none always works:
the accelerator's body where it has been measured on a device and takes the call, plain XLA otherwise.

XLA cuts "reference" and "xla" over a mesh as it cuts everything else; kernels it does not. Where the operation says what
its dimensions are called, ``choose`` therefore wraps every other body by ``_mesh.spread``: under an ambient mesh
(``jax.set_mesh``) each device runs it on its part of batch and heads. A body in plain XLA that is faster that way (one CPU
device per core, say) calls ``_mesh.spread`` itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator, Mapping

import jax

from pallas_kernels import _mesh

# The bodies written for a backend, best first.
ACCELERATORS = {"tpu": ("tpu",), "gpu": ("hopper", "gpu"), "cuda": ("hopper", "gpu")}
CUT_BY_XLA = frozenset({"reference", "xla"})

_UNNAMED: contextvars.ContextVar[str | None] = contextvars.ContextVar("unnamed", default=None)


@contextlib.contextmanager
def unnamed(name: str) -> Iterator[None]:
    """Calls traced inside that name no body get ``name``: the reference, say, whose products are those of the formula.
    What was jitted and traced before keeps its body."""
    token = _UNNAMED.set(name)
    try:
        yield
    finally:
        _UNNAMED.reset(token)


def kernels(operation: str, function: str, names: tuple[str, ...] = ("tpu", "gpu")) -> dict[str, Callable]:
    """{name: ``function`` of the module ``operation.name``}, imported on the first call: loading Pallas takes longer than
    most programs' imports."""

    def late(name: str) -> Callable:
        def body(*args):
            return getattr(importlib.import_module(f"{operation}.{name}"), function)(*args)

        return body

    return {name: late(name) for name in names}


def choose(
    bodies: Mapping[str, Callable],
    measured,
    implementation: str | None,
    refusal: Callable,
    dims: Callable[[], _mesh.Dims] | None = None,
    mesh=None,
) -> Callable:
    """The body to call, as ``body(operands, *static)``.

    ``bodies``: {name: function}. ``measured``: names that a call without a name may get. ``refusal(name)``: what that
    body cannot do with this call, in words, or None. ``dims()``: names of the operands' and outputs' dimensions.
    ``mesh``: to cut over, None for the ambient one.
    """
    implementation = _UNNAMED.get() if implementation is None else implementation
    if implementation is None:
        for name in ACCELERATORS.get(jax.default_backend(), ()):
            if name in bodies and name in measured and reaches(dims, mesh) and refusal(name) is None:
                return _cut(name, bodies, dims, mesh)
        return bodies["xla"]
    if implementation not in bodies:
        raise ValueError(f"implementation: expected None or one of {sorted(bodies)}, got {implementation!r}")
    if implementation not in CUT_BY_XLA and (why := refusal(implementation)) is not None:
        raise ValueError(f"implementation: {implementation!r} does not support {why}")
    return _cut(implementation, bodies, dims, mesh)


def _cut(name: str, bodies: Mapping[str, Callable], dims, mesh) -> Callable:
    return bodies[name] if dims is None or name in CUT_BY_XLA else _mesh.spread(bodies[name], dims(), mesh=mesh)


def reaches(dims, mesh=None) -> bool:
    """Whether a kernel called here works on all of its data: on one device, inside a shard_map over the whole mesh, or on
    a mesh that this call can be cut over. Arrays on several devices for which no mesh is set are XLA's to cut."""
    known = mesh is not None or bool(jax.sharding.get_abstract_mesh().axis_names)
    return alone() or known and dims is not None


def on_cpu() -> bool:
    """Whether what is traced here will run on CPU, as far as the backend and the ambient mesh tell."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() == "cpu" and (device is None or device.device_kind == "cpu")


def alone() -> bool:
    """One device, or inside a shard_map over every mesh axis: kernels do not partition by themselves."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 or bool(mesh.axis_names and set(mesh.manual_axes) == set(mesh.axis_names))
