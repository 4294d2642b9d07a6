"""A file that one process at a time holds, and folders whose work is split among several."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ipadapter_jax.errors import InputError

log = logging.getLogger("ipadapter_jax")


@contextlib.contextmanager
def shard_lock(folder: Path, shard: tuple[int, int]) -> Iterator[None]:
    """Holds the work of process p of P, shard (p, P), in a folder, making the folder.

    Only processes of one job, with the same P, may be at work together: split in another way they would do the same
    work twice. Raises InputError naming the process that is.
    """
    process, processes = shard
    with file_lock(folder / _name(process, processes)):
        allowed = {_name(other, processes) for other in range(processes)}
        for path in sorted(folder.glob("lock*")):  # after taking our own: of two that begin at once, one notices
            if path.name not in allowed and (holder := _holder(path)) is not None:
                raise InputError(
                    f"{folder} is in use by {holder}, with another number of processes; wait until it ends, start all "
                    "with the same number or choose another folder"
                )
        yield


def _name(process: int, processes: int) -> str:
    return "lock" if processes == 1 else f"lock-{process}-of-{processes}"


def _holder(path: Path) -> str | None:
    """Who holds a lock; None where nobody does, or where that cannot be told."""
    with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who look do not meet
        except BlockingIOError:
            return file.read().strip() or "another process"
    return None


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds the lock `path`, making its folder.

    The kernel lets go of the lock when its process ends, however that ends; the file stays and means nothing.
    Raises InputError naming the process and the machine that hold it.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror}); choose another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"{folder} is in use by {holder}; wait until that run ends or choose another folder"
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): take care to start one run only", folder, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
        file.flush()
        yield
