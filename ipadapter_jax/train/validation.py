"""What the training loss does not say: the loss on a fixed batch with fixed noise, by timestep, and pictures.

The loss of a training step depends mostly on the timesteps that it drew; here they are the same at every call, so that
a difference is one of the weights.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from PIL import Image

from ipadapter_jax import sampling
from ipadapter_jax.adapters import Adapter
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.pipeline import StableDiffusion
from ipadapter_jax.preprocess import image_grid, to_uint8
from ipadapter_jax.train.config import Log, Train
from ipadapter_jax.train.networks import Loaded, Networks
from ipadapter_jax.train.optim import fill
from ipadapter_jax.train.samples import Samples, good_sample
from ipadapter_jax.train.sharding import by_row, global_batch, local_rows, replicated
from ipadapter_jax.train.step import Batch, draw, encode, gathered, image_features, posterior, row_losses
from ipadapter_jax.weights.components import Loaded as Encoder

BUCKETS = 4  # quarters of the timesteps, the first being the least noisy
_SEED = 0  # the noise of validation is that of no run
_PICTURES = 4  # image prompts of the sample grid
_COLUMNS = 2  # pictures for each


class Validation:
    """A fixed batch, put on the mesh once, and what is measured on it. All processes call its methods together."""

    def __init__(self, config: Train, mesh: Mesh, loaded: Loaded, samples: Samples):
        self._log, self._mesh, self._loaded = config.log, mesh, loaded
        size = -(-config.log.validation_size // mesh.size) * mesh.size
        rows = local_rows(mesh, size)
        found = [good_sample(samples, row, size) for row in rows]
        arrays = {name: np.stack([sample[name] for sample in found]) for name in found[0]}
        self._batch = global_batch(mesh, arrays, rows, size)
        self._losses = jax.jit(make_validation_losses(loaded.networks, mesh), out_shardings=replicated(mesh))
        self._prompts = image_prompts(loaded, self._batch, mesh) if config.log.sample_steps else None

    def run(self, learnt: Any) -> tuple[dict[str, float], Image.Image | None]:
        """Losses by name, "validation_loss_0" being that of the least noisy quarter of the timesteps, and in process 0
        the sample grid, if there is to be one."""
        losses = np.asarray(self._losses(learnt, self._loaded.frozen, self._batch).addressable_data(0))
        named = {"validation_loss": float(np.mean(losses))}
        named |= {f"validation_loss_{i}": float(loss) for i, loss in enumerate(losses)}
        if self._prompts is None:
            return named, None
        return named, sample_grid(self._loaded, learnt, self._prompts, self._log, self._mesh)


def make_validation_losses(networks: Networks, mesh: Mesh) -> Callable[[Any, dict[str, Any], Batch], Array]:
    """(learnt, frozen, batch) -> mean loss per bucket of timesteps (BUCKETS,), nothing dropped, noise fixed."""
    total = networks.schedule.num_train_timesteps
    width = total // BUCKETS

    def losses(learnt: Any, frozen: dict[str, Any], batch: Batch) -> Array:
        size = batch["input_ids"].shape[0]
        rows = jax.lax.with_sharding_constraint(jnp.arange(size), by_row(mesh))

        def of_bucket(bucket: Array) -> Array:
            draws = draw(_SEED, bucket, rows, networks.latent_shape, width, drop=(0.0, 0.0, 0.0))
            draws = draws._replace(timestep=bucket * width + draws.timestep)
            whole = gathered(frozen, mesh)
            return row_losses(networks, fill(learnt, whole), encode(networks, whole, batch, draws)).mean()

        return jax.lax.map(of_bucket, jnp.arange(BUCKETS))

    return losses


@dataclasses.dataclass(frozen=True)
class ImagePrompts:
    """The prompts of the sample grid, computed once; (n, ...) numpy arrays that every process holds."""

    references: list[Image.Image]  # through the VAE and back: the best that the latents allow
    features: np.ndarray | None  # (2, n, ...), the negative ones first


def image_prompts(loaded: Loaded, batch: Batch, mesh: Mesh) -> ImagePrompts:
    """Those of the first rows of a batch. All processes call this together."""
    networks, frozen = loaded.networks, loaded.frozen

    def compute(frozen: dict[str, Any], batch: Batch):
        head = jax.tree.map(lambda x: x[:_PICTURES], batch)
        mean = posterior(networks, frozen, head)[0].astype(jnp.float32)
        decoded = networks.vae.apply({"params": frozen["vae"]}, mean, method=VAE.decode)
        none, every = (jnp.full(mean.shape[0], drop) for drop in (False, True))
        if networks.projection is None:
            return decoded, None
        features: Any = [image_features(networks, frozen, head, drop) for drop in (every, none)]
        return decoded, jnp.stack(features).astype(jnp.float32)

    decoded, features = jax.jit(compute, out_shardings=replicated(mesh))(frozen, batch)
    pixels = to_uint8(np.clip(np.asarray(decoded.addressable_data(0)) / 2 + 0.5, 0, 1))
    references = [Image.fromarray(picture) for picture in pixels]
    return ImagePrompts(references, None if features is None else np.asarray(features.addressable_data(0)))


def sample_grid(loaded: Loaded, learnt: Any, prompts: ImagePrompts, log: Log, mesh: Mesh) -> Image.Image | None:
    """A row for every image prompt: the reference and pictures of fixed seeds, without text. All processes call this
    together; process 0 samples on its own devices and gets the picture."""
    local = sampling.device_mesh()
    params = local_copy(
        fill(learnt, loaded.frozen) | {k: loaded.frozen[k] for k in ("vae", "text_encoder")}, mesh, local
    )
    if jax.process_index():
        return None
    pipe = pipeline_of(loaded, params, local)
    pictures = []
    side = prompts.references[0].width
    for i, reference in enumerate(prompts.references):
        embeds = None
        if prompts.features is not None:
            features = prompts.features[:, i : i + 1]
            embeds = [features if log.guidance_scale > 1 else features[1:]]
        pictures += [reference] + pipe(
            "",
            ip_adapter_image_embeds=embeds,
            num_inference_steps=log.sample_steps,
            guidance_scale=log.guidance_scale,
            num_images_per_prompt=_COLUMNS,
            seed=i * _COLUMNS,
            height=side,
            width=side,
        )
    return image_grid(pictures, columns=1 + _COLUMNS)


def pipeline_of(loaded: Loaded, params: dict[str, Any], mesh: Mesh) -> StableDiffusion:
    """The sampler of a run's networks with these weights."""
    networks, adapters = loaded.networks, ()
    if networks.projection is not None and networks.adapter is not None:
        own = {part: params[part] for part in ("image_proj", "ip_adapter")}
        encoder = Encoder(networks.image_encoder, {}, Path())
        adapters = (Adapter(networks.projection, networks.adapter, own, encoder, Path()),)
    return StableDiffusion(
        unet=networks.unet,
        vae=networks.vae,
        text_encoder=networks.text_encoder,
        tokenizer=loaded.tokenizer,
        schedule=networks.schedule,
        params=params,
        mesh=mesh,
        sources={},
        adapters=adapters,
    )


def local_copy(tree: Any, mesh: Mesh, local: Mesh) -> Any:
    """Global arrays as whole ones on this process's devices; shares memory with what is whole already."""

    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))

    def one(leaf: Array) -> Array:
        whole = leaf if leaf.is_fully_replicated else gather(leaf).block_until_ready()  # one by one: see digest.py
        shards = [shard.data for shard in whole.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sampling.replicated(local), shards)

    return jax.tree.map(one, tree)
