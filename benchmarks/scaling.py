"""Throughput of training and sampling over virtual devices and processes of one CPU, and their communication.

    python -m benchmarks.scaling                     some minutes: 1, 2, 4, 8 devices, and 2 processes of 4

The global batch and the machine stay the same, so the loss compared with one device is the cost of sharding: copies,
waiting, and work that is done once and not by every device. It does not predict the speed of real devices. Byte counts
are those of XLA's program for CPUs, which sums whole gradients; for GPUs see compile_ahead.py.
"""

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Annotated, Any, Literal

import tyro

LAYOUTS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 4))  # processes, devices of each


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Prints one table."""

    size: Literal["micro", "tiny"] = "tiny"
    latent: Annotated[int, tyro.conf.arg(help="side of the latents: pixels / 8")] = 16
    batch: Annotated[int, tyro.conf.arg(help="of all devices together; 8 divide it")] = 8
    rounds: int = 5
    steps: Annotated[int, tyro.conf.arg(help="of training, and of the denoising loop, in a round")] = 5


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def measure(settings: Scaling, processes: int, devices: int) -> dict[str, Any]:
    """What process 0 of a layout answers: samples a second by kind of work, and bytes of collectives of a step."""
    port, given = free_port(), json.dumps(dataclasses.asdict(settings))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "benchmarks.scaling", "worker", given, str(port), str(processes)]
    started = [
        subprocess.Popen([*command, str(number)], env=environment, stdout=subprocess.PIPE, text=True)
        for number in range(processes)
    ]
    answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{processes} x {devices}: a process failed; its last words stand above")
    return json.loads(answers[0].splitlines()[-1])


def work(settings: Scaling, port: int, processes: int, number: int) -> None:
    """One process: compiles both programs, times them, prints its answer."""
    import jax

    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, number)
    from jax.sharding import AxisType

    from benchmarks.abstract_programs import abstract_sampler, abstract_step
    from benchmarks.hlo_stats import collective_bytes
    from benchmarks.profile_layers import filled
    from ipadapter_jax.runtime.mesh import TRAIN_AXES
    from ipadapter_jax.testing.sizes import SIZES

    sizes: Any = {"sizes": SIZES[settings.size], "latent": settings.latent, "dtype": "float32", "batch": settings.batch}
    mesh = jax.make_mesh((jax.device_count(), 1), TRAIN_AXES, axis_types=(AxisType.Auto,) * 2)
    step = abstract_step(mesh, **sizes)
    program, (state, *rest) = step.trace().lower().compile(), filled(step.arguments)
    answer: dict[str, Any] = {"bytes": collective_bytes(str(program.as_text())), "training": []}
    answer["trainable"] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.arguments[0].params))
    for _ in range(settings.rounds + 1):
        start = time.perf_counter()
        for _ in range(settings.steps):
            state, _ = program(state, *rest)
        jax.block_until_ready(state)
        answer["training"].append(settings.batch * settings.steps / (time.perf_counter() - start))
    if processes == 1:  # sampling is a process's own
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        sampler = abstract_sampler(mesh, steps=settings.steps, **sizes)
        program, arguments = sampler.trace().lower().compile(), filled(sampler.arguments[3:])
        answer["sampling bytes"] = collective_bytes(str(program.as_text()))
        answer["sampling"] = []
        for _ in range(settings.rounds + 1):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            answer["sampling"].append(settings.batch * settings.steps / (time.perf_counter() - start))
    print(json.dumps(answer))


def main(settings: Scaling) -> None:
    found = {layout: measure(settings, *layout) for layout in LAYOUTS}

    def rate(layout: tuple[int, int], what: str) -> float | None:
        rounds = found[layout].get(what)
        return statistics.median(rounds[1:]) if rounds else None  # the first warms up

    print("| processes x devices | training, samples/s | of one | sampling, image steps/s | of one | MB in a step |")
    print("|---|---:|---:|---:|---:|---:|")
    for layout, answer in found.items():
        cells = []
        for what in ("training", "sampling"):
            value, alone = rate(layout, what), rate(LAYOUTS[0], what)
            cells += [f"{value:.1f}", f"{value / alone:.2f}"] if value and alone else ["", ""]
        told = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in answer["bytes"].items()) or "none"
        print(f"| {layout[0]} x {layout[1]} | {' | '.join(cells)} | {told} |")
    one = next(iter(found.values()))
    side, cores = settings.latent, len(os.sched_getaffinity(0))
    print(f"\n- {cores} cores; {settings.size} networks, latents {side}x{side}, float32")
    print(f"- a batch of {settings.batch}, {one['trainable'] / 1e6:.2f} MB of gradients, medians of {settings.rounds}")
    told = {name for answer in found.values() for name in answer.get("sampling bytes", {})}
    print(f"- collectives in sampling: {', '.join(sorted(told)) or 'none'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        given = Scaling(**json.loads(sys.argv[2]))
        work(given, *(int(word) for word in sys.argv[3:]))
    else:
        main(tyro.cli(Scaling))
