"""Bodies over a mesh: a kernel is not cut by the compiler, so it runs inside a shard_map, one call per device.

An operation says what the dimensions of its operands and outputs are called (``Dims``); a table says which mesh axes cut
a name. A name is cut over as many of its axes as divide every dimension that bears it (those of size 1 are shared by all
devices). Axes that cut nothing hold the same values and do the same work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

# Logical name -> mesh axes. Cuts by length are cuts of the queries; every device then holds all keys.
AXES: Mapping[str, tuple[str, ...]] = {"batch": ("data", "fsdp"), "length": ("sequence",), "heads": ("tensor",)}


class Dims(NamedTuple):
    """Trees shaped like the operands and the outputs, whose leaves are tuples: a name or None per dimension. Outputs are
    cut like the operands, so a named dimension of an output must be as long as the longest of that name."""

    operands: Any
    outputs: Any


def free_axes(mesh=None) -> dict[str, int]:
    """{name: size} of the axes of ``mesh`` (None: the ambient one) over which a call here can still be cut."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    return {name: size for name, size in mesh.shape.items() if name not in manual}


def cuts(operands, dims: Dims, sizes: Mapping[str, int], axes: Mapping[str, tuple[str, ...]] = AXES) -> dict[str, tuple]:
    """{logical name: mesh axes that cut it}."""
    lengths: dict[str, set[int]] = {}

    def note(x, names):
        for size, name in zip(x.shape, names, strict=True):
            if name is not None and size > 1:
                lengths.setdefault(name, set()).add(size)

    jax.tree.map(note, operands, dims.operands)
    found = {}
    for name, long in lengths.items():
        taken: tuple[str, ...] = ()
        for axis in axes.get(name, ()):
            parts = math.prod(sizes[x] for x in taken) * sizes.get(axis, 1)
            if sizes.get(axis, 1) > 1 and all(size % parts == 0 for size in long):
                taken += (axis,)
        found[name] = taken
    return found


def spread(body: Callable, dims: Dims, *, mesh=None, axes: Mapping[str, tuple[str, ...]] = AXES) -> Callable:
    """``body(operands, *static)`` as a call on every device of the mesh, each with its part of batch and heads.

    ``mesh``: None for the ambient one (``jax.set_mesh``). Without a mesh, or inside a shard_map over all of it, this is
    ``body`` itself. Differentiable and jittable like ``body``, whose operands must be arrays.
    """
    sizes = free_axes(mesh)
    if math.prod(sizes.values()) == 1:
        return body

    def call(operands, *static):
        taken = cuts(operands, dims, sizes, axes)

        def place(x, names):
            sized = zip(x.shape, names, strict=True)
            return PartitionSpec(*(taken[name] or None if name is not None and n > 1 else None for n, name in sized))

        def result(names):
            return PartitionSpec(*(taken.get(name) or None for name in names))

        in_specs = jax.tree.map(place, operands, dims.operands)
        out_specs = jax.tree.map(result, dims.outputs, is_leaf=_is_names)
        inner = jax.shard_map(lambda o: body(o, *static), mesh=mesh, in_specs=(in_specs,), out_specs=out_specs,
                              axis_names=set(sizes), check_vma=False)  # fmt: skip
        where = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        if AxisType.Explicit in where.axis_types:  # layouts are part of the types there: cut as this call wants them
            operands = jax.tree.map(jax.sharding.reshard, operands, in_specs)
        return inner(operands)

    return call


def varying(tree, like):
    """``tree`` as values that differ between the devices over which any leaf of ``like`` does: inside a shard_map, what a
    loop starts with must say so if what it carries on does."""

    def of(x):
        kind = jax.typeof(x)  # the attribute was called vma in other versions
        return getattr(getattr(kind, "manual_axis_type", kind), "varying", getattr(kind, "vma", frozenset()))

    axes = frozenset().union(*map(of, jax.tree.leaves(like)))

    def cast(x):
        missing = tuple(sorted(axes - of(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _is_names(x) -> bool:
    return isinstance(x, tuple) and all(e is None or isinstance(e, str) for e in x)
