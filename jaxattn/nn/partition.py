"""What the dimensions of an array are called, by a parameter's path, and which mesh axes each name is cut over.

Parameters, batches and activations use the same names, so a layout is changed in one place. Without a mesh nothing here
does anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxattn.core.types import Array
from pallas_kernels._mesh import AXES

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    **AXES,  # "batch", "length" and "heads": kernels are cut as the activations are
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
    "layers": (),
}

# Pattern searched in the path -> logical axes of the trailing dimensions (None: whole on every device). The
# first that fits counts; the leading dimension of a stack ([L, ...], below "layers") is added by itself.
PARAMETER_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|/)embed/embedding$", ("vocab", "embed")),
    (r"(^|/)head/kernel$", ("embed", "vocab")),
    (r"(^|/)attn/[qkv]/kernel$", ("embed", "heads")),
    (r"(^|/)attn/[qkv]/bias$", ("heads",)),
    (r"(^|/)attn/o/kernel$", ("heads", "embed")),
    (r"(^|/)mlp/(gate|up)/kernel$", ("embed", "mlp")),
    (r"(^|/)mlp/(gate|up)/bias$", ("mlp",)),
    (r"(^|/)mlp/down/kernel$", ("mlp", "embed")),
    (r"(^|/)([qkv]|gate|up)/a$", ("embed", None)),  # adapters: cut as their kernels, their rank whole
    (r"(^|/)[qkv]/b$", (None, "heads")),
    (r"(^|/)(gate|up)/b$", (None, "mlp")),
    (r"(^|/)o/a$", ("heads", None)),
    (r"(^|/)down/a$", ("mlp", None)),
    (r"(^|/)(o|down)/b$", (None, "embed")),
    (r"(^|/)kernel$", ("embed", None)),  # patches, projectors, other heads
)

STREAM = ("batch", "length", None)  # of a residual stream [B, N, C]


def path_name(path: Sequence[Any]) -> str:
    """"layers/attn/q/kernel" from a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def logical_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """The logical axis of every dimension of the parameter (or optimizer moment) called `name`."""
    for pattern, axes in PARAMETER_RULES:
        if re.search(pattern, name) and len(axes) <= ndim:
            break
    else:
        axes = ()
    lead = [None] * (ndim - len(axes))
    if lead and re.search(r"(^|/)layers/", name):
        lead[0] = "layers"
    return (*lead, *axes)


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
