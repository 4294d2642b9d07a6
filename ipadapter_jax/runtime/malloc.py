"""How this process manages its memory: what glibc returns to the kernel, what the garbage collector looks at."""

import contextlib
import ctypes
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of glibc's mallopt(3)
_NEVER = -1  # as a size more than any


def disable_trim() -> None:
    """Tells glibc, for the whole process, to give no memory back to the kernel; elsewhere nothing happens. To be called
    before jax has looked for devices: a thread stays with the arena that it began with.

    On a CPU a program of XLA allocates all its buffers anew at every call. As large ones they come from mmap, page by
    page and zeroed by the kernel each time: a quarter to a third of a small network's training step, a sixth of Stable
    Diffusion's. The process keeps its peak, which it needs again and again.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries than glibc have none
        if mallopt is not None:
            mallopt(_MMAP_MAX, 0)
            mallopt(_TRIM_THRESHOLD, _NEVER)
            mallopt(_ARENA_MAX, 1)  # of threads' own arenas, large memory always goes back


def trim() -> None:
    """Gives what is free back to the kernel, once: after work that is seldom done, whose peak would be kept for ever.
    Under glibc alone; elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def is_cpu_only() -> bool:
    """Whether jax will find no accelerator, told without letting it look: it was told so, or no plugin is installed."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
    asked = os.environ.get("JAX_PLATFORMS", "")
    return asked == "cpu" or not (asked or any(map(importlib.util.find_spec, plugins)))


def malloc_environment() -> dict[str, str]:
    """The same for a process that is begun with these variables."""
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
