"""Announces slow work: reading and compiling take minutes and would look like a hang."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import tqdm

log = logging.getLogger("ipadapter_jax")


@contextlib.contextmanager
def announce(what: str, remark: str = "") -> Iterator[None]:
    """Logs what the block does, and afterwards how long it took, unless it raises."""
    _log_line(f"{what}{remark and f' ({remark})'} ...")
    start = time.monotonic()
    yield
    _log_line(f"{what}: done in {time.monotonic() - start:.1f} s")


@contextlib.contextmanager
def announce_if_slow(what: str, seconds: float = 2) -> Iterator[None]:
    """Logs the same only if the block takes longer than `seconds`."""
    start = time.monotonic()
    timer = threading.Timer(seconds, _log_line, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (took := time.monotonic() - start) > seconds:
        _log_line(f"{what}: done in {took:.1f} s")


class AnnounceFirstCall:
    """Announces work that is slow only the first time, because it is compiled then."""

    def __init__(self) -> None:
        self._done: set[str] = set()

    def __call__(self, what: str) -> AbstractContextManager[None]:
        if what in self._done:
            return contextlib.nullcontext()
        self._done.add(what)
        return announce(what, "may take minutes")


def _log_line(line: str) -> None:
    with tqdm.tqdm.external_write_mode(file=sys.stderr):  # a progress bar makes room for the line
        log.info("%s", line)
