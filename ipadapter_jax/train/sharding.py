"""How arrays are sharded over the mesh of training, which has the axes `data` and `fsdp`.

The batch is split over both axes, the optimizer's state too (ZeRO-2), frozen weights over `fsdp`. The compiler places
the communication: gradients are summed over all devices, a frozen weight is gathered where it is used.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ipadapter_jax.errors import InputError
from ipadapter_jax.runtime.mesh import TRAIN_AXES, batch_sharding, replicated
from ipadapter_jax.runtime.trees import Leaf

Tree = TypeVar("Tree")


def check_batch(devices: int, batch_size: int, accumulate: int) -> None:
    """Raises InputError unless every device gets the same number of samples in every part of a batch."""
    if batch_size % (devices * accumulate):
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise InputError(
            f"--data.batch-size {batch_size} cannot be split{parts} over {devices} devices; "
            f"make it a multiple of {devices * accumulate}"
        )


def split(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The longest dimension that divides evenly over `axes`; replicated when there is none, and for vectors."""
    parts = math.prod(mesh.shape[axis] for axis in axes)
    fitting = [(size, i) for i, size in enumerate(shape) if size % parts == 0]
    if len(shape) < 2 or parts == 1 or not fitting:
        return replicated(mesh)
    chosen = max(fitting)[1]
    return NamedSharding(mesh, P(*(axes if i == chosen else None for i in range(len(shape)))))


def frozen_sharding(mesh: Mesh, leaf: Leaf | np.ndarray) -> NamedSharding:
    return split(mesh, ("fsdp",), leaf.shape)


def optimizer_sharding(mesh: Mesh, leaf: Leaf) -> NamedSharding:
    return split(mesh, TRAIN_AXES, leaf.shape)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda array: array, out_shardings=replicated(mesh))


def replicate_leaves(tree: Tree, mesh: Mesh) -> Tree:
    """Arrays with a copy on every device; what has one already is not touched. All processes call this together."""
    # One after the other: concurrent programs may meet those of another process in another order, and deadlock.
    return jax.tree.map(lambda x: x if x.is_fully_replicated else _gather(mesh)(x).block_until_ready(), tree)


def put_global(array: np.ndarray | Array, sharding: NamedSharding) -> Array:
    """An array that every process holds whole -> a global one. No process speaks to another, unlike with
    jax.device_put."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index]))


def local_indices(mesh: Mesh, batch_size: int) -> list[int]:
    """The indices of the samples of a global batch that this process's devices hold, ascending."""
    owned = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({sample for index in owned if index is not None for sample in range(batch_size)[index[0]]})


def global_batch(mesh: Mesh, arrays: Mapping[str, np.ndarray], indices: list[int], batch_size: int) -> dict[str, Array]:
    """The samples of this process with these `indices`, arrays (len(indices), ...), as arrays (batch_size, ...) sharded
    over all devices of all processes."""
    position = {index: i for i, index in enumerate(indices)}

    def sharded(local: np.ndarray) -> Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = range(batch_size)[index[0]]
            return local[position[wanted.start] : position[wanted.start] + len(wanted)]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), batch_sharding(mesh), part)

    return {name: sharded(local) for name, local in arrays.items()}
