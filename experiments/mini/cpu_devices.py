"""Makes training of small networks fast on a CPU: one device per core, and reuse of freed memory."""

import os

import jax

from ipadapter_jax.runtime import malloc

_MOST = 16  # devices; every batch size of these scripts is a multiple


def use_cores() -> None:
    """Sets up this process. Call it before jax initializes its devices. With one device per core, small networks train
    up to 1.4 times faster than with one device for all cores."""
    jax.config.update("jax_num_cpu_devices", _devices())
    malloc.disable_trim()


def environment() -> dict[str, str]:
    """Environment variables that set up a child process in the same way."""
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(_devices())} | malloc.malloc_environment()


def _devices() -> int:
    """The largest power of two up to the number of cores that this process may use, at most _MOST."""
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(1 << (cores.bit_length() - 1), _MOST)
