"""SIGTERM to a training run of one process, or to one of two."""

import dataclasses
import random
import re
import signal
import time
from pathlib import Path

from ipadapter_jax.runtime.preemption import EXIT_PREEMPTED
from tests.fault_injection.runs import Job, hold, logged, outcome, prepare

_IN_FLIGHT = 2  # steps whose losses are not in the log yet
_POLL = 1.0  # seconds between two looks of jax for a signal that other processes are to be told of
_NOTICED = {1: 1, 2: 2}  # further steps: the one that is running; of two processes the one that they agree on as well


@dataclasses.dataclass(frozen=True)
class Stop:
    """SIGTERM: all processes save the same step, end with exit code 75, and go on to the bit."""

    times: int = 10
    steps: int = 300
    processes: int = 1
    devices: int = 2
    seed: int = 0

    def __call__(self, work: Path) -> str:
        config, rng = prepare(work, self.steps, save_every=10**6), random.Random(self.seed)
        whole, out, late = dataclasses.replace(config, out=str(work / "undisturbed")), Path(config.out), []
        with Job(whole, processes=self.processes, devices=self.devices) as job:
            job.finish()
        for _ in range(self.times):
            with Job(config, processes=self.processes, devices=self.devices) as job:
                late.append(self._stop(job, out, rng))
        with Job(config, processes=self.processes, devices=self.devices) as job:
            job.finish()
        hold(logged(out) == logged(Path(whole.out)), "other losses than those of the undisturbed run")
        hold(outcome(out) == outcome(Path(whole.out)), "other weights than those of the undisturbed run")
        return (
            f"{self.times} SIGTERMs to one of {self.processes}: exit code {EXIT_PREEMPTED}, one step saved everywhere, "
            f"{max(late)} steps at most after the newest in the log when it was noticed ({_IN_FLIGHT} are in flight); "
            "equal to the bit"
        )

    def _stop(self, job: Job, out: Path, rng: random.Random) -> int:
        """Steps between the newest in the log when the signal was noticed, and the one that was saved."""
        before = max(logged(out), default=0)
        while job.alive and max(logged(out), default=0) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        for member in job.members:  # so that the log stands still between the look at it and the signal
            member.send_signal(signal.SIGSTOP)
        seen = max(logged(out))
        hold(job.alive and seen < self.steps, f"the run was over before it could be stopped: more --steps than {seen}")
        rng.choice(job.members).send_signal(signal.SIGTERM)
        for member in job.members:
            member.send_signal(signal.SIGCONT)
        if self.processes > 1:
            time.sleep(_POLL)
            seen = max(logged(out))
        codes = job.wait()
        hold(set(codes) == {EXIT_PREEMPTED}, f"exit codes {codes}: {job.said()[-1000:]}")
        saved = {int(step) for step in re.findall(r"preempted: step (\d+) is saved", job.said())}
        hold(len(saved) == 1, f"the processes saved the steps {saved}")
        (step,) = saved
        hold(max(logged(out)) == step, f"step {step} is saved, {max(logged(out))} is the last in the log")
        late, most = step - seen, _IN_FLIGHT + _NOTICED[self.processes]
        hold(late <= most, f"saved {late} steps after the newest in the log, not {most}")
        return late
