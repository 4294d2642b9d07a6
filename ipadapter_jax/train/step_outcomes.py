"""The outcomes of steps, read while the devices compute later steps. Too many bad steps or records end the run."""

from collections import deque
from typing import NamedTuple

import jax

from ipadapter_jax.data.loader import LoadedBatch
from ipadapter_jax.errors import InputError
from ipadapter_jax.train.build import Run
from ipadapter_jax.train.multihost import broadcast_error
from ipadapter_jax.train.step import StepMetrics

_IN_FLIGHT = 2  # steps that the devices have been given before the outcome of the first is read: they never wait


class _PendingStep(NamedTuple):
    number: int
    metrics: StepMetrics


class PendingSteps:
    """The steps that the devices have been given and whose outcome has not been read."""

    def __init__(self, run: Run):
        self._run = run
        self._steps: deque[_PendingStep] = deque()

    def add(self, number: int, metrics: StepMetrics) -> None:
        """Adds a step, and reads the outcomes of those that must be done by now."""
        self._steps.append(_PendingStep(number, metrics))
        self.wait(_IN_FLIGHT)

    def wait(self, in_flight: int = 0) -> None:
        """Waits until at most `in_flight` steps are unfinished, and reports the others.

        Raises InputError when too many steps in a row had non-finite gradients.
        """
        while len(self._steps) > in_flight:
            number, metrics = self._steps.popleft()
            skipped = int(metrics.bad_steps)
            if skipped >= self._run.config.optim.max_nonfinite_steps:
                raise InputError(
                    f"the gradients of {skipped} steps in a row, up to step {number}, were not finite; "
                    f"{self._run.config.out} holds the last good weights: start another run from them "
                    "(--model.init-from) with a lower --optim.learning-rate, with --optim.clip-norm, or in bfloat16 or "
                    "float32"
                )
            if self._run.reporter is not None:
                self._run.reporter.step(number, metrics, bad_records=self._run.skipped.bad)


class UnreadableRecords:
    """Counts the records that this process could not read. Too many of them end the run in all processes, at the same
    step."""

    def __init__(self, run: Run, samples_per_batch: int):
        self._run, self._samples_per_batch = run, samples_per_batch
        self._problem: str | None = None

    def add(self, number: int, loaded: LoadedBatch, pending: PendingSteps) -> None:
        """Counts those of step `number`. Raises InputError when there are too many: several processes agree on that
        where metrics are logged, after the pending steps, as only one program may communicate at a time."""
        try:
            self._run.skipped.add(self._samples_per_batch, loaded.skipped)
        except InputError as error:
            self._problem = str(error)
        if jax.process_count() > 1:
            if number % self._run.config.log.every:
                return
            pending.wait()
        if problem := broadcast_error(self._problem):
            raise InputError(problem)
