"""Sampling with this project and with PyTorch diffusers, side by side in one run on this machine (Linux).

    python -m ipadapter_jax.testing.random_weights --size full --out weights/full
    python -m benchmarks.sample --weights weights/full --steps 2                      CPU: float32, eager PyTorch
    python -m benchmarks.sample --weights weights/full --dtype bfloat16 --compile     NVIDIA GPU

Each side is a process of its own. Both start twice, first with empty compilation caches (only the compilers are cold:
the weights have been read before). The second pair stays and takes turns, one idle while the other is timed; on a CPU
at full size both together need 20 GB. On a busy machine trust the minima of processor time with --threads 1: PyTorch's
threads wait for one another, so a process that takes one core away stops all of them.

- A step is the denoising loop from encoded prompts to latents, divided by its number of steps.
- An image is everything from prompt and image to 8-bit pixels, with compiled programs.
- TFLOP/s come from the analytic count of the UNet (count_flops.py), the same for both sides.
- Peak memory is the device's; on a CPU it is the largest resident set, which includes mapped pages of the weight files.

Before anything is timed, both sides must arrive at the same latents. If they do not, or run on different devices, no
numbers are printed and the exit code is 1. Needs the extra `torch`.
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

from benchmarks.compare_with_diffusers import photograph, require_peers
from benchmarks.sample_worker import STAGES, Settings

SIDES = ("ours", "torch")


class Worker:
    """A process of one side, seen from here."""

    def __init__(self, side: str, settings: Settings, environment: dict[str, str]):
        self.side, given = side, json.dumps(dataclasses.asdict(settings), default=str)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sample_worker", side, given, repr(time.monotonic())],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.stages: dict[str, float] = self._answer()

    def ask(self, request: str) -> Any:
        assert self.process.stdin is not None
        print(request, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.communicate()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.side}: the worker ended with {self.process.wait()}; its last words stand above")
        return json.loads(line)


def environment(folder: Path, cpu: bool) -> dict[str, str]:
    """One device, caches of compiled programs in `folder`, and otherwise what a user has."""
    ours = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_NUM_CPU_DEVICES")
    result = {name: value for name, value in os.environ.items() if name not in ours}
    caches = {"XDG_CACHE_HOME": "", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    result |= {name: str(folder / cache) for name, cache in caches.items()}
    result["CUDA_VISIBLE_DEVICES"] = "" if cpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    result["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other side needs memory of the same device
    result["TF_CPP_MIN_LOG_LEVEL"], result["TRANSFORMERS_VERBOSITY"] = "2", "error"
    return result | ({"JAX_PLATFORMS": "cpu"} if cpu else {})


@dataclasses.dataclass(frozen=True)
class Results:
    """Seconds per side: of the stages of both starts, and of every round by (what, clock); peak memory in bytes."""

    cold: dict[str, dict[str, float]]
    warm: dict[str, dict[str, float]]
    rounds: dict[str, dict[tuple[str, str], list[float]]]
    peak: dict[str, int]
    device: str
    parity: str


def measure(settings: Settings, folder: Path) -> Results:
    def start(side: str) -> Worker:
        return Worker(side, settings, environment(folder / side, settings.cpu))

    for file in settings.weights.rglob("*.safetensors"):  # else the side that comes first would wait for the disk
        with file.open("rb") as content:
            while content.read(1 << 24):
                pass
    cold = {}
    for side in SIDES:
        worker = start(side)
        cold[side] = worker.stages
        worker.close()
    workers = {side: start(side) for side in SIDES}
    devices = {side: worker.ask("device")["name"] for side, worker in workers.items()}
    if len({name == "CPU" for name in devices.values()}) > 1:
        sys.exit(f"no numbers: the sides run on different devices, {devices}")
    latents = {}
    for side, worker in workers.items():  # which also warms the loop
        worker.ask(f"latents {folder / side}.npy")
        latents[side] = np.load(f"{folder / side}.npy")
    parity = check_parity(settings.dtype, latents["ours"], latents["torch"])
    rounds: dict[str, dict[tuple[str, str], list[float]]] = {side: {} for side in SIDES}
    for what in ("loop", "image"):
        for _ in range(settings.rounds):
            for side, worker in workers.items():
                for clock, seconds in worker.ask(what).items():
                    rounds[side].setdefault((what, clock), []).append(seconds)
    peak = {side: worker.ask("device")["peak"] for side, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    warm = {side: worker.stages for side, worker in workers.items()}
    return Results(cold, warm, rounds, peak, devices["ours"], parity)


def check_parity(dtype: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    """How far the latents are apart; too far ends the process."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    if dtype == "float32":
        error = np.abs(ours - theirs).max() / np.sqrt(np.square(theirs).mean())
        good, text = error < 1e-3, f"relative error of the latents {error:.1e} (must be below 1e-3)"
    else:
        cosine = (ours * theirs).sum() / (np.linalg.norm(ours) * np.linalg.norm(theirs))
        good, text = cosine > 0.999, f"cosine of the latents {cosine:.6f} (must be above 0.999)"
    return text if good else sys.exit(f"no numbers: the sides disagree, {text}")


def rows(settings: Settings, results: Results, flops: int) -> Iterator[tuple[str, ...]]:
    """The table's lines: what, ours, PyTorch, PyTorch / ours."""

    def row(title: str, show: Callable[[float], str], value: Callable[[str], float]) -> tuple[str, ...]:
        ours, torch = map(value, SIDES)
        return title, show(ours), show(torch), f"{torch / ours:.2f}"

    def seconds(value: float) -> str:
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"

    def step(side: str, statistic: Callable, clock: str = "wall") -> float:
        return statistic(results.rounds[side]["loop", clock]) / settings.steps

    for title, start in (("cold", results.cold), ("warm caches", results.warm)):
        yield row(f"start to first image, {title}", seconds, lambda side, start=start: sum(start[side].values()))
        for stage, name in STAGES.items():
            yield row(f"- {name}", seconds, lambda side, start=start, stage=stage: start[side][stage])
    saved = [sum(results.warm[side].values()) / sum(results.cold[side].values()) for side in SIDES]
    yield "warm start / cold start", *(f"{share:.2f}" for share in saved), ""
    statistics_ = {"median": statistics.median, "minimum": min}
    for title, of in statistics_.items():
        yield row(f"step with guidance, {title}", seconds, lambda side, of=of: step(side, of))
    if results.device == "CPU":
        yield row("- processor time, minimum", seconds, lambda side: step(side, min, "processor"))
    rates = [flops / step(side, statistics.median) / 1e12 for side in SIDES]
    yield "- TFLOP/s, median", *(f"{rate:.3g}" for rate in rates), ""
    peak = settings.peak_tflops or (
        790 if "H200" in results.device else None
    )  # 790: measured, of its bfloat16 products
    if peak:
        yield f"- of {peak:g} TFLOP/s", *(f"{rate / peak:.1%}" for rate in rates), ""
    what = f"{settings.batch} images" if settings.batch > 1 else "image"
    for title, of in statistics_.items():
        name = f"{what} of {settings.steps} steps, {title}"
        yield row(name, seconds, lambda side, of=of: of(results.rounds[side]["image", "wall"]))
    yield row("peak memory", lambda value: f"{value / 2**30:.2f} GiB", lambda side: float(results.peak[side]))


def step_flops(settings: Settings) -> int:
    """Both branches of guidance for every image of the batch."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # counting takes no memory of a device
    from benchmarks.count_flops import read_config, unet_flops

    config = read_config(settings.weights)
    return 2 * settings.batch * unet_flops(config, settings.height // 8, settings.width // 8).total()


def report(settings: Settings, results: Results, load: float) -> str:
    flops = step_flops(settings)
    processors = [
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line
    ]
    processor = processors[0].partition(":")[2].strip() if processors else platform.machine()
    threads = settings.threads or len(os.sched_getaffinity(0))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "torch", "diffusers")}
    flags = {name: os.environ[name] for name in ("XLA_FLAGS", "OMP_NUM_THREADS") if name in os.environ}
    given = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("out", "threads") and v is not None}
    lines = [
        "| | ours | PyTorch | PyTorch / ours |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows(settings, results, flops)),
        "",
        f"- {results.device}; {processor}, {threads} threads, load {load:.1f} before",
        f"- Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in (versions | flags).items()),
        "- " + ", ".join(f"{name}={value!s}" for name, value in given.items()),
        f"- {flops / 1e9:.2f} GFLOP a step; {results.parity}",
    ]
    return "\n".join(lines) + "\n"


def main(settings: Settings) -> int:
    require_peers()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image.png")
        photograph(settings.image).save(image)
        results = measure(dataclasses.replace(settings, image=image), Path(folder))
    text = report(settings, results, load)
    print(text, end="")
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
