"""What the dimensions of an array are called, and which mesh axes each name is cut over: the one table of both.

Parameters, batches and activations use the same names, so a layout is changed in one place. Without a mesh nothing here
does anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxattn.core.types import Array

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
    "layers": (),
}

STREAM = ("batch", "length", None)  # of a residual stream [B, N, C]


def spec(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, notes: list[str] | None = None
) -> PartitionSpec:
    """Mesh axes of an array of `shape` whose dimensions are called `axes`.

    A dimension that its mesh axes do not divide stays whole, and `notes` says so.
    """
    if len(shape) != len(axes):
        raise ValueError(f"axes: expected one for each dimension of {tuple(shape)}, got {tuple(axes)}")
    entries: list[str | tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in LOGICAL_AXES:
            raise ValueError(f"axes: expected names among {', '.join(LOGICAL_AXES)}, got {axis!r}")
        names = tuple(a for a in LOGICAL_AXES.get(axis, ()) if mesh.shape.get(a, 1) > 1)
        parts = math.prod(mesh.shape[a] for a in names)
        if size % parts:
            if notes is not None:
                notes.append(f"{axis} = {size} is not a multiple of {' x '.join(names)} = {parts}: kept whole")
            names = ()
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def constrain(x: Array, axes: Sequence[str | None]) -> Array:
    """Ask for the layout of `axes` (logical names) inside a jitted function.

    `x` itself if no mesh is set, or one whose axes are not XLA's to cut (inside a shard_map, or explicit)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh))
