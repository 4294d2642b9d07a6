"""kill -9 at random moments of a training run, of one process or of two."""

import dataclasses
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from ipadapter_jax.train.config import Train
from ipadapter_jax.train.run_dir import CHECKPOINTS
from tests.fault_injection.runs import HEARTBEAT, Job, hold, logged, outcome, prepare

_GRACE = 5  # seconds beyond the heartbeat that a survivor may take


@dataclasses.dataclass(frozen=True)
class Kill:
    """kill -9, also while checkpoints are written and deleted, of one process or of one or both of two.

    Equal to the bit to the run that nobody disturbed: every loss that was ever logged, the adapter file, the weights
    and the optimiser's moments. At most the save that was being written is lost."""

    times: int = 50
    steps: int = 300
    save_every: int = 4
    processes: int = 1
    devices: int = 2
    """Of each process."""
    seed: int = 0

    def __call__(self, work: Path) -> str:
        config, rng = prepare(work, self.steps, self.save_every), random.Random(self.seed)
        whole = dataclasses.replace(config, out=str(work / "undisturbed"))
        with self._job(whole) as job:
            job.finish()
        expected, tally = logged(Path(whole.out)), _Tally()
        for _ in range(self.times):
            left = set(_half_written(Path(config.out)))
            with self._job(config) as job:
                self._kill(job, config, rng, tally, left)
                self._check_log(job, config, expected, tally)
        with self._job(config) as job:
            job.finish()
            self._check_log(job, config, expected, tally)
        found = logged(Path(config.out))
        hold(found == expected, f"{len(found)} of {len(expected)} losses in the last log, or others")
        final, undisturbed = outcome(Path(config.out)), outcome(Path(whole.out))
        hold(final == undisturbed, f"{final} is not {undisturbed}")
        return tally.line(self.times)

    def _job(self, config: Train) -> Job:
        return Job(config, processes=self.processes, devices=self.devices)

    def _kill(self, job: Job, config: Train, rng: random.Random, tally: "_Tally", left: set) -> None:
        """Of two processes in turn one, the other, and both at once."""
        aim = rng.choice(tuple(_MOMENTS))
        alive = _wait(job, Path(config.out), _MOMENTS[aim], rng)
        hold(alive, f"the run was over before it could be killed: more --steps than {config.steps}")
        victims = job.members
        if self.processes > 1 and (turn := tally.kills % 3) < 2:
            victims = [job.members[turn]]
        for victim in victims:
            victim.kill()
        began = time.monotonic()
        survivors = [member for member in job.members if member not in victims]
        job.wait(HEARTBEAT + _GRACE)
        if survivors:
            tally.slowest = max(tally.slowest, time.monotonic() - began)
            last = job.said().strip().splitlines()[-1:]
            clear = last and last[0].startswith("ipadapter-jax: ") and "the same command" in last[0]
            hold(bool(clear), f"the survivor's last line is {last}")
        tally.note(Path(config.out), left)

    def _check_log(self, job: Job, config: Train, expected: dict[int, float], tally: "_Tally") -> None:
        """Every loss in the log is that of the undisturbed run, and the run went on from the last save but one or a
        later one: only the save that was being written may be missing."""
        found = logged(Path(config.out))
        different = [step for step, loss in found.items() if loss != expected[step]]
        hold(not different, f"other losses at the steps {different[:5]}")
        tally.losses += len(found)
        log = (Path(config.out) / "metrics.jsonl").read_bytes() if found else b""
        if log != tally.log:  # else it was killed before it came to training
            saved = (tally.reached // self.save_every) * self.save_every
            tally.lost = max(tally.lost, saved - job.began_at())
            hold(saved - job.began_at() <= self.save_every, f"from step {tally.reached} back to {job.began_at()}")
        tally.reached, tally.log = max(found, default=0), log


@dataclasses.dataclass
class _Tally:
    kills: int = 0
    losses: int = 0
    reached: int = 0  # the newest step in the log
    log: bytes = b""
    lost: int = 0  # steps between the newest save that was begun and the one that a run went on from, at most
    in_saves: int = 0  # kills that left a checkpoint half written
    in_deletions: int = 0
    slowest: float = 0.0  # seconds that a survivor took to end

    def note(self, out: Path, left: set[Path]) -> None:
        """`left` is what an earlier kill has left half written."""
        self.kills += 1
        self.in_saves += bool(set(_half_written(out)) - left)
        self.in_deletions += any(_half_deleted(out))

    def line(self, times: int) -> str:
        hold(self.kills == times, f"{self.kills} kills of {times}")
        survivors = f"survivors ended within {self.slowest:.1f} s of a kill, " if self.slowest else ""
        return (
            f"{self.kills} kills, {self.in_saves} of them in a save and {self.in_deletions} in a deletion; {survivors}"
            f"{self.losses} logged losses, weights, optimiser and file equal; at most {self.lost} steps of saved work "
            "lost"
        )


def _half_written(out: Path) -> list[Path]:
    return list((out / CHECKPOINTS).glob("*tmp*"))


def _half_deleted(out: Path) -> list[Path]:
    """Steps that have lost a part."""
    steps = [path for path in (out / CHECKPOINTS).glob("*") if path.name.isdecimal()]
    return [path for path in steps if not all((path / item).is_dir() for item in ("state", "manifest"))]


def _anywhere(out: Path, rng: random.Random) -> bool:
    time.sleep(rng.uniform(0, 1))
    return True


def _in_a_save(out: Path, rng: random.Random) -> bool:
    if not _half_written(out):
        return False
    time.sleep(rng.uniform(0, 0.03))  # a save takes about so long
    return True


def _in_a_deletion(out: Path, rng: random.Random) -> bool:
    """Old steps are deleted when a new one has got its name."""
    try:
        before = set(os.listdir(out / CHECKPOINTS))
        time.sleep(0.001)
        new = set(os.listdir(out / CHECKPOINTS)) - before
    except FileNotFoundError:
        return False
    if not any(name.isdecimal() for name in new):
        return False
    time.sleep(rng.uniform(0, 0.005))
    return True


_MOMENTS: dict[str, Callable[[Path, random.Random], bool]] = {
    "anywhere": _anywhere,
    "save": _in_a_save,
    "deletion": _in_a_deletion,
}


def _wait(job: Job, out: Path, moment: Callable[[Path, random.Random], bool], rng: random.Random) -> bool:
    """One time in eight while it starts, else at the moment, after the first new step. False when the run is over."""
    before, early = max(logged(out), default=0), rng.random() < 1 / 8
    deadline = time.monotonic() + (rng.uniform(0, 8) if early else 300)
    while job.alive and time.monotonic() < deadline and max(logged(out), default=0) <= before:
        time.sleep(0.01)
    while job.alive and not early and not moment(out, rng):
        time.sleep(0.001)
    return job.alive
