"""Told to end by SIGTERM or SIGHUP: what was begun is put right first."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


class _Told(BaseException):
    """Raised in the main thread where a signal has asked for the end; nobody catches it but `unwinding`."""


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """A SIGTERM or SIGHUP that would end this process on the spot leaves the block as an exception does, so that every
    `finally` in it is done; then the signal ends the process. Nothing changes in other threads than the main one, and
    for signals that somebody handles or ignores (nohup)."""
    numbers = _deadly() if threading.current_thread() is threading.main_thread() else []
    told: list[int] = []

    def leave(number: int, _: object) -> None:
        told.append(number)
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # what is in `finally` is short
        raise _Told

    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    except _Told:
        if not told:  # by whom this block stands in
            raise
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        if told:
            signal.raise_signal(told[0])


def _deadly() -> list[signal.Signals]:
    """The signals that end the process on the spot. SIGTERM is jax's where several processes run together, which Python
    is not told of."""
    jax = sys.modules.get("jax")
    together = jax is not None and jax.distributed.is_initialized()
    numbers = [signal.SIGHUP] if together else [signal.SIGHUP, signal.SIGTERM]
    return [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
