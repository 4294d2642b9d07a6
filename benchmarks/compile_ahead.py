"""Compiles the sampler and the training step for GPUs and TPUs that this machine does not have, and reports the result.

    pip install 'jax[cuda12]'            the compiler for GPUs; no driver and no GPU is needed. For TPUs: 'jax[tpu]'
    python -m benchmarks.compile_ahead sampler
    python -m benchmarks.compile_ahead step --batch 8 --devices 8
    python -m benchmarks.compile_ahead step --device v5e --batch 16 --devices 4       2 CPU cores: an hour

Stable Diffusion 1.5 at 512 px in bfloat16 with the base adapter, from shapes only, without weights. The table has the
number of kernels of each kind in one step. For GPUs it also has the bytes that they read and write, and the time of
that at the device's memory bandwidth: a lower bound for all kernels except products. Kernels are selected without
autotuning on a device, so their number is a little higher than on a real one. For TPUs it has the compiler's time
estimate, which leaves out Pallas kernels. --flags are XLA's flags for this compilation.
"""

import os
import sys
from typing import Annotated, Any, Literal

os.environ["JAX_PLATFORMS"] = "cpu"  # the devices compiled for are descriptions

import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.abstract_programs import abstract_sampler, abstract_step, as_on
from benchmarks.hlo_stats import Group, collective_bytes, groups
from ipadapter_jax.runtime.mesh import TRAIN_AXES

_DESCRIPTION = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: 0 }} threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {units} shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {block} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
}}
platform_name: "CUDA" device_description_str: "{name}" runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: {cudnn} }}
"""
GPUS = {
    "A100": _DESCRIPTION.format(
        name="A100", major=8, cores=108, units=64, shared=167936, block=166912, bandwidth=1555000000000,
        cache=41943040, clock=1.41, memory=42505076736, cudnn=8,
    ),
    "H200": _DESCRIPTION.format(
        name="NVIDIA H200", major=9, cores=132, units=128, shared=233472, block=232448, bandwidth=4800000000000,
        cache=52428800, clock=1.98, memory=150754820096, cudnn=10,
    ),
}  # fmt: skip
BANDWIDTH = {"A100": 1.4e12, "H200": 4.3e12}  # bytes a second, of a copy
CLOCK = {"v5e": 1.5e9}  # 197 TFLOP/s of four units of 128 x 128


def devices(name: str, count: int) -> list[Any]:
    """Descriptions to compile for. Raises an exception of JAX where its plugin for them is not installed."""
    if name in GPUS:
        config = {"target_config": GPUS[name]}
        return list(topologies.get_topology_desc(name, "cuda", topology=f"1x{count}x1", **config).devices)
    # A machine without TPUs would be asked for theirs, and one process at a time may have them.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    size = "2x2" if count <= 4 else f"{-(-count // 4)}x4"
    return list(topologies.get_topology_desc(f"{name}:{size}", "tpu").devices)[:count]


def compiled(what: str, batch: int, found: list[Any], flags: dict[str, Any], **sizes: Any) -> tuple[str, int]:
    """The compiled program's text, and the bytes that it needs beside its arguments on each device."""
    axes, shape = (("data",), (len(found),)) if what == "sampler" else (TRAIN_AXES, (len(found), 1))
    mesh = Mesh(np.array(found).reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes))
    on_gpu = found[0].platform != "tpu"
    with as_on("gpu" if on_gpu else "tpu"):
        make = abstract_sampler if what == "sampler" else abstract_step
        traced = make(mesh, batch=batch * len(found), **sizes).trace()
        lowered = traced.lower(lowering_platforms=("cuda" if on_gpu else "tpu",))
        options: dict[str, Any] = ({"xla_gpu_autotune_level": 0} if on_gpu else {}) | flags
        program: Any = lowered.compile(options)
    return str(program.as_text()), int(program.memory_analysis().temp_size_in_bytes)


def table(text: str, device: str) -> str:
    """Kernels by kind, in Markdown; of a TPU's those that take time, as far as its compiler says."""
    kernels, mib, unsaid = groups(text), 2**20, ("Pallas's kernel", "collective")
    if device in CLOCK:
        kernels = {name: group for name, group in kernels.items() if group.cycles or name in unsaid}
    kernels["all"] = Group(*(sum(column) for column in zip(*kernels.values(), strict=True)))
    if device in GPUS:
        head = "| kernels | number | MiB | ms at the bandwidth |\n|---|---:|---:|---:|\n"
        times = {name: group.bytes / BANDWIDTH[device] for name, group in kernels.items()}
        numbers = {name: f"{group.kernels} | {group.bytes / mib:,.0f}" for name, group in kernels.items()}
    else:
        head = "| kernels | number | ms, by the compiler |\n|---|---:|---:|\n"
        times = {name: group.cycles / CLOCK[device] for name, group in kernels.items()}
        numbers = {name: f"{group.kernels}" for name, group in kernels.items()}
    return head + "".join(f"| {name} | {numbers[name]} | {times[name] * 1e3:.2f} |\n" for name in kernels)


def main(
    what: tyro.conf.Positional[Literal["sampler", "step"]],
    device: Literal["H200", "A100", "v5e"] = "H200",
    batch: Annotated[int, tyro.conf.arg(help="images on each device")] = 1,
    devices_: Annotated[int, tyro.conf.arg(name="devices")] = 1,
    flags: Annotated[tuple[str, ...], tyro.conf.arg(help="such as xla_gpu_dot_merger_threshold_mb=0")] = (),
) -> None:
    """Prints one table for one guided denoising step, or one training step from precomputed features."""
    try:
        found = devices(device, devices_)
    except Exception as error:
        extra = "cuda12" if device in GPUS else "tpu"
        sys.exit(f"no compiler for {device}: {str(error).splitlines()[0]}; pip install 'jax[{extra}]'")
    text, memory = compiled(what, batch, found, dict(flag.split("=", 1) for flag in flags))
    print(table(text, device))
    print(f"- {what}, {batch} a device, {devices_} x {device}; {memory / 2**20:,.0f} MiB beside the arguments")
    for name, size in collective_bytes(text).items():
        print(f"- {name}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    tyro.cli(main)
