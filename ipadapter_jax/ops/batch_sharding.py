"""Batch sharding: functions that treat each element of a batch independently run on each device's own elements.

XLA's partitioner shards plain arithmetic over the batch. It cannot shard kernels and loops over the batch: it would
gather the whole batch on every device. So these run inside `shard_map`.
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
    """A context for tracing a function: the batch is sharded over all axes of this mesh by XLA's partitioner."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def is_batch_sharded() -> bool:
    """Whether `shard_map_batch` moves no data: with one device, inside a shard_map, or within `batch_sharded`."""
    return jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty


def shard_map_batch(function: Callable[[*Arguments], Array], *arguments: *Arguments) -> Array:
    """function(*arguments) of arrays (B, ...) or trees of them, computed by each device for its own batch elements."""
    spread = _spread()
    if batch_shards() == 1:
        return function(*arguments)
    return jax.shard_map(function, in_specs=P(spread), out_specs=P(spread), check_vma=False)(*arguments)


def batch_shards() -> int:
    """The number of devices over which the batch is sharded in the function being traced; 1 if that is not known."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in _spread())


def _spread() -> tuple[str, ...]:
    """The axes of the current mesh that XLA's partitioner shards (not those inside a shard_map)."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
