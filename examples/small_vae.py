"""A small VAE fitted to a few images. It only serves to make latents for tests on real photographs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from ipadapter_jax.models.vae import VAE, VAEConfig, normalize
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.weights.load_tree import Tree

CONFIG = VAEConfig(block_out_channels=(8, 16, 32, 64), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0)
KL_WEIGHT = 1e-4  # per latent number: keeps the latents' scale and some room around each image


def fit(pixels: np.ndarray, *, steps: int, learning_rate: float = 3e-3) -> tuple[VAE, Tree]:
    """pixels (B, H, W, 3) uint8, the whole training set -> the network and its weights; `scaling_factor` is 1 / the
    standard deviation of the latents."""
    images = normalize(jnp.asarray(pixels))
    vae = VAE(CONFIG)
    encode: Any = functools.partial(vae.apply, method=VAE.posterior)
    decode: Any = functools.partial(vae.apply, method=VAE.decode)
    params = jax.jit(vae.init)(random_keys.key(0), images[:1])["params"]
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(params: Tree, key: jax.Array) -> jax.Array:
        posterior = encode({"params": params}, images)
        mean, log_variance = posterior
        latents = vae.sample(posterior, jax.random.normal(key, mean.shape))
        error = decode({"params": params}, latents) - images
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        return jnp.mean(error**2) + KL_WEIGHT * jnp.mean(kl)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Tree, state: optax.OptState, number: int):
        key = jax.random.fold_in(random_keys.key(1), number)
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number in tqdm.trange(steps, desc="VAE", disable=None):
        params, state = step(params, state, number)
    spread = np.std(jax.jit(encode)({"params": params}, images).mean)
    return VAE(dataclasses.replace(CONFIG, scaling_factor=1 / float(spread))), params


def through(vae: VAE, params: Tree, pixels: np.ndarray) -> np.ndarray:
    """Images (B, H, W, 3) uint8 to latents and back."""
    back = jax.jit(vae.apply)({"params": params}, normalize(jnp.asarray(pixels)))
    return np.asarray(jnp.round((jnp.clip(back, -1, 1) + 1) * 127.5)).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each image (B, H, W, 3) uint8, in dB."""
    return -10 * np.log10(np.mean((a.astype(float) - b) ** 2, axis=(1, 2, 3)) / 255**2)
