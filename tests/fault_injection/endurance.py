"""Two weeks of training in half an hour: many tiny steps of the real command, watched from outside."""

import dataclasses
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.fault_injection.runs import Job, changed, hold, logged, prepare

# Run by the process before it trains: a line for every program that XLA is asked for.
_WATCH = """
import jax
_file = open({path!r}, "a", buffering=1)
def _listen(name, seconds, **_):
    if name.endswith("backend_compile_duration"):
        _file.write(f"{{seconds}}\\n")
jax.monitoring.register_event_duration_secs_listener(_listen)
"""


class Sample(NamedTuple):
    step: int
    memory: float  # MB resident
    files: int  # open
    programs: int  # compiled, or taken from the cache, since the start


@dataclasses.dataclass(frozen=True)
class Endurance:
    """Steps of a small model with saves, exports and validation: resident memory is flat after the first 10,000 steps
    (its slope under 1 MB per 10,000), the number of open files is, and nothing is compiled after all has been done
    once."""

    steps: int = 100_000
    every: int = 500
    """Steps between two looks."""
    save_every: int = 2000
    settled: int = 10_000
    """Steps before memory counts."""
    slope: float = 1.0
    """MB per 10,000 steps that are allowed; the first thousands of steps need more."""

    def __call__(self, work: Path) -> str:
        config = prepare(work, self.steps, self.save_every)
        config = changed(config, data__batch_size=1, log__every=self.every, log__validate_every=self.save_every)
        note, began = work / "programs", time.monotonic()
        note.touch()
        with Job(config, devices=1, before=_WATCH.format(path=str(note))) as job:
            samples = self._watch(job, Path(config.out), note)
            job.finish()
        return f"{self.steps} steps in {time.monotonic() - began:.0f} s, {self.judge(samples)}"

    def judge(self, samples: list[Sample]) -> str:
        """What was seen. Raises Broken where a figure does not hold."""
        hold(len(samples) >= 0.9 * self.steps / self.every, f"{len(samples)} looks only, of {self.steps // self.every}")
        late = [sample for sample in samples if sample.step >= self.settled]
        slope = 10_000 * np.polyfit([sample.step for sample in late], [sample.memory for sample in late], 1)[0]
        first = [sample for sample in samples if sample.step > self.save_every]
        files = [sample.files for sample in samples]
        idle = min(files[: len(files) // 2])
        told = (
            f"{len(samples)} looks: memory {late[0].memory:.0f} to {late[-1].memory:.0f} MB, "
            f"{slope:+.2f} MB per 10,000 steps after the first {self.settled}; {idle} files open, {max(files)} while "
            f"it saves; {samples[-1].programs} programs, none after step {first[0].step}"
        )
        hold(min(files[len(files) // 2 :]) == idle, f"open files: {files}")
        hold(first[0].programs == first[-1].programs, f"programs: {[sample.programs for sample in first]}")
        hold(slope < self.slope, f"memory grows: {told}: {[round(s.memory, 1) for s in late][::10]}")
        return told

    def _watch(self, job: Job, out: Path, note: Path) -> list[Sample]:
        (member,), samples, seen = job.members, [], 0
        while job.alive:
            time.sleep(0.05)
            step = max(logged(out), default=0)
            if step > seen:
                seen = step
                pages = int(Path(f"/proc/{member.pid}/statm").read_text().split()[1])
                files = len(os.listdir(f"/proc/{member.pid}/fd"))
                if pages:  # none when the process has just ended
                    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
                    samples.append(Sample(step, memory, files, len(note.read_text().splitlines())))
        return samples
