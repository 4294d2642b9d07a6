"""A file that one process at a time holds."""

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
def held(path: Path) -> Iterator[None]:
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
