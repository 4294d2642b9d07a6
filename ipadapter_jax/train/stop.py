"""Asked to stop: SIGTERM and Ctrl-C, noticed at the same step by every process of a run."""

import signal

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Notices that the run is asked to stop, by SIGTERM (a scheduler's notice) or Ctrl-C to any of its processes.

        with StopSignal() as stop:
            for step in steps:
                ...
                if stop.requested(step):
                    break

    A second Ctrl-C ends the process at once. Only for the main thread, as all signal handlers.
    """

    def __enter__(self) -> "StopSignal":
        self._asked = False
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._interrupted)}
        if not jax.distributed.is_initialized():  # else jax has a handler of its own, which tells the other processes
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step. Every process asks once after every step, with the step's number; all of
        them get True at the same one. Takes microseconds."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _ask(self, *_: object) -> None:
        self._asked = True

    def _interrupted(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        signal.raise_signal(signal.SIGTERM)
