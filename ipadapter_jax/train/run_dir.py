"""The folder of a run, which one run at a time holds and all of its processes share."""

import contextlib
import socket
import time
import zlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.store import Store
from ipadapter_jax.train.multihost import broadcast_error, run_on_first

CHECKPOINTS = "checkpoints"  # the folder of the checkpoints in it
_LOCK = "lock"


@contextlib.contextmanager
def run_lock(store: Store) -> Iterator[None]:
    """Holds the lock of a run's store for process 0 of a job, making the folder. All processes of the job call this.

    The kernel lets go of the lock when its process ends, however that ends; the file stays and means nothing.
    What a run that was killed has left half written is removed. Raises InputError, in every process, naming the process
    and the machine of the run that holds the folder.
    """
    with contextlib.ExitStack() as stack:
        run_on_first(lambda: _enter(store, stack))
        if problem := broadcast_error(_not_shared(store)):
            raise InputError(problem)
        yield


def _enter(store: Store, stack: contextlib.ExitStack) -> None:
    stack.enter_context(store.lock((0, 1)))
    store.remove_partial_files()


def _not_shared(store: Store) -> str | None:
    """What is wrong where this process does not see what process 0 has just written into the lock file."""
    if jax.process_count() == 1:
        return None
    written = multihost_utils.broadcast_one_to_all(np.uint32(zlib.crc32(_content(store))))
    for _ in range(10):  # network file systems take a while
        if zlib.crc32(_content(store)) == int(written):
            return None
        time.sleep(0.5)
    return f"{store} is not the same folder on all hosts ({socket.gethostname()} has another): give one that all share"


def _content(store: Store) -> bytes:
    return b"" if store.size(_LOCK) is None else store.read(_LOCK)
