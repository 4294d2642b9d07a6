"""A run that goes on with other worker, process and device counts."""

import dataclasses
import json
import shutil
from collections import defaultdict
from pathlib import Path

from ipadapter_jax.train.config import Train
from tests.fault_injection.runs import Job, changed, hold, logged, prepare

# Run by each process before it trains: notes which captions, each record's own, it gives to the devices.
_WATCH = """
import json, jax
from ipadapter_jax.train import trainer
_given = trainer.global_batch
def _noting(mesh, arrays, rows, size):
    if "input_ids" in arrays:
        ids = [[int(i) for i in ids] for ids in arrays["input_ids"]]
        with open(f"{FOLDER}/{jax.process_index()}.jsonl", "a") as file:
            print(json.dumps({"rows": [*rows], "ids": ids}), file=file)
    return _given(mesh, arrays, rows, size)
trainer.global_batch = _noting
"""


@dataclasses.dataclass(frozen=True)
class Layout:
    processes: int = 1
    devices: int = 2
    workers: int = 0
    threads: int = 2


FIRST = Layout()
SAME = Layout(workers=2, threads=1)  # how devices share the work is the same
OTHERS = (Layout(devices=1), Layout(devices=8, workers=1), Layout(processes=2, devices=4))

Samples = dict[int, dict[int, list[int]]]
"""{step: {row: the ids of its caption}}"""


@dataclasses.dataclass(frozen=True)
class Layouts:
    """The second half of a run with other workers, threads, devices and processes: the same samples at every step, the
    same losses to the bit on the same devices and to 1e-6 on others."""

    steps: int = 20
    others: int = len(OTHERS)
    """How many of the other device layouts."""

    def __call__(self, work: Path) -> str:
        config, half = prepare(work, self.steps, save_every=10**6), self.steps // 2
        samples, losses = self._run(config, FIRST)
        started = changed(config, steps=half, out=str(work / "begun"))
        first, _ = self._run(started, FIRST)
        worst = 0.0
        for number, layout in enumerate([SAME, *OTHERS[: self.others]]):
            own = changed(config, out=str(work / f"other-{number}"))
            shutil.copytree(started.out, own.out)
            found, other = self._run(own, layout, after=half)
            hold(first | found == samples, f"{layout}: other samples")
            hold(other.keys() == losses.keys(), f"{layout}: other steps")
            difference = max(abs(other[step] / losses[step] - 1) for step in losses)
            hold(difference <= (0 if layout == SAME else 1e-6), f"{layout}: losses differ by {difference:.2g}")
            worst = max(worst, difference)
        return (
            f"other workers and threads, and {self.others} other layouts of devices and processes from the middle on: "
            f"the same rows in all {self.steps} batches; losses bit-equal, and to {worst:.1g} on other devices"
        )

    def _run(self, config: Train, layout: Layout, after: int = 0) -> tuple[Samples, dict[int, float]]:
        """The samples of the steps after this one, and the losses of all."""
        out, samples = Path(config.out), defaultdict(dict)
        notes = out.with_name(f"{out.name}-samples")
        notes.mkdir()
        config = changed(config, data__workers=layout.workers, data__threads=layout.threads)
        before = f"FOLDER = {str(notes)!r}\n{_WATCH}"
        with Job(config, processes=layout.processes, devices=layout.devices, before=before) as job:
            job.finish()
        for path in notes.iterdir():
            for step, line in enumerate(map(json.loads, path.read_text().splitlines()), after + 1):
                samples[step] |= dict(zip(line["rows"], line["ids"], strict=True))
        return samples, logged(out)
