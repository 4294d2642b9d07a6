"""File locks: one process at a time in a folder, or one per shard of the work in it."""

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
    """Holds the lock for process p of P, shard (p, P), in a folder, which is created.

    Only processes with the same P may work in it at the same time: with another P they would do the same work twice.
    Raises InputError naming a process that holds the lock or works with another P.
    """
    process, processes = shard
    with file_lock(folder / _name(process, processes)):
        allowed = {_name(other, processes) for other in range(processes)}
        for path in sorted(folder.glob("lock*")):  # after taking our own: of two that start together, one notices
            if path.name not in allowed and (holder := _holder(path)) is not None:
                raise InputError(
                    f"{folder} is in use by {holder}, with another number of processes; wait until it ends, start all "
                    "with the same number or choose another folder"
                )
        yield


def _name(process: int, processes: int) -> str:
    return "lock" if processes == 1 else f"lock-{process}-of-{processes}"


def _holder(path: Path) -> str | None:
    """The process that holds a lock; None if none does, or if that cannot be determined."""
    with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: several processes may check together
        except BlockingIOError:
            return file.read().strip() or "another process"
    return None


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds the lock `path`, whose folder is created.

    The kernel releases the lock when the process ends, however it ends; the file that remains has no meaning.
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
