"""Worker processes that load data: what they may use, how their results come over, and when they end."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from typing import Any

import absl.flags
import grain
import jax
import numpy as np

AHEAD = 3  # what waits outside a worker: one on its way, one in its queue, one taken from there
_SHARED_MEMORY = "/dev/shm"


def load_in_workers(loading: grain.IterDataset, workers: int, element_bytes: int) -> grain.IterDataset:
    """The same elements (trees of arrays, together of about `element_bytes`) in the same order, loaded by processes:
    process i of n loads elements i, i + n, ... and up to AHEAD of them wait to be asked for."""
    if not absl.flags.FLAGS.is_parsed():  # grain reads flags, which only programs made with absl parse
        absl.flags.FLAGS.mark_as_parsed()
    options = grain.experimental.DatasetOptions(
        min_shm_size=shared_memory_threshold(element_bytes * (AHEAD * workers + 1))
    )
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return grain.experimental.WithOptionsIterDataset(loading, options).mp_prefetch(processes, _begin).map(_own)


def shared_memory_threshold(needed: int) -> int:
    """From how many bytes on an array comes through shared memory, and not through a pipe, which takes 10 times the
    processor time.

    Many a container has 64 MB of it, and no error tells that it is full: the process dies. There may be more programs
    here that want as much.
    """
    if os.path.isdir(_SHARED_MEMORY) and shutil.disk_usage(_SHARED_MEMORY).free < 8 * needed:
        return sys.maxsize
    return 1 << 16


def _own(element: Any) -> Any:
    """With arrays of this process: those in shared memory leak when an interpreter that exits still holds them."""
    return jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, element)


def _begin(_index: int, _workers: int) -> None:
    """A worker touches no accelerator, leaves signals to its parent, which may have steps to finish and to save (a
    terminal and SLURM send them to all processes), and ends with it."""
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
