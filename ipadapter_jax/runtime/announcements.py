"""What a command is doing while it shows nothing else: reading and compiling take minutes, and look like a hang."""

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
    """Says what is done inside, and afterwards how long it took; not when it fails, which says something itself."""
    _say(f"{what}{remark and f' ({remark})'} ...")
    start = time.monotonic()
    yield
    _say(f"{what}: done in {time.monotonic() - start:.1f} s")


@contextlib.contextmanager
def announce_if_slow(what: str, seconds: float = 2) -> Iterator[None]:
    """The same for what takes longer than that now and then, and is not worth a line otherwise."""
    start = time.monotonic()
    timer = threading.Timer(seconds, _say, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (took := time.monotonic() - start) > seconds:
        _say(f"{what}: done in {took:.1f} s")


class AnnounceFirstCall:
    """Announces what takes long the first time alone, for then it is compiled."""

    def __init__(self) -> None:
        self._done: set[str] = set()

    def __call__(self, what: str) -> AbstractContextManager[None]:
        if what in self._done:
            return contextlib.nullcontext()
        self._done.add(what)
        return announce(what, "may take minutes")


def _say(line: str) -> None:
    with tqdm.tqdm.external_write_mode(file=sys.stderr):  # a bar on the terminal makes room
        log.info("%s", line)
