"""One JAX device per CPU core, for programs: it has to be said before JAX starts its backend.

Attention on CPU is fastest when every core owns some heads (or rows) and walks them by itself; one device that owns all
cores shares out every small operation among them instead.
"""

from __future__ import annotations

import os

import jax
from jax.sharding import AxisType, Mesh

MOST = 8  # heads of common models divide over so many


def one_device_per_core() -> None:
    """Ask for a device per core, up to ``MOST`` and a power of two; nothing where the user chose a platform other than CPU
    or a number of devices (``JAX_NUM_CPU_DEVICES``, ``--xla_force_host_platform_device_count`` in ``XLA_FLAGS``), or where
    JAX runs already."""
    platforms = jax.config.jax_platforms
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or jax.config.jax_num_cpu_devices > 0
    if chosen or platforms and not platforms.startswith("cpu"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", min(MOST, 1 << (cores.bit_length() - 1)))
    except RuntimeError:  # the backend runs: what it has, it keeps
        return


def heads_mesh() -> Mesh:
    """All devices on the axis that cuts heads (``jaxattn.nn.partition``)."""
    return jax.make_mesh((jax.device_count(),), ("tensor",), axis_types=(AxisType.Auto,))


def core_mesh() -> Mesh | None:
    """For programs: a device per core and the mesh of all of them, where they are CPU cores and more than one; else None."""
    one_device_per_core()
    return heads_mesh() if jax.default_backend() == "cpu" and jax.device_count() > 1 else None
