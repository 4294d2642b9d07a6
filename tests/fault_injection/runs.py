"""The run that faults are injected into: a model of random weights with steps of milliseconds, its data and recipe."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.testing.random_weights import write_model
from ipadapter_jax.testing.sizes import NANO
from ipadapter_jax.train.checkpoint import Checkpoints
from ipadapter_jax.train.config import Checkpoint, Data, Log, Mesh, Model, Optim, Train
from ipadapter_jax.train.export import ADAPTER
from ipadapter_jax.train.run_dir import CHECKPOINTS
from ipadapter_jax.train.trainer import train

SIDE = 8  # of the training images, in pixels
HEARTBEAT = 10  # seconds; less than the default, so that a lost process is noticed within the patience of a test


class Broken(Exception):
    """A figure does not hold."""


def hold(holds: bool, otherwise: object) -> None:
    """Raises Broken, saying what was found, unless the figure holds."""
    if not holds:
        raise Broken(str(otherwise))


def changed(config: Train, **changes: Any) -> Train:
    """The config with other settings, changed(config, steps=3, data__path="photos") for instance."""
    for name, value in changes.items():
        part, _, setting = name.rpartition("__")
        if part:
            value = dataclasses.replace(getattr(config, part), **{setting: value})
        config = dataclasses.replace(config, **{part or setting: value})
    return config


def prepare(work: Path, steps: int, save_every: int, images: int = 24) -> Train:
    """A model, images with captions, and a run of them that logs every step and shows nothing."""
    write_model(work / "model", NANO)
    make_images(work / "images", images)
    out, checkpoint = str(work / "run"), Checkpoint(every=save_every, export_dtype="float32")
    return changed(
        nano_run(work / "model"), out=out, data__path=str(work / "images"), steps=steps, checkpoint=checkpoint
    )


def nano_run(model: Path) -> Train:
    """A short run of the NANO model in this folder."""
    return Train(
        steps=10,
        model=Model(
            base=str(model), image_encoder=str(model / "ip_adapter" / "models" / "image_encoder"), dtype="float32"
        ),
        data=Data(batch_size=8, resolution=SIDE, threads=2),
        optim=Optim(learning_rate=1e-3),
        log=Log(every=1, validate_every=0, validation_size=4, sample_steps=2, tensorboard=False),
        checkpoint=Checkpoint(every=4),
    )


def make_images(folder: Path, count: int) -> None:
    """Smooth random images with captions."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        colours = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(colours).resize((40, 48), Image.Resampling.BICUBIC).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"image {i}")


# --- processes


class Job:
    """The processes of one run, which share a log file."""

    def __init__(self, config: Train, *, processes: int = 1, devices: int = 2, before: str = ""):
        """Starts them, each with so many virtual CPU devices. `before` is Python that each runs first."""
        out = Path(config.out)
        self.log = out.with_name(f"{out.name}.log")
        self._began = self.log.stat().st_size if self.log.exists() else 0
        mesh = [config.mesh]
        if processes > 1:
            place = f"127.0.0.1:{free_port()}"
            mesh = [Mesh(1, place, processes, i, heartbeat_seconds=HEARTBEAT) for i in range(processes)]
        self.members = []
        for number, place in enumerate(mesh):
            recipe = out.with_name(f"{out.name}-{number}.py")
            settings = dataclasses.replace(config, mesh=place)
            recipe.write_text(f"from ipadapter_jax.train.config import *\n\n{before}\nconfig = {settings!r}\n")
            command = [sys.executable, "-m", "ipadapter_jax.cli", "train", str(recipe)]
            with open(self.log, "ab") as log:
                self.members.append(subprocess.Popen(command, env=environment(devices), stdout=log, stderr=log))

    @property
    def alive(self) -> bool:
        return all(member.poll() is None for member in self.members)

    def wait(self, seconds: float = 900) -> list[int]:
        """Exit codes. Raises Broken when some process does not end."""
        try:
            return [member.wait(seconds) for member in self.members]
        except subprocess.TimeoutExpired:
            raise Broken(f"still there after {seconds} s:\n{self.said()[-3000:]}") from None
        finally:
            self.kill()

    def finish(self) -> None:
        """Waits for the end of the run. Raises Broken when it fails."""
        codes = self.wait()
        hold(not any(codes), f"the run ended with {codes}:\n{self.said()[-3000:]}")

    def kill(self) -> None:
        for member in self.members:
            member.kill()
        for member in self.members:
            member.wait()

    def said(self) -> str:
        """What these processes have printed."""
        return self.log.read_bytes()[self._began :].decode(errors="replace")

    def began_at(self) -> int:
        """The step that this run went on from."""
        found = re.search(r"resuming from step (\d+)", self.said())
        return int(found[1]) if found else 0

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def environment(devices: int) -> dict[str, str]:
    """Of a process that finds this package, has so many virtual CPU devices, and compiles nothing that another has
    compiled before it."""
    return os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- what a run leaves


def logged(out: Path, name: str = "loss") -> dict[int, Any]:
    """A number of every step in the log; a part of a line that a killed run left counts for nothing."""
    return {line["step"]: line[name] for line in _lines(out / "metrics.jsonl") if name in line}


def _lines(path: Path) -> Iterator[dict]:
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def outcome(out: Path) -> dict[str, str]:
    """sha256 of the adapter file, and of what the last checkpoint holds: weights, optimiser's moments, all else."""
    checkpoints = Checkpoints(out / CHECKPOINTS, read_only=True)
    found = checkpoints.leaves()
    checkpoints.close()
    hold(found is not None, f"{out} holds no checkpoint")
    assert found is not None
    sums = {name: hashlib.sha256() for name in ("weights", "optimiser", "all else")}
    kinds = {"params": "weights", "opt_state": "optimiser"}
    for name, leaf in sorted(found[1].items()):
        sums[kinds.get(name.partition("/")[0], "all else")].update(name.encode() + np.asarray(leaf).tobytes())
    return {name: total.hexdigest() for name, total in sums.items()} | {"file": sha256(out / ADAPTER)}


def quiet() -> contextlib.AbstractContextManager:
    """Progress, which is for terminals, is not shown inside."""
    return contextlib.redirect_stderr(io.StringIO())


def run_here(config: Train) -> int:
    """The run in this process. Raises InputError as it does."""
    with quiet():
        return train(config)


def refusal(job: Callable[[], Any]) -> str:
    """The one clear line that ends the job. Raises Broken when nothing ends it."""
    try:
        job()
    except InputError as error:
        return str(error)
    raise Broken("it was not refused")


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below the folder, but for locks, which say who was there last."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): sha256(path) for path in files}
