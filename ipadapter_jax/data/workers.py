"""Worker processes that load data: their start, how their results are transferred, and their end."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from typing import TypeVar

import absl.flags
import grain
import jax
import numpy as np

AHEAD = 3  # elements outside a worker: one in transfer, one in its queue, one taken from it
_SHARED_MEMORY = "/dev/shm"
Element = TypeVar("Element")


def load_in_workers(loading: grain.IterDataset, workers: int, element_bytes: int) -> grain.IterDataset:
    """The same elements (trees of arrays of about `element_bytes` bytes) in the same order, loaded by worker processes:
    process i of n loads elements i, i + n, ..., up to AHEAD of them in advance."""
    if not absl.flags.FLAGS.is_parsed():  # grain reads flags, which only programs built with absl parse
        absl.flags.FLAGS.mark_as_parsed()
    options = grain.experimental.DatasetOptions(
        min_shm_size=shared_memory_threshold(element_bytes * (AHEAD * workers + 1))
    )
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return (
        grain.experimental.WithOptionsIterDataset(loading, options).mp_prefetch(processes, _start_worker).map(_copied)
    )


def shared_memory_threshold(needed: int) -> int:
    """The least bytes of an array that is transferred through shared memory, not through a pipe, which takes 10 times
    the processor time.

    Many containers have only 64 MB of shared memory, and a process that fills it dies without an error. Other programs
    may need as much.
    """
    if os.path.isdir(_SHARED_MEMORY) and shutil.disk_usage(_SHARED_MEMORY).free < 8 * needed:
        return sys.maxsize
    return 1 << 16


def _copied(element: Element) -> Element:
    """Copies arrays into this process: arrays in shared memory leak when an exiting interpreter still holds them."""
    return jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, element)


def _start_worker(_index: int, _workers: int) -> None:
    """A worker uses no accelerator, ignores SIGINT and SIGTERM, which a terminal and SLURM send to all processes (its
    parent may have steps to finish and to save), and ends with its parent."""
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
