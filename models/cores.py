"""What only a program can choose on CPU: one JAX device per core, and memory that stays.

Attention on CPU is fastest when every core owns some heads (or rows) and walks them by itself; one device that owns all
cores shares out every small operation among them instead. It has to be said before JAX starts its backend.

The arrays of a step come from malloc, and glibc gives those above some megabytes back to the system at once: the next step
waits for its pages to be cleared again, about a tenth of a prefill or of linear attention over 64K tokens.
"""

from __future__ import annotations

import ctypes
import os
import sys

import jax
from jax.sharding import AxisType, Mesh

MOST = 8  # heads of common models divide over so many
# What keeps freed memory: names for the environment of another program; numbers of mallopt (malloc.h), values.
KEEP = {"MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1), "MALLOC_TOP_PAD_": (-2, 1 << 26)}


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


def keep_memory() -> bool:
    """Have freed memory stay with the process, whatever its size; whether that was said. Nothing where the C library is not
    glibc or the user tunes it (``MALLOC_...``, ``GLIBC_TUNABLES``)."""
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all([libc.mallopt(option, value) for option, value in KEEP.values()])


def heads_mesh() -> Mesh:
    """All devices on the axis that cuts heads (``jaxattn.nn.partition``)."""
    return jax.make_mesh((jax.device_count(),), ("tensor",), axis_types=(AxisType.Auto,))


def core_mesh() -> Mesh | None:
    """For programs: a device per core and the mesh of all of them, where they are CPU cores and more than one; else None."""
    one_device_per_core()
    keep_memory()
    return heads_mesh() if jax.default_backend() == "cpu" and jax.device_count() > 1 else None
