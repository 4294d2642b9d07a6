"""Preemption, noticed at the same step by every process of a run."""

import signal

import jax
from jax.experimental import multihost_utils

from ipadapter_jax.runtime.preemption import GracefulShutdown
from ipadapter_jax.storage.cleanup import SignalHandler


class CoordinatedShutdown(GracefulShutdown):
    """Notices that the run is preempted, by SIGTERM or Ctrl-C to any of its processes.

    with CoordinatedShutdown() as stop:
        for step in steps:
            ...
            if stop.should_stop(step):
                break
    """

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step. Every process calls this once after every step, with the step's number; all
        get True at the same one. Takes microseconds."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _handlers(self) -> dict[signal.Signals, SignalHandler]:
        handlers = super()._handlers()
        if jax.distributed.is_initialized():  # jax has a handler of its own, which tells the other processes
            del handlers[signal.SIGTERM]
        return handlers
