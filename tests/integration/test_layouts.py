"""The same run on one device, on several, with frozen weights split, in two processes, in parts: the same losses."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from training import nano, nano_model, photographs, started

from ipadapter_jax.data.loader import load_batches
from ipadapter_jax.runtime.mesh import TRAIN_AXES
from ipadapter_jax.train.batches import batch_of
from ipadapter_jax.train.config import Train
from ipadapter_jax.train.dataset import open_samples
from ipadapter_jax.train.networks import load_networks
from ipadapter_jax.train.sharding import global_batch, local_indices

ROOT = Path(__file__).resolve().parents[2]


def mesh_of(devices: int, fsdp: int = 1):
    shape = (devices // fsdp, fsdp)
    return jax.make_mesh(
        shape, TRAIN_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:devices]
    )


def losses(config: Train, mesh, steps: int = 10):
    """The losses of the first steps, and the last state, of a run on this mesh."""
    samples = open_samples(config.data.path, config.data, config.model)
    loaded = load_networks(config, mesh, None)
    size = config.data.batch_size
    rows = local_indices(mesh, size)
    state, step = started(config, mesh, loaded)
    found = []
    for batch in load_batches(samples, seed=0, batch_size=size, rows=rows, first=0, count=steps, threads=2):
        state, metrics = step(state, loaded.frozen, batch_of(global_batch(mesh, batch.arrays, rows, size)))
        found.append(float(metrics.loss))
    return np.asarray(found), state, loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Train:
    return nano(data__path=str(photographs(tmp_path_factory.mktemp("data") / "photos")))


@pytest.fixture(scope="module")
def expected(run) -> np.ndarray:
    found, *_ = losses(run, mesh_of(1))
    assert found[-1] != found[0] and np.isfinite(found).all()
    return found


def test_losses_on_four_devices(run, expected) -> None:
    found, state, _ = losses(run, mesh_of(4))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 2]
    assert moments and all(leaf.addressable_shards[0].data.size == leaf.size // 4 for leaf in moments)


def test_losses_with_sharded_frozen_weights(run, expected) -> None:
    found, _, loaded = losses(run, mesh_of(4, fsdp=2))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    kernels = [leaf for leaf in jax.tree.leaves(loaded.frozen.params["unet"]) if leaf.ndim == 4]
    assert all(leaf.addressable_shards[0].data.size == leaf.size // 2 for leaf in kernels if leaf.shape[-1] % 2 == 0)


def test_losses_with_accumulated_gradients(run, expected) -> None:
    config = dataclasses.replace(run, optim=dataclasses.replace(run.optim, accumulate=2))
    found, *_ = losses(config, mesh_of(4))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


PROCESS = """
import sys
from training import nano
from ipadapter_jax.train.config import Mesh
from ipadapter_jax.train.trainer import train
data, out, port, process, fsdp = sys.argv[1:]
mesh = Mesh(coordinator=f"localhost:{port}", processes=2, process=int(process), fsdp=int(fsdp), heartbeat_seconds=30)
sys.exit(train(nano(data__path=data, out=out, mesh=mesh, log__validate_every=10)))
"""


def in_two_processes(data: str, out: Path, fsdp: int) -> np.ndarray:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(["tests", "."])
    environment = os.environ | {"PYTHONPATH": paths, "IPADAPTER_JAX_NANO_MODEL": str(nano_model())}
    environment["JAX_NUM_CPU_DEVICES"] = "2"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, data, str(out), str(port), str(number), str(fsdp)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return np.asarray([line["loss"] for line in lines if "loss" in line])


def test_two_processes_of_two_devices(run, expected, tmp_path) -> None:
    """The whole product, with checkpoints and sample grids, and frozen weights split over both processes' devices."""
    found = in_two_processes(run.data.path, tmp_path / "run", fsdp=4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
    assert (tmp_path / "run" / "samples" / "samples-0000010.png").is_file()
