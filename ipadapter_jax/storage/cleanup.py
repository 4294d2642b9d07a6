"""Cleanup before SIGTERM or SIGHUP ends the process."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TypeVar

SignalHandler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None  # as signal.signal takes it
Resource = TypeVar("Resource")


class _Terminated(BaseException):
    """Raised in the main thread when a signal arrives; only `cleanup_on_signal` catches it."""


@contextlib.contextmanager
def cleanup_on_signal(acquire: Callable[[], Resource], release: Callable[[Resource], None]) -> Iterator[Resource]:
    """A context whose value is `acquire()`, and at whose end `release` is called with that value, also when a SIGTERM
    or SIGHUP would end the process immediately: the block is then left as by an exception, `release` runs, and the
    signal ends the process. Neither `acquire` nor `release` is interrupted, so both must be short.

    In threads other than the main one, and for signals that are handled or ignored (nohup), nothing changes.
    """
    numbers = _terminating_signals() if threading.current_thread() is threading.main_thread() else []
    received: list[int] = []
    interrupts = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        received.append(number)
        # While a block is entered or left an exception would bypass it: the signal then waits for the end.
        if interrupts and (frame is None or frame.f_globals is not vars(contextlib)):
            interrupts = False
            raise _Terminated

    try:
        for number in numbers:
            signal.signal(number, on_signal)
        resource = acquire()
        try:
            try:
                interrupts = True
                if received:
                    raise _Terminated
                yield resource
            finally:
                interrupts = False
        finally:
            release(resource)
    except _Terminated:
        if not received:  # raised for an enclosing block
            raise
    finally:
        restore_handlers(dict.fromkeys(numbers, signal.SIG_DFL))
        if received:
            signal.raise_signal(received[0])


def restore_handlers(handlers: Mapping[signal.Signals, SignalHandler]) -> None:
    """Restores the handlers of signals. CPython drops a signal that arrives while its handler is being replaced; here
    it is blocked meanwhile and then reaches the restored handler."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _terminating_signals() -> list[signal.Signals]:
    """The signals that would end the process immediately. With jax.distributed, SIGTERM is handled by jax, which Python
    does not see."""
    jax = sys.modules.get("jax")
    distributed = jax is not None and jax.distributed.is_initialized()
    numbers = [signal.SIGHUP] if distributed else [signal.SIGHUP, signal.SIGTERM]
    return [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
