"""The samples of one call on the devices, and their random draws."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from ipadapter_jax.runtime.mesh import batch_sharding
from ipadapter_jax.runtime.random_keys import key


@functools.partial(jax.jit, static_argnums=(0, 3))
def draw_noise(shape: tuple[int, ...], seeds: Array, number: Array, mesh: Mesh) -> Array:
    """Standard normal (B, *shape): sample i depends on seeds[i] and the number of the draw alone (see `noise.py`)."""

    def draw(seed):
        return jax.random.normal(jax.random.fold_in(key(seed), number), shape, jnp.float32)

    return jax.lax.with_sharding_constraint(jax.vmap(draw)(seeds), batch_sharding(mesh))


class SampleBatch:
    """The B samples of one call, padded to a multiple of the devices by repeating the last one."""

    def __init__(
        self, mesh: Mesh, seeds: np.ndarray, prompt_of_sample: np.ndarray, given: Mapping[int, np.ndarray] | None = None
    ):
        """`given` holds noise by number (`noise.py`), which is used instead of random draws."""
        self.mesh, self.count, self._given = mesh, len(seeds), given or {}
        self._seeds = self.sharded(seeds)
        self.prompt_of_sample = self.sharded(prompt_of_sample)

    def sharded(self, samples: np.ndarray) -> Array:
        """Samples (B, ...), padded and sharded over the devices."""
        padded = np.concatenate([samples, np.repeat(samples[-1:], -len(samples) % self.mesh.size, axis=0)])
        return jax.device_put(padded, batch_sharding(self.mesh))

    def noise(self, shape: tuple[int, ...], number: int) -> Array:
        """Standard normal (B, *shape), the random draw of this number."""
        if number in self._given:
            return self.sharded(self._given[number])
        return draw_noise(shape, self._seeds, np.uint32(number), self.mesh)
