"""Memory that is kept once it was had."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ALL = -1, -4, 2**31 - 1  # parameters of glibc's mallopt(3), and a size above any


def keep_freed_memory() -> None:
    """Tells glibc, for the whole process, to give no memory back to the kernel; elsewhere nothing happens.

    On a CPU a program of XLA allocates all its buffers anew at every call. As large ones they come from mmap, page by
    page and zeroed by the kernel each time: a quarter to a third of a small network's training step, a sixth of Stable
    Diffusion's. The process keeps its peak, which it needs again and again.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries than glibc have none
        if mallopt is not None:
            mallopt(_MMAP_MAX, 0)
            mallopt(_TRIM_THRESHOLD, _ALL)


def environment() -> dict[str, str]:
    """The same for a process that is begun with these variables."""
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(_ALL)}
