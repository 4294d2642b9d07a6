"""The random generator: jax's default draws, bit for bit, in every environment; and nothing draws with another."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jax_settings

from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.pipelines.sample_batch import SampleBatch
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.runtime.mesh import local_mesh
from ipadapter_jax.train.init import _init_projection
from ipadapter_jax.train.step import random_draws

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENTS = (
    {"jax_default_prng_impl": "rbg"},
    {"jax_default_prng_impl": "unsafe_rbg"},
    {"jax_threefry_partitionable": False},
    {"jax_enable_x64": True},
    {"jax_default_prng_impl": "rbg", "jax_threefry_partitionable": False},
)
in_every_environment = pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)


def everything(key) -> list:
    """Of every kind of draw that is made anywhere."""
    keys = jax.random.split(jax.random.fold_in(key, jnp.uint32(7)), 4)
    return [
        *(jax.random.key_data(keys), jax.random.key_data(jax.random.split(key, (2, 3)))),
        jax.random.uniform(keys[0], (), jnp.float32),
        jax.random.uniform(keys[0], (3, 4, 5), jnp.float32, minval=-1.0, maxval=1.0),
        jax.random.normal(keys[1], (5, 7, 3), jnp.float32),
        jax.random.randint(keys[2], (4, 2), -5, 70000, jnp.int32),
        *(jax.random.permutation(keys[3], 10), jax.random.bernoulli(keys[3], 0.3, (6,))),
    ]


@pytest.mark.parametrize("seed", [0, 1, 123456789, 2**32 - 1])
def test_draws_are_those_of_jax_as_it_comes(seed):
    pairs = [(everything(random_keys.key(seed)), everything(jax.random.key(seed)))]
    ours, theirs = (
        jax.jit(lambda seed, make=make: everything(make(seed))) for make in (random_keys.key, jax.random.key)
    )
    pairs += [(ours(np.uint32(seed)), theirs(np.uint32(seed)))]
    for found, wanted in pairs:
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


def noise(seeds: list[int], step: int) -> np.ndarray:
    batch = SampleBatch(local_mesh(), np.asarray(seeds, np.uint32), np.zeros(len(seeds), int))
    return np.asarray(batch.noise((8, 8, 4), step))[: len(seeds)]


@in_every_environment
def test_noise_of_an_image_is_that_of_its_seed(environment):
    wanted = [noise([3, 5, 9], step) for step in (0, 1)]
    with jax_settings(environment):
        for step in (0, 1):
            found = noise([3, 5, 9], step)
            np.testing.assert_array_equal(found, wanted[step])
            np.testing.assert_array_equal(noise([9], step)[0], found[2])
            np.testing.assert_array_equal(noise([1, 9, 2, 4, 5, 7], step)[1], found[2])


@in_every_environment
def test_draws_of_training(environment):
    def rows(*numbers):
        found = jax.jit(lambda step, rows: random_draws(5, step, rows, (4, 4, 4), 1000, (0.2, 0.2, 0.2)))
        return jax.device_get(found(np.int32(3), np.asarray(numbers, np.int32)))

    wanted = rows(0, 1, 2, 3, 4, 5)
    with jax_settings(environment):
        for one, other in zip(rows(0, 1, 2, 3, 4, 5), wanted, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        for one, other in zip(rows(4, 2), wanted, strict=True):
            np.testing.assert_array_equal(one, other[[4, 2]])


@in_every_environment
def test_initial_weights(environment):
    config = ImageProjConfig("plus", 48, 32, 16, hidden_dim=32, heads=2, depth=4)

    def weights():
        return jax.device_get(jax.jit(lambda: _init_projection(config, random_keys.key(5)))())

    wanted = weights()
    with jax_settings(environment):
        jax.tree.map(np.testing.assert_array_equal, weights(), wanted)


def test_the_generator_of_older_runs():
    assert random_keys.recorded_generator({"generator": "rbg, original"}) == "rbg, original"
    assert random_keys.recorded_generator({}) == random_keys.GENERATOR
    with jax_settings({"jax_default_prng_impl": "rbg"}):
        assert random_keys.recorded_generator({}) == "rbg, partitionable"
    with jax_settings({"jax_threefry_partitionable": False}):
        assert random_keys.recorded_generator({}) == "threefry2x32, original"


def test_other_widths_and_sizes_are_refused():
    with pytest.raises(ValueError, match="draws of 8 bits"):
        jax.random.normal(random_keys.key(0), (2,), jnp.bfloat16)
    with pytest.raises(ValueError, match="no draws of shape"):
        random_keys._hashed(jnp.zeros(2, jnp.uint32), (2**20, 2**13))


FILES = [
    path
    for folder in ("ipadapter_jax", "benchmarks", "examples", "experiments", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_key_has_its_generator_named(path):
    """A key that jax makes by itself follows the environment."""
    if path.name == "random_keys.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("key", "PRNGKey", "wrap_key_data"):
            assert not ast.unparse(node.value).endswith("random"), f"{path}:{node.lineno}: take random_keys.key"
        if isinstance(node, ast.ImportFrom) and node.module == "jax.random":
            raise AssertionError(f"{path}:{node.lineno}: import jax, and take random_keys.key")
