"""Which device holds what, by the tables of `jaxattn.nn.partition` from paths to logical axes and on to mesh axes.

Parameters, optimizer state, restored checkpoints and loaded weights all go through `shardings`, so they agree.
The optimizer's moments have their parameter's path as the end of their own, and patterns are searched, not
matched from the start, so they need no rules of their own.
"""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxattn.nn.partition import LOGICAL_AXES, logical_axes, path_name, spec

log = logging.getLogger(__name__)

# data: rows of the batch; fsdp: rows as well, and parameters along `embed`; sequence: tokens; tensor: heads,
# mlp and vocabulary. The order is that of the devices: neighbours, which talk most, share `tensor`; processes
# differ in `data` first.
MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# The layout record is [rows, tokens]; everything else in a batch is cut by rows only.
BATCH_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"^(tokens|targets|loss_mask|segment|position)$", ("batch", "length")),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes data, fsdp, sequence, tensor over `devices` (None: all); one size may be -1, the rest."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"{axis}: expected a positive size, or -1 for the rest, got {size}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"{' and '.join(open_axes)}: expected at most one -1, got {len(open_axes)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        given = ", ".join(f"{axis}={sizes[axis] if axis not in open_axes else -1}" for axis in MESH_AXES)
        raise ValueError(f"mesh: expected sizes whose product is the {len(devices)} devices, got {given}")
    # Auto: XLA propagates shardings from the arguments; Explicit, the default, would ask for them at every op.
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def batch_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """The logical axis of every dimension of the batch entry called `name`: rows come first."""
    axes = next((a for pattern, a in BATCH_RULES if re.search(pattern, name)), ("batch",))[:ndim]
    return (*axes, *[None] * (ndim - len(axes)))


def _tree_shardings(tree: Any, mesh: Mesh, name_axes) -> Any:
    notes: dict[str, list[str]] = {}

    def one(path, leaf):
        name, shape = path_name(path), np.shape(leaf)
        found: list[str] = []
        sharding = NamedSharding(mesh, spec(shape, name_axes(name, len(shape)), mesh, found))
        for note in found:
            notes.setdefault(note, []).append(name)
        return sharding

    result = jax.tree_util.tree_map_with_path(one, tree)
    for note, names in notes.items():
        log.warning("%s (%s%s)", note, names[0], f" and {len(names) - 1} more" if len(names) > 1 else "")
    return result


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The tree of NamedSharding for parameters or optimizer state: arrays or anything with a shape."""
    return _tree_shardings(tree, mesh, logical_axes)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """The tree of NamedSharding for a (global) batch."""
    return _tree_shardings(batch, mesh, batch_axes)


def shard(tree: Any, mesh: Mesh) -> Any:
    """Parameters or optimizer state, the same values in every process, placed on the mesh."""
    return jax.tree.map(_place, tree, shardings(tree, mesh))


def _place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh. Every process passes its own rows; in order of process they are the global batch.

    Raises ValueError if several processes share rows, or rows do not divide over the mesh between processes.
    """
    processes = jax.process_count()
    if processes == 1:
        return jax.tree.map(jax.device_put, batch, batch_shardings(batch, mesh))
    parts = math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])
    if parts % processes:
        raise ValueError(
            f"mesh: expected data x fsdp to be a multiple of the {processes} processes, so that each holds rows "
            f"of its own, got {parts}"
        )

    def one(path, leaf):
        leaf = np.asarray(leaf)
        shape = (leaf.shape[0] * processes, *leaf.shape[1:])
        if shape[0] % parts:
            raise ValueError(
                f"batch {path_name(path)}: expected rows that {parts} (data x fsdp) divides, got {shape[0]}"
            )
        where = NamedSharding(mesh, spec(shape, batch_axes(path_name(path), leaf.ndim), mesh))
        return jax.make_array_from_process_local_data(where, leaf, shape)

    return jax.tree_util.tree_map_with_path(one, batch)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
