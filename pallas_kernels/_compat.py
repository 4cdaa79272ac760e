"""What differs between JAX 0.10 and 0.11, in one place.

`jax.enable_x64`, `jax.shard_map` and the `CompilerParams` of the TPU, Triton and Mosaic GPU back ends have
the same names in both; use them directly.
"""

import jax
from jax.sharding import AxisType, Mesh


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...], devices=None) -> Mesh:
    """A device mesh with `Auto` axes.

    `jax.make_mesh` defaults to `Explicit` axes, under which sharding becomes part of an array's type, and its
    first argument was renamed in 0.11.
    """
    axis_types = (AxisType.Auto,) * len(names)
    return jax.make_mesh(tuple(shape), tuple(names), axis_types=axis_types, devices=devices)
