"""Validation: the loss on a fixed batch with fixed noise, by timestep, and the sample grid.

The loss of a training step depends mostly on the timesteps that it drew; here they are the same at every call, so that
a difference is one of the weights.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from ipadapter_jax.errors import InputError
from ipadapter_jax.ops.batch_sharding import batch_sharded
from ipadapter_jax.runtime.mesh import batch_sharding, replicated
from ipadapter_jax.train.batches import EncodedBatch, FrozenModels, ImageBatch, TrainBatch, batch_of
from ipadapter_jax.train.config import Log
from ipadapter_jax.train.dataset import Samples, first_readable_sample
from ipadapter_jax.train.networks import LoadedNetworks, Networks
from ipadapter_jax.train.optim import Partitioned, combine
from ipadapter_jax.train.sample_grid import Grid, SampleGrid
from ipadapter_jax.train.sharding import global_batch, local_indices
from ipadapter_jax.train.step import (
    denoising_inputs,
    gathered,
    image_features,
    in_parts,
    posterior,
    random_draws,
    sample_losses,
)

BUCKETS = 4  # quarters of the timesteps, the first being the least noisy
_SEED, _STEP = 0, 2**32 - 1  # of noise that no training step uses


class Validation:
    """A fixed batch, encoded once. All processes call its methods together."""

    def __init__(self, log: Log, mesh: Mesh, loaded: LoadedNetworks, samples: Samples):
        if log.clip is not None and not log.sample_steps:
            raise InputError("log.clip scores the sample grid: give log.sample_steps as well")
        size = -(-log.validation_size // mesh.size) * mesh.size
        indices = local_indices(mesh, size)
        found = [first_readable_sample(samples, index, size) for index in indices]
        arrays = {name: np.stack([sample[name] for sample in found]) for name in found[0]}
        batch = batch_of(global_batch(mesh, arrays, indices, size))
        encode_all = jax.jit(functools.partial(_encoded, loaded.networks, mesh))
        self._batch, dropped = encode_all(loaded.frozen, batch)
        # What a dropped image is must have a name, though here none is dropped.
        self._frozen = loaded.frozen if dropped is None else loaded.frozen._replace(zero_features=dropped)
        self._losses = jax.jit(make_validation_losses(loaded.networks, mesh), out_shardings=replicated(mesh))
        zero_features = self._frozen.zero_features
        self._grid = SampleGrid(log, mesh, loaded, self._batch, zero_features) if log.sample_steps else None

    def losses(self, trainable: Partitioned) -> dict[str, float]:
        """By name, "validation_loss_0" being that of the least noisy quarter of the timesteps."""
        losses = np.asarray(self._losses(trainable, self._frozen, self._batch).addressable_data(0))
        named = {f"validation_loss_{i}": float(loss) for i, loss in enumerate(losses)}
        return {"validation_loss": float(np.mean(losses)), **named}

    def grid(self, trainable: Partitioned, step: int) -> Grid:
        """The sample grid, for process 0; nothing for the others, and where there is to be none."""
        return Grid(None, {}) if self._grid is None else self._grid.draw(trainable, step)


class _Encoded(NamedTuple):
    """A batch of features, and those of a dropped image for a variant that reads patches."""

    batch: EncodedBatch
    zero_features: Array | None


def _encoded(networks: Networks, mesh: Mesh, frozen: FrozenModels, batch: TrainBatch) -> _Encoded:
    """Encodes a batch, one sample per device at a time."""
    frozen = gathered(frozen, mesh)
    size = batch.input_ids.shape[0]

    def some(part: TrainBatch) -> EncodedBatch:
        keep = jnp.zeros(part.input_ids.shape[0], bool)
        with batch_sharded(mesh):
            mean, log_variance = posterior(networks, frozen, part)
            features = image_features(networks, frozen, part, keep)
        features = None if features is None else features.astype(jnp.float32)
        return EncodedBatch(features, part.input_ids, log_variance, mean)

    parts = jax.lax.map(some, in_parts(batch, size // mesh.size))
    merged = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(size, *x.shape[2:]), parts)
    sharded = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh)), merged)
    if networks.projection is None or not networks.projection.config.feature_kind.has_positions:
        return _Encoded(sharded, None)
    if frozen.zero_features is not None:
        return _Encoded(sharded, frozen.zero_features)
    assert isinstance(batch, ImageBatch) and batch.clip_pixels is not None
    side = batch.clip_pixels.shape[1]
    return _Encoded(sharded, networks.image_features(frozen, jnp.zeros((1, side, side, 3)))[0])


def make_validation_losses(
    networks: Networks, mesh: Mesh
) -> Callable[[Partitioned, FrozenModels, EncodedBatch], Array]:
    """(trainable, frozen, batch) -> mean loss per bucket of timesteps (BUCKETS,), nothing dropped, noise fixed."""
    total = networks.schedule.num_train_timesteps
    width = total // BUCKETS

    def losses(trainable: Partitioned, frozen: FrozenModels, batch: EncodedBatch) -> Array:
        size = batch.input_ids.shape[0]
        indices = jax.lax.with_sharding_constraint(jnp.arange(size), batch_sharding(mesh))

        def of_bucket(bucket: Array) -> Array:
            step = jnp.uint32(_STEP) - bucket.astype(jnp.uint32)
            draws = random_draws(_SEED, step, indices, networks.latent_shape, width, drop=(0.0, 0.0, 0.0))
            draws = draws._replace(timestep=bucket * width + draws.timestep)
            full = gathered(frozen, mesh)
            with batch_sharded(mesh):
                return sample_losses(
                    networks, combine(trainable, full.params), denoising_inputs(networks, full, batch, draws)
                ).mean()

        return jax.lax.map(of_bucket, jnp.arange(BUCKETS))

    return losses
