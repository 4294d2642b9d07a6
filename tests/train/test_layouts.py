"""The same run on one device, on several, with frozen weights split, in two processes, in parts: the same losses."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from training import micro, photographs

from ipadapter_jax.data.batches import batches
from ipadapter_jax.train.config import Train
from ipadapter_jax.train.networks import load_networks
from ipadapter_jax.train.optim import make_optimizer, trainable, view
from ipadapter_jax.train.samples import open_samples
from ipadapter_jax.train.sharding import AXES, global_batch, local_rows, replicated
from ipadapter_jax.train.state import initial_state, state_shardings
from ipadapter_jax.train.step import make_step


def mesh_of(devices: int, fsdp: int = 1):
    shape = (devices // fsdp, fsdp)
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:devices])


def losses(config: Train, mesh, steps: int = 10):
    """The losses of the first steps, and the last state, of a run on this mesh."""
    samples = open_samples(config, config.data.path)
    loaded = load_networks(config, mesh, None)
    mask, size = trainable(config.model), config.data.batch_size
    optimizer, rows = make_optimizer(config.optim, mask), local_rows(mesh, size)
    state = initial_state(view(loaded.frozen | loaded.params, mask), optimizer, config)
    shardings = state_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    step = jax.jit(make_step(loaded.networks, optimizer, config, mesh), out_shardings=(shardings, replicated(mesh)))
    found = []
    for batch in batches(samples, seed=0, batch_size=size, rows=rows, first=0, count=steps, threads=2):
        state, metrics = step(state, loaded.frozen, global_batch(mesh, batch.arrays, rows, size))
        found.append(float(metrics["loss"]))
    return np.asarray(found), state, loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Train:
    return micro(data__path=str(photographs(tmp_path_factory.mktemp("data") / "photos")))


@pytest.fixture(scope="module")
def expected(run) -> np.ndarray:
    found, *_ = losses(run, mesh_of(1))
    assert found[-1] != found[0] and np.isfinite(found).all()
    return found


def test_four_devices(run, expected) -> None:
    found, state, loaded = losses(run, mesh_of(4))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 2]
    assert moments and all(leaf.addressable_shards[0].data.size == leaf.size // 4 for leaf in moments)


def test_fsdp(run, expected) -> None:
    found, _, loaded = losses(run, mesh_of(4, fsdp=2))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    kernels = [leaf for leaf in jax.tree.leaves(loaded.frozen["unet"]) if leaf.ndim == 4]
    assert all(leaf.addressable_shards[0].data.size == leaf.size // 2 for leaf in kernels if leaf.shape[-1] % 2 == 0)


def test_accumulated(run, expected) -> None:
    config = dataclasses.replace(run, optim=dataclasses.replace(run.optim, accumulate=2))
    found, *_ = losses(config, mesh_of(4))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
