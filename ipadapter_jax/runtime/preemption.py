"""Graceful shutdown: SIGTERM and Ctrl-C are noticed where the work can be interrupted."""

import signal
from typing import Self

from ipadapter_jax.storage.cleanup import SignalHandler, restore_handlers

EXIT_PREEMPTED = 75  # the exit code that asks a scheduler to rerun the same command


class GracefulShutdown:
    """Notices a request to stop: SIGTERM (a scheduler's notice) or Ctrl-C.

        with GracefulShutdown() as stop:
            for batch in batches:
                ...
                if stop.requested:
                    break

    A second Ctrl-C ends the process immediately. For the main thread only, as all signal handlers.
    """

    def __enter__(self) -> Self:
        self.requested = False
        self._before = {number: signal.signal(number, handler) for number, handler in self._handlers().items()}
        return self

    def __exit__(self, *_: object) -> None:
        restore_handlers(self._before)

    def _handlers(self) -> dict[signal.Signals, SignalHandler]:
        return {signal.SIGINT: self._on_interrupt, signal.SIGTERM: self._request}

    def _request(self, *_: object) -> None:
        self.requested = True

    def _on_interrupt(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        signal.raise_signal(signal.SIGTERM)
