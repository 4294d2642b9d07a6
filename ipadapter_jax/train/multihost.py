"""Several processes, one per host or per GPU, as one run: how they meet, agree, and end."""

import atexit
import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypedDict, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ipadapter_jax.errors import InputError
from ipadapter_jax.train.config import Mesh

T = TypeVar("T")

_JOIN_SECONDS = 300  # for slow hosts of a cluster to come up
_ALL_DEVICES: list[int] = []  # as local_device_ids of jax.distributed.initialize


class InitializeArguments(TypedDict, total=False):
    """Of jax.distributed.initialize: what tells it where the processes are."""

    coordinator_address: str
    num_processes: int | None
    process_id: int | None
    local_device_ids: list[int]
    cluster_detection_method: str


class Cluster(NamedTuple):
    """How the processes of a run find one another."""

    kind: Literal["addresses", "slurm", "tpu"]
    processes: int | None  # None: only the machines know
    arguments: InitializeArguments


def find_cluster(mesh: Mesh, environment: Mapping[str, str]) -> Cluster | None:
    """Plain addresses where given, else SLURM, else a TPU pod, else None: this process is alone.

    Raises InputError for addresses that are not complete or not possible.
    """
    _check_addresses(mesh)
    if mesh.coordinator is not None:
        arguments: InitializeArguments = {
            "coordinator_address": mesh.coordinator,
            "num_processes": mesh.processes,
            "process_id": mesh.process,
            "cluster_detection_method": "deactivate",
        }
        return Cluster("addresses", mesh.processes, arguments)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))  # of srun; an sbatch script alone has one
    if tasks > 1:
        arguments = InitializeArguments(cluster_detection_method="slurm")
        # jax gives every task the one GPU of its local number, also where there is one task for all GPUs of a node,
        # or where SLURM lets each task see its own GPU only.
        if tasks == int(environment["SLURM_STEP_NUM_NODES"]) or environment.get("CUDA_VISIBLE_DEVICES", "").isdecimal():
            arguments["local_device_ids"] = _ALL_DEVICES
        return Cluster("slurm", tasks, arguments)
    platforms = environment.get("JAX_PLATFORMS", "")
    if environment.get("TPU_ML_PLATFORM") == "JAX" and (not platforms or "tpu" in platforms):
        return Cluster("tpu", None, {})  # that variable is jax's own sign that it saw TPU chips
    return None


def initialize(mesh: Mesh, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of the run, or does nothing where there is one. To be called before any device is used.

    End a run of several processes with `barrier`: who leaves waits `heartbeat_seconds` for the others, not longer.
    When a process dies, jax ends the others from within C++ with SIGABRT (exit code 134), after heartbeat_seconds, or
    at once if it was process 0. The last line that they print is ours.

    Raises InputError for wrong addresses and for a port that is taken.
    """
    cluster = find_cluster(mesh, environment)
    if cluster is None:
        return
    if cluster.kind == "addresses":
        _check_own_place(mesh)
    words, seconds = _LastWords(), mesh.heartbeat_seconds
    words.say(
        f"the processes of this run did not find one another within {_JOIN_SECONDS} s; start all of them, "
        f"with the same coordinator, and let them reach its port"
    )
    try:
        jax.distributed.initialize(
            **cluster.arguments,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=seconds,
        )
    except (ValueError, OSError):
        words.end()
        if cluster.kind == "tpu":
            return  # one machine with TPU chips, and nobody to ask about others
        raise
    words.say(
        f"process {os.getpid()} on {socket.gethostname()} is gone: it was killed, or another one of the run died or "
        f"was silent for {seconds} s; rerun the same command on every host to resume from the last checkpoint"
    )
    atexit.register(_leave, words)


def _leave(words: "_LastWords") -> None:
    jax.distributed.shutdown()  # waits for the others; aborts when they do not come
    words.end()


def _check_addresses(mesh: Mesh) -> None:
    coordinator, processes, process = mesh.coordinator, mesh.processes, mesh.process
    if coordinator is None:
        for name, value in (("processes", processes), ("process", process)):
            if value is not None:
                raise InputError(f"--mesh.{name} {value} needs --mesh.coordinator, host:port of process 0")
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--mesh.coordinator {coordinator} must be host:port, such as 10.0.0.1:8476")
    if processes is None or processes < 1:
        raise InputError("--mesh.coordinator needs --mesh.processes: how many processes there are, at least 1")
    if process is not None and not 0 <= process < processes:
        raise InputError(
            f"--mesh.process {process} must lie from 0 to {processes - 1}: there are {processes} processes"
        )


def _check_own_place(mesh: Mesh) -> None:
    if mesh.process is None:
        raise InputError(f"--mesh.process is missing: give each of the {mesh.processes} processes its number, from 0")
    if mesh.process == 0:
        assert mesh.coordinator is not None
        try:  # jaxlib 0.10.2 and 0.11.2 end with SIGSEGV, or share the port with another run
            socket.create_server(("", int(mesh.coordinator.rpartition(":")[2]))).close()
        except OSError as error:
            raise InputError(f"--mesh.coordinator {mesh.coordinator}: {error.strerror}; choose a free port") from None


class _LastWords:
    """A line on standard error for when this process ends without a chance to print one.

    jax aborts inside C++ when another process is lost, and offers no hook that works (jaxlib 0.10.2 and 0.11.2: the
    callback for missed heartbeats ends in std::bad_cast). So a shell waits for the pipe to close, and prints the last
    line that came through it.
    """

    SCRIPT = """trap '' TERM INT HUP; while read -r line; do words=$line; done; [ -z "$words" ] || echo "$words" >&2"""

    def __init__(self) -> None:
        self._shell = subprocess.Popen(["sh", "-c", self.SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def say(self, line: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(f"ipadapter-jax: {line}\n".encode())
        self._shell.stdin.flush()

    def end(self) -> None:
        """Nothing to say after all."""
        self._shell.communicate(b"\n")


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    multihost_utils.sync_global_devices(name)


def run_on_all(job: Callable[[], T], failure: type[Exception] = InputError) -> T:
    """Runs `job` in every process and returns its own result. All processes call this together.

    Raises `failure` in all processes when the job raised it in at least one of them.
    """
    if jax.process_count() == 1:
        return job()
    results: list[T] = []
    problem = None
    try:
        results.append(job())
    except failure as error:
        problem = str(error)
    if problem := broadcast_error(problem):
        raise failure(problem)
    return results[0]


def run_on_first(job: Callable[[], T]) -> T | None:
    """Runs `job` in process 0 alone and returns its result there, None elsewhere. All processes call this together.

    Raises InputError in all processes when the job raised it.
    """
    return run_on_all(lambda: job() if jax.process_index() == 0 else None)


def broadcast_error(problem: str | None) -> str | None:
    """Takes what is wrong in this process, or None. Gives None when no process has a problem, else this process's own
    problem or a reference to the process that has one. All processes call this together."""
    if jax.process_count() == 1:
        return problem
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(problem is not None)))
    return problem or (f"see the message of process {failed[0]}" if len(failed) else None)
