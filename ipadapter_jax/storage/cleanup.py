"""Told to end by SIGTERM or SIGHUP: what was begun is put right first."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

Begun = TypeVar("Begun")


class _Told(BaseException):
    """Raised in the main thread where a signal has asked for the end; nobody catches it but `cleanup_on_signal`."""


@contextlib.contextmanager
def cleanup_on_signal(begin: Callable[[], Begun], undo: Callable[[Begun], None]) -> Iterator[Begun]:
    """A block that is given what `begin` returns, and after which `undo` has had it, also where a SIGTERM or SIGHUP
    would end this process on the spot: the block is left as by an exception, and when all is done the signal ends the
    process. Neither `begin` nor `undo` is interrupted, so they are short.

    Nothing changes in other threads than the main one, and for signals that somebody handles or ignores (nohup).
    """
    numbers = _deadly() if threading.current_thread() is threading.main_thread() else []
    told: list[int] = []
    interrupts = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        told.append(number)
        # On the way into or out of a block an exception would go past it: the signal then waits for the end.
        if interrupts and (frame is None or frame.f_globals is not vars(contextlib)):
            interrupts = False
            raise _Told

    try:
        for number in numbers:
            signal.signal(number, note)
        begun = begin()
        try:
            try:
                interrupts = True
                if told:
                    raise _Told
                yield begun
            finally:
                interrupts = False
        finally:
            undo(begun)
    except _Told:
        if not told:  # by whom this block stands in
            raise
    finally:
        restore_handlers(dict.fromkeys(numbers, signal.SIG_DFL))
        if told:
            signal.raise_signal(told[0])


def restore_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    """Gives signals the handlers that they had before. CPython drops a signal that comes while its handler is taken
    away; blocked, it waits for the handler that is given back."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _deadly() -> list[signal.Signals]:
    """The signals that end the process on the spot. SIGTERM is jax's where several processes run together, which Python
    is not told of."""
    jax = sys.modules.get("jax")
    together = jax is not None and jax.distributed.is_initialized()
    numbers = [signal.SIGHUP] if together else [signal.SIGHUP, signal.SIGTERM]
    return [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
