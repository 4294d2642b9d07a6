"""The random generator of images and runs: Threefry-2x32 in jax's partitionable layout, independent of environment
variables.

jax.random.key(seed) follows JAX_DEFAULT_PRNG_IMPL, and jax's own Threefry follows jax_threefry_partitionable when a
program is compiled. With rbg, usual on TPUs, the random draws of one sample depend on the other samples of its batch.
So the generator is defined here in full: the hash is jax's, and the draws are bit-exactly those of its default.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.extend import random as extend
from jax.typing import ArrayLike

GENERATOR = "threefry2x32, partitionable"  # as runs record it
_config: Any = jax.config  # its settings are made at run time, unknown to type checkers


def key(seed: ArrayLike) -> Array:
    """The key of a seed for `jax.random`; below 2^32 equal to `jax.random.key(seed)` with jax's default settings."""
    return jax.random.key(seed, impl=_IMPLEMENTATION)  # pyright: ignore[reportArgumentType]


def recorded_generator(record: Mapping[str, object]) -> str:
    """The generator in the record of a run. For a record older than this entry: the one that the environment selects,
    as it did for that run."""
    if "generator" in record:
        return str(record["generator"])
    layout = "partitionable" if _config.jax_threefry_partitionable else "original"
    return f"{_config.jax_default_prng_impl}, {layout}"


def _seed(seed: Array) -> Array:
    return extend.threefry_prng_impl.seed(seed)


def _fold_in(data: Array, number: ArrayLike) -> Array:
    return extend.threefry_prng_impl.fold_in(data, number)


def _split(data: Array, shape: tuple[int, ...]) -> Array:
    return jax.numpy.stack(_hashed(data, shape), axis=-1)


def _random_bits(data: Array, width: int, shape: tuple[int, ...]) -> Array:
    if width != 32:
        raise ValueError(f"draws of {width} bits are not defined: name a dtype of 32 bits")
    high, low = _hashed(data, shape)
    return high ^ low


class _Hash(NamedTuple):
    """The two words of 32 bits that Threefry gives for each position."""

    high: Array
    low: Array


def _hashed(data: Array, shape: tuple[int, ...]) -> _Hash:
    """The hash of every position in an array of this shape, counted in row-major order."""
    if np.prod(shape, dtype=object) > 2**32:
        raise ValueError(f"no draws of shape {shape}: positions are counted with 32 bits")
    strides = [int(np.prod(shape[axis + 1 :], dtype=object)) for axis in range(len(shape))]
    count = jax.numpy.zeros(shape, np.uint32)
    for axis, stride in enumerate(strides):
        count += jax.lax.broadcasted_iota(np.uint32, shape, axis) * np.uint32(stride)
    first, second = extend.threefry2x32_p.bind(data[0], data[1], jax.numpy.zeros_like(count), count)
    return _Hash(first, second)


_IMPLEMENTATION = extend.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32_partitionable",
    tag="fryp",
)
