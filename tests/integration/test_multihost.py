"""Several processes as one run: how they find one another, stop at the same step, and how they end."""

import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipadapter_jax.errors import InputError
from ipadapter_jax.train.config import Data, Mesh, Train
from ipadapter_jax.train.dry_run import dry_run_report
from ipadapter_jax.train.multihost import find_cluster, initialize
from ipadapter_jax.train.preemption import CoordinatedShutdown

ROOT = Path(__file__).resolve().parents[2]
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4"}

# Counts steps until it is asked to stop; with DIE it kills itself at step 20. Ends with 75, as a run that was saved.
WORKER = """
import dataclasses, os, sys, tyro
from ipadapter_jax.train.config import Mesh
from ipadapter_jax.train.multihost import barrier, initialize
from ipadapter_jax.train.preemption import CoordinatedShutdown

@dataclasses.dataclass
class Options:
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

initialize(tyro.cli(Options).mesh)
import jax
mine = jax.process_index()
facts = [jax.process_count(), jax.device_count(), jax.local_device_count()]
with CoordinatedShutdown() as stop:
    for step in range(1, 20000):
        if step == 10:
            print("running", flush=True)
        if step == 20 and os.environ.get("DIE") == str(mine):
            os.kill(os.getpid(), 9)
        barrier("a step")
        if stop.should_stop(step):
            break
    else:
        sys.exit("never stopped")
barrier("the end")
print("stopped", step, *facts, flush=True)
sys.exit(75)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a line as `dry_run_report` prints it: variables, then the command."""
    started: list[subprocess.Popen] = []

    def start(command: str, **variables: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2", **variables}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(["sh", "-c", f"exec env {command}"], env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def started(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        while (line := process.stdout.readline()) != "running\n":
            assert line, process.communicate()


def described(mesh: Mesh) -> list[str]:
    """The commands that a dry run prints for the processes of WORKER."""
    config = Train(mesh=mesh, data=Data(batch_size=16))
    text = dry_run_report(
        config, [sys.executable, "-c", WORKER, "--dry-run", "--mesh.process=1"], {"JAX_PLATFORMS": "cpu"}
    )
    return [line for line in text.replace(shlex.quote(WORKER), "@").splitlines() if line.startswith("  ")]


def test_two_processes_run_what_the_dry_run_printed_and_stop_at_the_same_step(start):
    mesh = Mesh(coordinator=f"127.0.0.1:{free_port()}", processes=2)
    commands = [line.replace("@", shlex.quote(WORKER)) for line in described(mesh)]
    processes = [start(command) for command in commands]
    started(processes)
    processes[1].send_signal(signal.SIGTERM)  # one of them is told, both must notice
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], answers
    lines = {next(line for line in out.splitlines() if line.startswith("stopped")) for out, _ in answers}
    (line,) = lines
    assert line.split()[2:] == ["2", "4", "2"]
    assert not any("ipadapter-jax:" in err for _, err in answers)


def test_the_survivor_of_two_ends_soon_and_its_last_line_says_why(start):
    port = free_port()
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "JAX_COORDINATOR_PORT": str(port)}
    slurm |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    command = shlex.join([sys.executable, "-c", WORKER, "--mesh.heartbeat-seconds", "5"])
    processes = [start(command, SLURM_PROCID=k, SLURM_LOCALID=k, DIE="0", **slurm) for k in "01"]
    started(processes)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL, -signal.SIGABRT]
    for error in errors:  # also of the one that was killed
        last = error.splitlines()[-1]
        assert last.startswith("ipadapter-jax: process ") and "rerun the same command on every host to resume" in last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_notices_a_signal_and_restores_the_handlers(number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets a job in the background ignore it
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with CoordinatedShutdown() as stop:
        assert not stop.should_stop(1)
        signal.raise_signal(number)
        assert stop.should_stop(2) and stop.should_stop(3)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_single_process_joins_no_cluster():
    initialize(Mesh(), {})
    for environment in ({}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, {"SLURM_STEP_NUM_TASKS": "1"}):
        assert find_cluster(Mesh(), environment) is None
    assert find_cluster(Mesh(), {"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}) is None


def test_addresses_come_before_slurm_and_slurm_before_a_pod():
    mesh = Mesh(coordinator="10.0.0.1:8476", processes=2, process=1)
    pod = {"TPU_ML_PLATFORM": "JAX"}
    found = [find_cluster(*given) for given in [(mesh, SLURM | pod), (Mesh(), SLURM | pod), (Mesh(), pod)]]
    assert [cluster and cluster.kind for cluster in found] == ["addresses", "slurm", "tpu"]
    assert [cluster and cluster.processes for cluster in found] == [2, 4, None]


@pytest.mark.parametrize(
    ("nodes", "visible", "all_devices"),
    [
        ("4", "0,1,2,3", True),  # a task per node has all its GPUs
        ("1", "0,1,2,3", False),  # a task per GPU, all of which it sees: the one of its local number
        ("1", "0", True),  # a task per GPU, of which it sees its own only
    ],
)
def test_a_slurm_task_uses_its_own_gpus(nodes, visible, all_devices):
    environment = SLURM | {"SLURM_STEP_NUM_NODES": nodes, "CUDA_VISIBLE_DEVICES": visible}
    cluster = find_cluster(Mesh(), environment)
    assert cluster is not None
    assert cluster.arguments.get("local_device_ids") == ([] if all_devices else None)


GOOD = Mesh(coordinator="10.0.0.1:8476", processes=2, process=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coordinator": None}, "--mesh.processes 2 needs --mesh.coordinator"),
        ({"coordinator": None, "processes": None}, "--mesh.process 0 needs --mesh.coordinator"),
        ({"coordinator": "10.0.0.1"}, "10.0.0.1 must be host:port"),
        ({"coordinator": ":8476"}, "must be host:port"),
        ({"coordinator": "10.0.0.1:http"}, "must be host:port"),
        ({"coordinator": "10.0.0.1:70000"}, "must be host:port"),
        ({"processes": None}, "needs --mesh.processes"),
        ({"processes": 0}, "needs --mesh.processes"),
        ({"process": 2}, "--mesh.process 2 must lie from 0 to 1"),
        ({"process": -1}, "--mesh.process -1"),
        ({"process": None}, "--mesh.process is missing"),
    ],
)
def test_addresses_that_cannot_be(changes, words):
    with pytest.raises(InputError, match=words):
        initialize(dataclasses.replace(GOOD, **changes), {})


def test_a_taken_port():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--mesh.coordinator localhost:{port}: .* choose a free port"):
            initialize(Mesh(coordinator=f"localhost:{port}", processes=2, process=0), {})


def test_a_dry_run_describes_every_process():
    config = Train(mesh=Mesh(fsdp=2, coordinator="a:1", processes=2), data=Data(batch_size=16))
    command = ["ipadapter-jax", "train", "sd15", "--dry-run", "--mesh.fsdp", "2", "--mesh.coordinator", "b:2"]
    environment = {"XLA_FLAGS": "--a --b", "HOME": "/home/me"}
    lines = dry_run_report(config, command, environment).splitlines()
    assert lines[1:3] == ["mesh: 4 (data) x 2 (fsdp)", "batch: 16 samples, 2 on every device"]
    assert lines[0].startswith("processes: 2, each with 4 x ")
    common = "  XLA_FLAGS='--a --b' ipadapter-jax train sd15 --mesh.fsdp 2 --mesh.coordinator a:1 --mesh.processes 2"
    assert lines[3:] == [
        "process 0, samples 0 to 7 of every batch, runs:",
        f"{common} --mesh.process 0",
        "process 1, samples 8 to 15 of every batch, runs:",
        f"{common} --mesh.process 1",
    ]
    assert "each of the 4 SLURM tasks" in dry_run_report(Train(), command, SLURM)
    assert dry_run_report(Train(), command[:4], {}).splitlines()[-1] == "  ipadapter-jax train sd15"


@pytest.mark.parametrize(("fsdp", "batch", "words"), [(3, 16, "--mesh.fsdp 3"), (1, 12, "--data.batch-size 12")])
def test_a_dry_run_refuses_what_cannot_be_split(fsdp, batch, words):
    config = Train(mesh=Mesh(fsdp=fsdp, coordinator="a:1", processes=2), data=Data(batch_size=batch))
    with pytest.raises(InputError, match=words):
        dry_run_report(config, [], {})


ARGUMENTS = ["sd15", "--out", "a run", "--data.path", 'it\'s $HOME; "x"']


def launch(tmp_path: Path, script: str, arguments: list[str], tools: dict[str, str], **variables: str):
    """A launcher with stand-ins for the cluster's tools; what these print, NUL-separated."""
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    return subprocess.run([ROOT / "scripts" / script, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("code", "requeued"), [(0, ""), (75, "requeue 7\n"), (2, "")])
def test_slurm_runs_the_command_and_requeues_what_was_saved(tmp_path, code, requeued):
    tools = {"srun": f"printf '%s\\0' \"$@\"; exit {code}", "scontrol": 'echo "$@"'}
    done = launch(tmp_path, "train_slurm.sh", ARGUMENTS, tools, SLURM_JOB_ID="7")
    assert done.returncode == code
    assert done.stdout == "".join(f"{word}\0" for word in ["ipadapter-jax", "train", *ARGUMENTS]) + requeued


def test_a_pod_runs_the_same_command_on_every_worker(tmp_path):
    tools = {"gcloud": "printf '%s\\0' \"$@\""}
    done = launch(tmp_path, "train_tpu_pod.sh", ["pod", "us-east5-a", *ARGUMENTS], tools)
    *words, command = done.stdout.rstrip("\0").split("\0")
    expected = ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-east5-a", "--worker=all"]
    assert (done.returncode, words) == (0, expected), done.stderr
    assert shlex.split(command.removeprefix("--command=")) == [
        "python3",
        "-m",
        "ipadapter_jax.cli",
        "train",
        *ARGUMENTS,
    ]


@pytest.mark.parametrize(("script", "arguments"), [("train_slurm.sh", ["sd15"]), ("train_tpu_pod.sh", ["pod"])])
def test_a_launcher_shows_its_usage(tmp_path, script, arguments):
    done = launch(tmp_path, script, arguments, {})
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
