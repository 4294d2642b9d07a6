"""Makes small networks fast on a CPU: one device per core, and reuse of freed memory."""

import os

import jax

from ipadapter_jax.runtime import malloc

_MOST = 16  # devices, which divide every batch of these scripts


def use_cores() -> None:
    """Prepares this process, before jax has looked for devices. Small networks train up to 1.4 times faster on a device
    per core than on one of all cores."""
    jax.config.update("jax_num_cpu_devices", _devices())
    malloc.disable_trim()


def environment() -> dict[str, str]:
    """The same for a process that is begun with this environment."""
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(_devices())} | malloc.malloc_environment()


def _devices() -> int:
    """The largest power of two that is no more than the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(1 << (cores.bit_length() - 1), _MOST)
