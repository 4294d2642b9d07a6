"""What a run needs of each device's memory, computed before its first step, and what to do when it has less."""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ipadapter_jax.runtime.trees import Leaf, PyTree
from ipadapter_jax.train.batches import FrozenModels, TrainBatch
from ipadapter_jax.train.memory_estimate import peak_bytes
from ipadapter_jax.train.state import TrainState

Tree = TypeVar("Tree")

_UNKNOWN = 2**60


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, by what takes them."""

    frozen: int
    trainable: int
    optimizer: int  # moments, and the moving average
    batch: int
    activations: int  # stored for the backward pass, gradients, and temporaries, at their peak

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def table(self) -> str:
        """One line per part and one for their sum, in GiB."""
        rows = {
            "frozen weights": self.frozen,
            "trainable weights": self.trainable,
            "optimizer": self.optimizer,
            "batch": self.batch,
            "activations": self.activations,
            "total on each device": self.total,
        }
        return "\n".join(f"{name:<24}{count / 2**30:8.2f} GiB" for name, count in rows.items())


def plan_memory(
    make: Callable[[Mesh], Callable], mesh: Mesh, state: TrainState, frozen: FrozenModels, batch: TrainBatch
) -> MemoryPlan:
    """The plan of the step `make(mesh)` of train/step.py. Its arguments are global arrays, or their shapes with
    shardings; nothing is allocated or compiled.

    It assumes that one device computes the step of its part of the batch on a mesh of its own: the memory that
    communication needs comes on top.
    """
    devices = np.asarray(mesh.local_devices[:1]).reshape((1,) * len(mesh.axis_names))
    alone = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
    whole, part = _shapes((state, frozen), lambda x: x.shape), _shapes(batch, _of_one_device)
    program = jax.make_jaxpr(make(alone))(*whole, part)
    return MemoryPlan(
        frozen=_bytes(frozen),
        trainable=_bytes(state.params),
        optimizer=_bytes((state.opt_state, state.ema)),
        batch=_bytes(batch),
        activations=peak_bytes(program),
    )


def _of_one_device(array: Leaf) -> tuple[int, ...]:
    assert array.sharding is not None
    return array.sharding.shard_shape(array.shape)


def _shapes(tree: Tree, shape: Callable[[Leaf], tuple[int, ...]]) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape(x), x.dtype), tree)


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(_of_one_device(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_memory_limit() -> int | None:
    """Bytes that JAX may use on each device of all processes, where the devices say so; a CPU does not."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") or _UNKNOWN for device in jax.local_devices()]
    least = int(np.min(multihost_utils.process_allgather(np.float64(min(limits)))))
    return None if least >= _UNKNOWN else least


def memory_remedies(mesh: Mesh, *, batch_size: int, accumulate: int, remat: str, live: bool) -> str:
    """What takes less memory than these settings, the cheapest first. `live`: images are encoded in every step."""
    samples = batch_size // (mesh.size * accumulate)
    ways = {
        "encode the data once (ipadapter-jax encode)": live,
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment, in place of 0.75": jax.default_backend() == "gpu",
        "--model.remat always": remat == "never",
        f"--mesh.fsdp {mesh.size}": mesh.size > 1 and mesh.shape["fsdp"] == 1,
        f"--optim.accumulate {2 * accumulate}": samples > 1 and samples % 2 == 0,
        f"--data.batch-size {batch_size // 2}": samples > 1 and samples % 2 == 0,
    }
    return ", or ".join(way for way, open_ in ways.items() if open_) or "a device with more memory"
