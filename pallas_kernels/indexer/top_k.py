"""Top-k of the last axis that is cut over a mesh along every other axis.

XLA on CPU knows no way to cut ``lax.top_k`` and gathers the whole operand on every device, though rows do not depend on
each other (on TPU it cuts). Sorting does partition, but takes several times as long for a long row. Here the program says
how it is cut; on one device, and in programs compiled for other devices than the live ones, it is ``lax.top_k``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def top_k(x, k: int):
    """(values, index) [..., k] of the k largest entries of the last axis, largest first, ties to the lowest index."""
    mesh = jax.sharding.get_abstract_mesh()
    if x.ndim == 1 or mesh.manual_axes or AxisType.Explicit in mesh.axis_types:
        return tuple(lax.top_k(x, k))  # nothing to cut, cut by hand, or cut by its type
    return _rows(x, k)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rows(x, k):
    return _mapped(k)(x)


@_rows.defjvp
def _(k, primals, tangents):
    (x,), (dx,) = primals, tangents
    values, index = _rows(x, k)
    return (values, index), (jnp.take_along_axis(dx, index, axis=-1), np.zeros(index.shape, jax.dtypes.float0))


def _mapped(k: int):
    """``_cut``, under vmap one more axis of rows."""

    @jax.custom_batching.custom_vmap
    def f(x):
        # A compiler without its device (ahead of time, for a topology) does not know programs that say how they are cut.
        live = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
        cut = {} if live is None else {live: _cut(k, x.ndim)}
        return lax.platform_dependent(x, default=lambda x: tuple(lax.top_k(x, k)), **cut)

    @f.def_vmap
    def rule(size, mapped, x):
        return f(x), (True, True)

    return f


@functools.cache
def _cut(k: int, ndim: int):
    f = custom_partitioning(lambda x: tuple(lax.top_k(x, k)))
    rows = [f"r{i}" for i in range(ndim - 1)]

    def whole_rows(mesh, sharding):
        spec = (*sharding.spec, *(None,) * ndim)[: ndim - 1]
        return NamedSharding(mesh, PartitionSpec(*spec, None))

    def infer(mesh, args, results):
        return (whole_rows(mesh, args[0].sharding),) * 2

    def partition(mesh, args, results):
        at = whole_rows(mesh, args[0].sharding)
        return mesh, lambda x: tuple(lax.top_k(x, k)), (at, at), (at,)

    f.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{' '.join(rows)} m -> {' '.join(rows)} k, {' '.join(rows)} k",
        need_replication_factors=("m", "k"),
    )
    return f
