"""The VAE's own scaling of latents, and the range of pixels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipadapter_jax.models.vae import VAE, Posterior, VAEConfig, denormalize, normalize

CONFIG = VAEConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, scaling_factor=0.25)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (1, 4, 4, 3)).astype(np.float32)
NOISE = np.random.default_rng(1).standard_normal((2, 4, 4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    """Drawn by NumPy: to compile a program that draws them takes longer than all tests of this file."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(VAE(CONFIG).init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def test_latents_are_samples_of_the_posterior_times_the_scaling_factor(params):
    vae = VAE(CONFIG)
    mean, log_variance = vae.apply(params, IMAGES, method=VAE.posterior)
    expected = 0.25 * (mean + jnp.exp(0.5 * log_variance) * NOISE)
    latents = vae.apply(params, IMAGES, NOISE, method=VAE.encode)
    assert latents.shape == NOISE.shape  # one image, two samples
    np.testing.assert_array_equal(latents, expected)
    np.testing.assert_array_equal(vae.sample(Posterior(mean, log_variance), NOISE), expected)
    np.testing.assert_array_equal(vae.sample(Posterior(mean, log_variance), 0.0), 0.25 * mean)


def test_decoding_undoes_the_scaling_factor(params):
    unscaled = VAE(dataclasses.replace(CONFIG, scaling_factor=1.0))
    found = VAE(CONFIG).apply(params, 0.25 * NOISE, method=VAE.decode)
    np.testing.assert_array_equal(found, unscaled.apply(params, NOISE, method=VAE.decode))


def test_a_posterior_is_not_scaled(params):
    other = VAE(dataclasses.replace(CONFIG, scaling_factor=7.0))
    expected = VAE(CONFIG).apply(params, IMAGES, method=VAE.posterior)
    for found, array in zip(other.apply(params, IMAGES, method=VAE.posterior), expected, strict=True):
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_pixels_to_the_range_of_the_vae_and_back(array):
    images = normalize(array(np.array([0, 51, 255], np.uint8)))
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, [-1, -0.6, 1], rtol=1e-6)
    np.testing.assert_allclose(denormalize(images), [0, 0.2, 1], rtol=1e-6)
    np.testing.assert_array_equal(denormalize(array(np.array([-1.5, 3.0], np.float32))), [0, 1])
