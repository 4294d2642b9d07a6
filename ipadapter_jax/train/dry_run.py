"""What a run would be, said without starting it: `ipadapter-jax train ... --dry-run`."""

import os
import shlex
from collections.abc import Mapping, Sequence

import jax

from ipadapter_jax.errors import InputError
from ipadapter_jax.train.config import Train
from ipadapter_jax.train.multihost import find_cluster
from ipadapter_jax.train.sharding import check_batch

_OWN_OPTIONS = ("--mesh.coordinator", "--mesh.processes", "--mesh.process")
_FLAGS = ("--dry-run", "--dry_run")
_SHOWN = ("JAX_", "XLA_", "LIBTPU_", "NCCL_", "CUDA_VISIBLE_DEVICES")  # variables that change what a process does


def dry_run_report(config: Train, command: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """What every process of the run would be: its command line with the variables that matter, and its part of mesh
    and batch. `command` is the whole command line of this process. Other hosts are taken to have as many devices.

    Raises InputError for addresses, and for a mesh or a batch, that cannot be.
    """
    cluster = find_cluster(config.mesh, environment)
    words = _without_own_options(command)
    if cluster is not None and cluster.kind != "addresses":
        who = "every worker of the TPU pod" if cluster.kind == "tpu" else f"each of the {cluster.processes} SLURM tasks"
        return f"{who} runs, and finds its number itself:\n  {_line(words, environment)}"
    processes, devices = config.mesh.processes or 1, jax.local_devices()
    total, batch, fsdp = processes * len(devices), config.data.batch_size, config.mesh.fsdp
    if total % fsdp:
        raise InputError(f"--mesh.fsdp {fsdp} does not divide the {total} devices; choose a divisor")
    check_batch(total, batch, config.optim.accumulate)
    lines = [
        f"processes: {processes}, each with {len(devices)} x {devices[0].device_kind}",
        f"mesh: {total // fsdp} (data) x {fsdp} (fsdp)",
        f"batch: {batch} samples, {batch // total} on every device",
    ]
    samples = batch // processes
    for process in range(processes):
        own = []
        if cluster is not None:
            values = (config.mesh.coordinator, processes, process)
            own = [str(word) for pair in zip(_OWN_OPTIONS, values, strict=True) for word in pair]
        lines.append(
            f"process {process}, samples {process * samples} to {(process + 1) * samples - 1} of every batch, runs:"
        )
        lines.append(f"  {_line([*words, *own], environment)}")
    return "\n".join(lines)


def _without_own_options(command: Sequence[str]) -> list[str]:
    """The command line less --dry-run and what differs from process to process."""
    words, rest = [], iter(command)
    for word in rest:
        if word in _OWN_OPTIONS:
            next(rest, None)
        elif word not in _FLAGS and word.partition("=")[0] not in _OWN_OPTIONS:
            words.append(word)
    return words


def _line(words: Sequence[str], environment: Mapping[str, str]) -> str:
    shown = [f"{name}={shlex.quote(value)}" for name, value in sorted(environment.items()) if name.startswith(_SHOWN)]
    return " ".join([*shown, shlex.join(words)])
