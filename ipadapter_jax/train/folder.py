"""The folder of a run: one run at a time, and what has changed since it was begun."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ipadapter_jax.errors import InputError

log = logging.getLogger("ipadapter_jax")
_ABSENT = object()


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds `folder`/lock for process 0 of a job, making the folder. All processes of the job call this.

    The kernel lets go of the lock when its process ends, however that ends; the file stays and means nothing.
    Raises InputError, in every process, naming the process and the machine of the run that holds the folder.
    """
    with contextlib.ExitStack() as stack:
        problem = _take(folder, stack) if jax.process_index() == 0 else None
        if problem := agreed(problem):
            raise InputError(problem)
        if problem := agreed(_not_shared(folder)):
            raise InputError(problem)
        yield


def together(job: Callable[[], Any]) -> Any:
    """What `job` returns. It may fail in one process only: then InputError in all of them. All processes call this."""
    result = problem = None
    try:
        result = job()
    except InputError as error:
        problem = str(error)
        if jax.process_count() == 1:
            raise
    if problem := agreed(problem):
        raise InputError(problem)
    return result


def _not_shared(folder: Path) -> str | None:
    """What is wrong where this process does not see what process 0 has just written into the lock file."""
    if jax.process_count() == 1:
        return None
    path = folder / "lock"
    written = multihost_utils.broadcast_one_to_all(np.uint32(zlib.crc32(_content(path))))
    for _ in range(10):  # network file systems take a while
        if zlib.crc32(_content(path)) == int(written):
            return None
        time.sleep(0.5)
    return f"{folder} is not the same folder on all hosts ({socket.gethostname()} has another): give one that all share"


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _take(folder: Path, stack: contextlib.ExitStack) -> str | None:
    """Opens and locks the file until `stack` ends; returns what is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((folder / "lock").open("a+", encoding="utf-8"))
    except OSError as error:
        return f"{folder}: cannot write there ({error.strerror}); choose another folder"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        return f"{folder} is in use by {holder}; wait until that run ends or choose another folder"
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s): take care to start one run only", folder, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
    file.flush()
    return None


def agreed(problem: str | None) -> str | None:
    """One answer for all processes of a job: None when none has a problem, else a process's own or a mention of the
    other's. All processes call this."""
    if jax.process_count() == 1:
        return problem
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(problem is not None)))
    return problem or (f"see the message of process {failed[0]}" if len(failed) else None)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested JSON objects, a line each: `optim.learning_rate: 0.0001 -> 0.0002`."""
    before, after = (_flat(json.loads(json.dumps(side))) for side in (old, new))
    return [
        f"{key}: {_shown(before.get(key, _ABSENT))} -> {_shown(after.get(key, _ABSENT))}"
        for key in before | after
        if key not in before or key not in after or before[key] != after[key]
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}; an empty object counts as a value, so that its absence shows."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value)
