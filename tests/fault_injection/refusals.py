"""A second run in the folder of one that is going on, and other settings or data in the folder of one that was."""

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

from tests.fault_injection.runs import (
    Job,
    changed,
    contents,
    hold,
    logged,
    make_images,
    outcome,
    prepare,
    refusal,
    run_here,
)


@dataclasses.dataclass(frozen=True)
class Refuse:
    """Two runs in one folder, and changed settings, data or a bit of the frozen weights: refused, every difference
    listed, and the folder is as before."""

    steps: int = 60

    def __call__(self, work: Path) -> str:
        config, out = prepare(work, self.steps, save_every=4), Path(work / "run")
        with Job(dataclasses.replace(config, out=str(work / "undisturbed"))) as job:
            job.finish()
        with Job(config) as job:
            while job.alive and not logged(out):
                time.sleep(0.01)
            hold(job.alive, f"the run was over before another could begin: more --steps than {self.steps}")
            said = refusal(lambda: run_here(config))
            hold(job.alive, f"the run was over before the other was refused: more --steps than {self.steps}")
            hold(f"in use by process {job.members[0].pid} on " in said, said)
            job.finish()
        before = contents(out)
        for changes, named in self._changes(work):
            said = refusal(lambda changes=changes: run_here(changed(config, steps=self.steps + 2, **changes)))
            hold(all(name in said for name in named), f"{changes}: {named} are not in: {said}")
            hold(contents(out) == before, f"{changes}: the folder has changed")
        hold(logged(out) == logged(work / "undisturbed"), "other losses than those of an undisturbed run")
        hold(outcome(out) == outcome(work / "undisturbed"), "other weights than those of an undisturbed run")
        return f"a second run and {len(self._changes(work))} changes refused, each difference named, nothing changed"

    def _changes(self, work: Path) -> list[tuple[dict[str, Any], list[str]]]:
        """Settings, and what the refusal has to name."""
        fewer, base = work / "fewer", work / "other-model"
        if not fewer.exists():
            make_images(fewer, 20)
            shutil.copytree(work / "model", base)
            with open(base / "unet" / "diffusion_pytorch_model.safetensors", "r+b") as file:
                file.seek(-2, os.SEEK_END)  # the low byte of the last number
                byte = file.read(1)[0]
                file.seek(-2, os.SEEK_END)
                file.write(bytes([byte ^ 1]))
        return [
            ({"optim__learning_rate": 2e-3}, ["settings.optim.learning_rate: 0.001 -> 0.002"]),
            ({"seed": 1, "data__drop_text": 0.5}, ["settings.seed: 0 -> 1", "settings.data.drop_text: 0.05 -> 0.5"]),
            ({"data__path": str(fewer)}, ["data.source.records: 24 -> 20"]),
            ({"model__base": str(base)}, ["frozen weights.unet: "]),
        ]
