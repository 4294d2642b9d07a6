"""What works on each row of a batch by itself, and so on a mesh by each device on the rows that it has.

The compiler spreads plain arithmetic over the devices. Inside kernels and loops over rows it does not see, and would
give every device all rows.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVarTuple

import jax
from jax import Array
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

Arguments = TypeVarTuple("Arguments")


def batch_sharded(mesh: Mesh) -> AbstractContextManager:
    """Says, while a function is traced for the compiler to spread, that rows lie over all axes of the mesh."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def is_batch_sharded() -> bool:
    """Whether `shard_map_batch` is free: on one device, on each device of a shard_map, or within `batch_sharded`."""
    return jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty


def shard_map_batch(function: Callable[[*Arguments], Array], *arguments: *Arguments) -> Array:
    """function(*arguments), arrays (B, ...) or trees of them, by each device on its rows."""
    spread = _spread()
    if batch_shards() == 1:
        return function(*arguments)
    return jax.shard_map(function, in_specs=P(spread), out_specs=P(spread), check_vma=False)(*arguments)


def batch_shards() -> int:
    """Over how many devices the compiler is to spread the rows of what is traced, as far as that is known."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in _spread())


def _spread() -> tuple[str, ...]:
    """The axes of the mesh that the compiler handles."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
