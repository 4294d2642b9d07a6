"""The time of the sampler and of the training step by layer, next to the work of each layer.

    python -m benchmarks.profile_layers sampler --dtype bfloat16 --batch 16      NVIDIA GPU
    python -m benchmarks.profile_layers step --dtype bfloat16 --batch 32
    python -m benchmarks.profile_layers sampler --size tiny --latent 8           anywhere, in seconds

Stable Diffusion 1.5 with the base adapter at 512 px, with random weights of the right shapes. JAX's profiler gives the
time of every kernel, the compiled program its layer and the bytes that it reads and writes, and runtime/flops.py the
work of the layer. The floor is the layer's FLOP at the rate of a large matrix product, which is measured here first.
Layers without products have no floor; their time is the cost of memory traffic. On a CPU kernels may run in parallel,
and then their times overlap.
"""

import collections
import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType

from benchmarks.abstract_programs import abstract_sampler, abstract_step
from benchmarks.hlo_stats import main_computation
from ipadapter_jax.runtime.flops import products
from ipadapter_jax.runtime.mesh import TRAIN_AXES
from ipadapter_jax.testing.sizes import SIZES

LAYERS = {  # the first whose pattern is found in where an instruction stands
    "self-attention": r"/attn1/(?!to_)|/attn1$",
    "self-attention, its projections": r"/attn1",
    "cross-attention": r"/attn2/(?!to_)|/attn2$",
    "cross-attention, its projections": r"/attn2",
    "feed-forward": r"/ff/",
    "projections around the transformers": r"/proj_(in|out)",
    "norms": r"norm",
    "convolutions": r"conv|downsamplers|upsamplers|resnets",
    "text encoder": r"CLIPText",
    "VAE": r"VAE",
    "image encoder": r"CLIPVision",
    "adapter": r"IPAdapter|ImageProj",
}
REST = "everything else"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Prints a table of layers: what, share of the work, floor, measured, share of the time."""

    what: tyro.conf.Positional[Literal["sampler", "step"]]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch: int = 1
    steps: Annotated[int, tyro.conf.arg(help="of the denoising loop")] = 2
    size: Literal["full", "tiny", "micro"] = "full"
    latent: Annotated[int, tyro.conf.arg(help="side of the latents: pixels / 8")] = 64


@dataclasses.dataclass
class Cost:
    """Of one layer in one step."""

    flops: int = 0
    bytes: int = 0  # read and written by its kernels; what loops inside a step do counts once
    seconds: float = 0.0


def layer(where: str) -> str:
    """The layer that an instruction belongs to, and whether it is of the backward pass."""
    name = next((name for name, pattern in LAYERS.items() if re.search(pattern, where)), REST)
    return f"{name}, backward" if "transpose(" in where else name


def filled(tree: Any) -> Any:
    """Arrays in place of shapes: small random numbers, and zeros where integers are wanted."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        values = 0.02 * rng.standard_normal(leaf.shape, np.float32) if floating else np.zeros(leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, tree, is_leaf=lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


def layers_of(compiled_text: str) -> dict[str, str]:
    """Instruction -> layer."""
    named = re.findall(r"%?([\w.\-]+) = [^\n]*?metadata=\{op_name=\"([^\"]*)\"", compiled_text)
    return {name: layer(where) for name, where in named}


def durations(folder: str) -> collections.Counter[str]:
    """Seconds of every instruction, from the profile in a folder; loops and calls, which only contain others, not."""
    total: collections.Counter[str] = collections.Counter()
    for file in Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    name = dict(event.stats).get("hlo_op")
                    if name is not None and not str(name).startswith(("while", "call", "conditional")):
                        total[str(name)] += event.duration_ns / 1e9
    return total


def product_rate(dtype: str) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    multiply, best = jax.jit(jnp.matmul), float("inf")
    multiply(x, x).block_until_ready()
    for _ in range(5):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def program(settings: Profile) -> tuple[Any, tuple[Any, ...], int]:
    """The traced program, its arguments without those that are fixed, and how many steps it makes."""
    axes = ("data",) if settings.what == "sampler" else TRAIN_AXES
    types, device = (AxisType.Auto,) * len(axes), jax.devices()[:1]
    mesh = jax.make_mesh((1,) * len(axes), axes, axis_types=types, devices=device)
    given: Any = {"sizes": SIZES[settings.size], "latent": settings.latent, "dtype": settings.dtype}
    if settings.what == "sampler":
        sampler = abstract_sampler(mesh, batch=settings.batch, steps=settings.steps, **given)
        return sampler.trace(), filled(sampler.arguments[3:]), settings.steps
    step = abstract_step(mesh, batch=settings.batch, **given)
    return step.trace(), filled(step.arguments), 1


def main(settings: Profile) -> None:
    traced, arguments, steps = program(settings)
    compiled = traced.lower().compile()
    results = compiled(*arguments)  # the first run is slower
    if settings.what == "step":
        arguments = (results[0], *arguments[1:])  # the state was donated
    jax.block_until_ready(results)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(*arguments))
        wall = (time.perf_counter() - start) / steps
        seconds = durations(folder)
    text, rate = str(compiled.as_text()), product_rate(settings.dtype)
    of_layer, rows = layers_of(text), collections.defaultdict(Cost)
    for name, value in seconds.items():
        rows[of_layer.get(name, REST)].seconds += value / steps
    for kernel in main_computation(text):
        rows[of_layer.get(kernel.name, REST)].bytes += kernel.bytes_read + kernel.bytes_written
    for found in products(traced.jaxpr):
        rows[layer(found.where)].flops += found.flops // steps
    total = Cost(*(sum(values) for values in zip(*map(dataclasses.astuple, rows.values()), strict=True)))
    print("| layer | GFLOP | of the work | MiB | floor, ms | measured, ms | of the time | floor / measured |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, cost in sorted(rows.items(), key=lambda item: -item[1].seconds):
        if cost.seconds:
            print(f"| {name} | {cells(cost, total, rate)} |")
    print(f"| all | {cells(total, total, rate)} |")
    print(f"\n- {jax.devices()[0].device_kind}, {settings.dtype}; products at {rate / 1e12:.3g} TFLOP/s")
    print(f"- one step of a batch of {settings.batch}: {wall * 1e3:.1f} ms with the profiler on")


def cells(cost: Cost, total: Cost, rate: float) -> str:
    """A row of the table without its name."""
    floor = cost.flops / rate
    work = [f"{cost.flops / 1e9:,.1f}", f"{cost.flops / total.flops:.1%}", f"{cost.bytes / 2**20:,.0f}"]
    times = [f"{floor * 1e3:.1f}", f"{cost.seconds * 1e3:.1f}", f"{cost.seconds / total.seconds:.1%}"]
    return " | ".join([*work, *times, f"{floor / cost.seconds:.0%}"])


if __name__ == "__main__":
    main(tyro.cli(Profile))
