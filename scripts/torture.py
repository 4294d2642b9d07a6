"""Kills a training run at random moments and holds what comes out against the run that nobody disturbed.

    python scripts/torture.py                        20 kills, about ten minutes on 2 cores
    python scripts/torture.py --kills 3 --steps 40

A run of a random model of two levels saves every few steps. It is killed (kill -9) again and again, at moments that
fall anywhere: while it starts, in steps, in saves, while old checkpoints are deleted. What must be equal to the bit:
every loss that was ever logged, the adapter file, and every array of the last checkpoint.
"""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from make_random_weights import MICRO, write_model
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Torture:
    """How much of it."""

    kills: int = 20
    steps: int = 300
    save_every: int = 4
    seed: int = 0
    devices: int = 2
    """Virtual CPU devices."""


def make_pictures(folder: Path, count: int = 24) -> None:
    """Smooth random pictures with captions."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        colours = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(colours).resize((40, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")


def command(work: Path, out: Path, torture: Torture) -> list[str]:
    settings: dict[str, Any] = {
        "out": out,
        "steps": torture.steps,
        "model.base": work / "model",
        "model.image-encoder": work / "model" / "ip_adapter" / "models" / "image_encoder",
        "data.path": work / "pictures",
        "data.resolution": 32,
        "data.batch-size": 2 * torture.devices,
        "data.threads": 2,
        "log.every": 1,
        "log.validate-every": 0,
        "checkpoint.every": torture.save_every,
        "checkpoint.export-dtype": "float32",
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "ipadapter_jax.cli", "train", "debug", *words, "--log.no-tensorboard"]


def environment(torture: Torture) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(torture.devices),
    }


def logged(out: Path) -> dict[int, float]:
    """The loss of every step in the log; a part of a line that a killed run left counts for nothing."""
    found = {}
    path = out / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
            found[values["step"]] = values["loss"]
        except (ValueError, KeyError):
            continue
    return found


def outcome(out: Path, steps: int) -> dict[str, Any]:
    """The adapter's sha256, and the digests of all arrays in the last checkpoint."""
    manifest = json.loads((out / "checkpoints" / str(steps) / "manifest" / "metadata").read_text())
    return {
        "adapter": hashlib.sha256((out / "adapter.safetensors").read_bytes()).hexdigest(),
        "arrays": manifest["leaves"],
    }


def run(work: Path, out: Path, torture: Torture) -> subprocess.Popen:
    log = open(work / f"{out.name}.log", "ab")  # noqa: SIM115 the child's
    return subprocess.Popen(command(work, out, torture), env=environment(torture), stdout=log, stderr=log)


def finish(process: subprocess.Popen, work: Path, out: Path) -> None:
    if process.wait() != 0:
        raise SystemExit(f"the run ended with {process.returncode}:\n{(work / f'{out.name}.log').read_text()[-3000:]}")


def kill_somewhere(process: subprocess.Popen, out: Path, rng: random.Random) -> bool:
    """One time in eight while it starts, else up to a second after its first new step: a few saves long. False when the
    run was over before."""
    before, early = max(logged(out), default=0), rng.random() < 1 / 8
    deadline = time.monotonic() + (rng.uniform(0, 8) if early else 300)
    while process.poll() is None and time.monotonic() < deadline and max(logged(out), default=0) <= before:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def main(torture: Torture) -> int:
    """Returns 0 when everything is equal."""
    rng, kills, different = random.Random(torture.seed), 0, []
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        work = Path(name)
        write_model(work / "model", MICRO, np.dtype(np.float16))
        make_pictures(work / "pictures")
        finish(run(work, work / "undisturbed", torture), work, work / "undisturbed")
        expected, losses = outcome(work / "undisturbed", torture.steps), logged(work / "undisturbed")
        out, records, at = work / "disturbed", 0, []
        while kills < torture.kills:
            process = run(work, out, torture)
            if not kill_somewhere(process, out, rng):
                break
            kills += 1
            seen = logged(out)
            records += len(seen)
            at.append(max(seen, default=0))
            different += [step for step, loss in seen.items() if loss != losses[step]]
        finish(run(work, out, torture), work, out)
        final, seen = outcome(out, torture.steps), logged(out)
        records += len(seen)
        different += [step for step, loss in seen.items() if loss != losses[step]]
        missing = losses.keys() - seen.keys()
    print(f"{kills} kills after steps {at}")
    print(f"{records} logged losses compared, {len(different)} differ; {len(missing)} steps missing in the last log")
    print(f"adapter.safetensors: {'equal' if final['adapter'] == expected['adapter'] else 'DIFFERENT'}")
    print(f"{len(final['arrays'])} arrays: {'equal' if final['arrays'] == expected['arrays'] else 'DIFFERENT'}")
    good = final == expected and not different and not missing and kills == torture.kills
    print("survived" if good else "NOT survived")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Torture)))
