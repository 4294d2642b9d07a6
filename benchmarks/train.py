"""The training step of this project and the authors' in PyTorch, side by side in one run on this machine (Linux).

    python -m ipadapter_jax.testing.random_weights --size full --out weights/full
    python -m benchmarks.train --weights weights/full --batch-size 1 --steps 1            CPU: float32
    python -m benchmarks.train --weights weights/full --batch-size 32 --dtype bfloat16    NVIDIA GPU

Ours is the step of `ipadapter-jax train`. Theirs is what tutorial_train.py does in every step, with diffusers' networks
and IP-Adapter attention: a UNet of float32 weights under autocast, encoders in the compute dtype, AdamW, and the loss
fetched immediately. --compile adds a third side: PyTorch with what makes it faster. A step starts with a batch in the
host's memory; benchmarks/input.py measures reading and decoding. "Precomputed" starts from latents and image features.

Each side is a process of its own. They take turns on the same device, one idle while the other is timed, so both must
fit into its memory. MFU counts convolutions and matrix products of our step once (runtime/flops.py), for every side,
relative to --peak-tflops or to a product of large matrices that is measured here. Peak memory is the device's; on a CPU
it is the largest resident set.

Before anything is timed, both must find the same loss and gradient for the same weights, batch and random draws. If
they do not, or run on different devices, no numbers are printed and the exit code is 1; a tuned side that fails is left
out. Rounding makes this comparison coarse in half precision, so run it once in float32. Needs the extra `torch`.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.compare_with_diffusers import require_peers
from benchmarks.sample import Worker as SampleWorker
from benchmarks.sample import environment
from benchmarks.train_worker import Settings

RUN_SAMPLES = 64_000_000  # the paper's run: 1M steps of 64
# Relative, of loss and norm of the gradient, and 1 - cosine of the gradients: some times what rounding makes of the
# tiny model (bfloat16: PyTorch's gradient lies 8e-3 from its own in float32, ours 16e-3, and 4e-2 from each other).
TOLERANCES = {"float32": (1e-4, 1e-3, 1e-6), "bfloat16": (1e-2, 0.1, 0.1), "float16": (1e-3, 1e-2, 1e-3)}


class Worker(SampleWorker):
    """A process of one side, seen from here."""

    def __init__(self, side: str, settings: Settings, variables: dict[str, str]):
        self.side, given = side, json.dumps(dataclasses.asdict(settings), default=str)
        command = [sys.executable, "-m", "benchmarks.train_worker", side, given, repr(time.monotonic())]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=variables, text=True, **pipes)
        self.start_seconds: float = self._answer()


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one side with one kind of inputs."""

    device: str
    start_seconds: float  # imports and weights
    first_step_seconds: float  # and compilation
    wall: list[float]  # seconds of every turn
    processor: list[float]
    peak_bytes: int
    agreement: dict[str, float]  # with ours: loss, norm, gradient


@dataclasses.dataclass(frozen=True)
class Results:
    """Of all sides with one kind of inputs."""

    sides: dict[str, Result]
    flops: int  # of a step
    product: float  # FLOP/s of large matrices


def measure(settings: Settings, folder: Path) -> Results:
    """Starts the sides, compares them, times them in turns. Ends the process where ours and the authors' disagree."""
    sides = ("ours", "authors", "tuned") if settings.compile else ("ours", "authors")
    workers = {side: Worker(side, settings, environment(folder / side, settings.cpu)) for side in sides}
    about = {side: worker.ask("about") for side, worker in workers.items()}
    devices = {side: found["device"] for side, found in about.items()}
    if len({name == "CPU" for name in devices.values()}) > 1:
        sys.exit(f"no numbers: the sides run on different devices, {devices}")
    draws = folder / "draws.npz"
    workers["ours"].ask(f"draws {draws}")
    first = {side: worker.ask(f"first {draws} {folder / side}.npz")["wall"] for side, worker in workers.items()}
    found = {side: dict(np.load(f"{folder / side}.npz")) for side in sides}
    agreement = {side: compare(found["ours"], found[side]) for side in sides}
    for side in sides:
        if trouble := disagreement(side, settings.dtype, agreement[side]):
            if side != "tuned":
                sys.exit(f"no numbers: {trouble}")
            print(f"left out: {trouble}", file=sys.stderr)  # the compiler's fault, or that of its user: not ours
            workers.pop(side).close()
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    for turn in range(settings.rounds + 1):
        for side, worker in workers.items():
            seconds = worker.ask("steps")
            if turn:  # the first warms up
                turns[side].append(seconds)
    peaks = {side: worker.ask("peak") for side, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    results = {
        side: Result(
            device=devices[side],
            start_seconds=workers[side].start_seconds,
            first_step_seconds=first[side],
            wall=[turn["wall"] for turn in turns[side]],
            processor=[turn["processor"] for turn in turns[side]],
            peak_bytes=peaks[side],
            agreement=agreement[side],
        )
        for side in workers
    }
    return Results(results, about["ours"]["flops"], about["ours"]["product"])


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """How far loss, norm of the gradient, and gradient are apart."""
    a, b = ours["gradient"].astype(np.float64), theirs["gradient"].astype(np.float64)
    found = {name: abs(float(theirs[name] / ours[name]) - 1) for name in ("loss", "norm")}
    return found | {"gradient": 1 - float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))}


def disagreement(side: str, dtype: str, found: dict[str, float]) -> str | None:
    limits = dict(zip(found, TOLERANCES[dtype], strict=True))
    if all(found[name] < limits[name] for name in found):  # not where one is NaN
        return None
    return f"ours and {side} disagree, {_scientific(found)}; at most {_scientific(limits)}"


def _scientific(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in values.items())


def rows(settings: Settings, results: dict[str, Results], peak: float) -> Iterator[tuple[str, ...]]:
    """The table's lines: what, and its value for ours, the authors' and where it is there the tuned side."""
    samples = settings.batch_size * settings.steps
    columns = max((result.sides for result in results.values()), key=len)
    yield "", *columns
    yield "---", *("---:" for _ in columns)
    for inputs, result in results.items():

        def row(title: str, show: str, value: Callable[[Result], float], sides=result.sides) -> tuple[str, ...]:
            return title, *(f"{value(sides[name]):{show}}" if name in sides else "" for name in columns)

        def rate(side: Result) -> float:
            return samples / statistics.median(side.wall)

        used, ours = result.flops / settings.batch_size, rate(result.sides["ours"])
        yield f"**{inputs}**", *("" for _ in columns)
        yield row("samples/s, median", ".4g", rate)
        yield row("samples/s, slowest turn", ".4g", lambda side: samples / max(side.wall))
        yield row("samples/s, fastest turn", ".4g", lambda side: samples / min(side.wall))
        if result.sides["ours"].device == "CPU":
            yield row("processor seconds a step, least", ".3g", lambda side: min(side.processor) / settings.steps)
        yield row("ours is faster by", ".2f", lambda side, ours=ours: ours / rate(side))
        yield row(f"MFU, {used / 1e9:.4g} GFLOP a sample", ".1%", lambda side, used=used: used * rate(side) / peak)
        yield row(f"days for {RUN_SAMPLES // 10**6}M samples", ".3g", lambda side: RUN_SAMPLES / rate(side) / 86400)
        yield row("peak memory, GiB", ".2f", lambda side: side.peak_bytes / 2**30)
        yield row("imports and weights, s", ".1f", lambda side: side.start_seconds)
        yield row("first step, s", ".1f", lambda side: side.first_step_seconds)


def report(settings: Settings, results: dict[str, Results], load: float) -> tuple[str, dict[str, Any]]:
    """The table, and all numbers."""
    first = next(iter(results.values()))
    peak = settings.peak_tflops * 1e12 if settings.peak_tflops else max(found.product for found in results.values())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "torch", "diffusers")}
    versions |= {"python": platform.python_version()}
    device = first.sides["ours"].device
    threads = settings.threads or len(os.sched_getaffinity(0))
    given = {k: str(v) for k, v in dataclasses.asdict(settings).items() if v is not None}
    agreements = [
        f"- {inputs}, {side} against ours, relative: {_scientific(found.agreement)} (1 - cosine)"
        for inputs, result in results.items()
        for side, found in result.sides.items()
        if side != "ours"
    ]
    lines = [
        *(f"| {' | '.join(row)} |" for row in rows(settings, results, peak)),
        "",
        *_across(results),
        f"- {device}, {threads} threads, load {load:.1f} before; MFU of {peak / 1e12:.4g} TFLOP/s",
        *agreements,
        "- " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "- " + ", ".join(f"{name}={value}" for name, value in given.items()),
    ]
    numbers = {
        "device": device,
        "threads": threads,
        "load": load,
        "versions": versions,
        "settings": given,
        "peak_flops": peak,
        "results": {inputs: dataclasses.asdict(result) for inputs, result in results.items()},
    }
    return "\n".join(lines) + "\n", numbers


def _across(results: dict[str, Results]) -> Iterator[str]:
    """What a person gains who moves from the authors' script to precomputed inputs here."""
    if len(results) == 2:
        ours, theirs = results["precomputed"].sides["ours"], results["live"].sides["authors"]
        ratio = statistics.median(theirs.wall) / statistics.median(ours.wall)
        yield f"- ours precomputed / authors live: {ratio:.2f}"


def main(settings: Settings) -> int:
    require_peers()
    load, results = os.getloadavg()[0], {}
    kinds = ("precomputed", "live") if settings.inputs == "both" else (settings.inputs,)
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            results[kind] = measure(dataclasses.replace(settings, inputs=kind), Path(folder))
    text, numbers = report(settings, results, load)
    print(text, end="")
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
