"""The two device meshes of the package, and the shardings that need nothing but a mesh.

Sampling runs on the devices of one process, along one axis `data`. Training runs on the devices of all processes, along
two axes `data` and `fsdp`. A batch is split over all axes of its mesh.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ipadapter_jax.errors import InputError

TRAIN_AXES = ("data", "fsdp")


def local_mesh() -> Mesh:
    """All devices of this process along the axis `data`."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def global_mesh(fsdp: int = 1) -> Mesh:
    """All devices of all processes, in groups of `fsdp` neighbors. Raises InputError when that does not divide."""
    devices = jax.devices()
    if len(devices) % fsdp:
        raise InputError(f"--mesh.fsdp {fsdp} does not divide the {len(devices)} devices; choose a divisor")
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, TRAIN_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))
