"""The VAE of mini, trained on scenes and crops of photographs."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.mini.networks import VAE_CONFIG
from experiments.mini.scenes.examples import example
from experiments.mini.scenes.render import mask
from experiments.mini.simple_trainer import fit
from ipadapter_jax.models.vae import VAE, normalize
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.weights.load_tree import Tree

KL_WEIGHT = 1e-4  # of the mean KL over latent values: so that latents near those of an image decode to the image
OBJECT_WEIGHT = 4.0  # extra weight of object pixels, since backgrounds are learned quickly
CROP = 32  # side in pixels of crops around objects, a quarter of the work; whole images follow
PHOTOGRAPHS = 0.2


def train(folder: Path, steps: Mapping[str, int], deadline: float) -> tuple[VAE, Tree] | None:
    """Trains the VAE and gives it with its weights, or gives None if the deadline is reached.

    steps: the training steps of the stages "vae-crops" and "vae-whole".
    """
    vae = VAE(VAE_CONFIG)
    params = jax.jit(vae.init)(random_keys.key(0), jnp.zeros((1, CROP, CROP, 3)))["params"]
    distance = functools.partial(loss, vae)
    for name, learning_rate, batch in (("vae-crops", 2e-3, crops), ("vae-whole", 5e-4, wholes)):
        rates = {"steps": steps[name], "learning_rate": learning_rate}
        found = fit(folder / name, distance, params, batch, **rates, deadline=deadline)
        if found is None:
            return None
        params = found
    return vae, normalised(vae, params)


def loss(vae: VAE, params: Tree, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    images = normalize(batch["pixels"])
    posterior: Any = vae.apply({"params": params}, images, method=VAE.posterior)
    mean, log_variance = posterior
    latents = vae.sample(posterior, jax.random.normal(key, mean.shape))
    decoded: Any = vae.apply({"params": params}, latents, method=VAE.decode)
    error = decoded - images
    weight = 1 + OBJECT_WEIGHT * batch["object"].astype(jnp.float32)[..., None] / 255
    kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    return jnp.mean(weight * (jnp.abs(error) + error**2)) / jnp.mean(weight) + KL_WEIGHT * jnp.mean(kl)


def wholes(number: int, size: int = 16) -> dict[str, np.ndarray]:
    """Batch `number`, by name: pixels (B, S, S, 3) uint8; object (B, S, S) uint8, how much of a pixel an object covers,
    from 0 to 255. It is half of that everywhere in a photograph."""
    examples = [example("train", number * size + i, photographs=PHOTOGRAPHS) for i in range(size)]
    covers = [np.full((64, 64), 0.5) if e.scene is None else mask(e.scene) for e in examples]
    return {
        "pixels": np.stack([e.pixels for e in examples]),
        "object": np.stack([np.round(255 * cover).astype(np.uint8) for cover in covers]),
    }


def crops(number: int, size: int = 32) -> dict[str, np.ndarray]:
    """The same of a random CROP x CROP part of each image, around a pixel of an object."""
    whole, rng = wholes(number, size), np.random.default_rng([1, number])
    cut: dict[str, list[np.ndarray]] = {name: [] for name in whole}
    for i in range(size):
        rows, columns = np.nonzero(whole["object"][i])
        chosen = rng.integers(len(rows))
        middle = np.array([rows[chosen], columns[chosen]]) + rng.integers(-8, 9, 2)
        top, left = np.clip(middle - CROP // 2, 0, 64 - CROP)
        for name, arrays in whole.items():
            cut[name].append(arrays[i, top : top + CROP, left : left + CROP])
    return {name: np.stack(parts) for name, parts in cut.items()}


def normalised(vae: VAE, params: Tree) -> Tree:
    """Weights of the same VAE with latents of mean 0 and standard deviation 1 in every channel. One scaling_factor for
    all channels could not do that, so the 1x1 convolutions before and after the latents are scaled."""
    pixels = np.concatenate([wholes(10**6 + i)["pixels"] for i in range(32)])
    encode = jax.jit(functools.partial(vae.apply, method=VAE.posterior))
    mean = np.asarray(encode({"params": params}, normalize(jnp.asarray(pixels))).mean)
    centre, spread = mean.mean((0, 1, 2)), mean.std((0, 1, 2))
    params = jax.tree.map(np.array, params)
    before, after = params["quant_conv"], params["post_quant_conv"]
    channels = len(spread)
    before["kernel"][..., :channels] /= spread
    before["bias"][:channels] = (before["bias"][:channels] - centre) / spread
    before["bias"][channels:] -= 2 * np.log(spread)
    after["bias"] += np.einsum("c,cd->d", centre, after["kernel"][0, 0])
    after["kernel"] *= spread[:, None]
    return params
