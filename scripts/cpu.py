"""Memory that a CPU has freed is kept for its next use."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt(3)


def keep_heap() -> None:
    """Tells glibc to give no memory back to the system; elsewhere it does nothing.

    A program of XLA on a CPU allocates all its buffers anew at every call. As large ones they come from mmap, page by
    page and zeroed by the kernel each time: a quarter to a third of a small network's training step. The process then
    keeps its peak of memory, so this is for processes that do the same again and again.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries than glibc have none
        if mallopt is not None:
            mallopt(_MMAP_MAX, 0)
            mallopt(_TRIM_THRESHOLD, 2**31 - 1)
