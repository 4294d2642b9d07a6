"""How this process manages its memory: what glibc returns to the kernel, what the garbage collector looks at."""

import contextlib
import ctypes
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of glibc's mallopt(3)
_NEVER = -1  # read as the largest size


def disable_trim() -> None:
    """Has glibc return no memory to the kernel, for the whole process; without glibc nothing happens. Call it before
    jax
    looks for devices: a thread keeps the arena that it started with.

    On a CPU an XLA program allocates all its buffers at every call. Large buffers come from mmap, page by page and
    zeroed by the kernel each time: a quarter to a third of the training step of a small network, a sixth of Stable
    Diffusion's. The process keeps its peak memory, which it needs at every step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries than glibc have none
        if mallopt is not None:
            mallopt(_MMAP_MAX, 0)
            mallopt(_TRIM_THRESHOLD, _NEVER)
            mallopt(_ARENA_MAX, 1)  # of threads' own arenas, large memory always goes back


def trim() -> None:
    """Returns free memory to the kernel, once: after rare work whose peak would be kept for the rest of the process.
    Without glibc nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def is_cpu_only() -> bool:
    """Whether jax will find no accelerator, without starting jax: JAX_PLATFORMS is cpu, or no plugin is installed."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" or not (platforms or any(map(importlib.util.find_spec, plugins)))


def malloc_environment() -> dict[str, str]:
    """The environment variables that have the effect of `disable_trim` in a new process."""
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**48), "MALLOC_ARENA_MAX": "1"}


@contextlib.contextmanager
def without_old_objects() -> Iterator[None]:
    """Inside, the garbage collector skips the objects that exist now. A full collection runs when the newer objects
    reach a quarter of all others: the millions of objects of traced programs would delay it for thousands of steps."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
