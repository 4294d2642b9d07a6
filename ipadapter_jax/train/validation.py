"""Validation: the loss on a fixed batch with fixed noise, by timestep, and a grid of samples.

The loss of a training step depends mostly on the timesteps that it drew; here they are the same at every call, so that
a difference is one of the weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.clip_scorer import open_scorer
from ipadapter_jax.evaluate.metrics import score
from ipadapter_jax.images.contact_sheet import contact_sheet
from ipadapter_jax.images.preprocess import to_uint8
from ipadapter_jax.models.vae import VAE, Posterior, denormalize
from ipadapter_jax.ops.batch_sharding import batch_sharded
from ipadapter_jax.pipelines.feature_encoder import CLIPFeatureEncoder
from ipadapter_jax.pipelines.ip_adapter import Adapter
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion
from ipadapter_jax.runtime.mesh import batch_sharding, local_mesh, replicated
from ipadapter_jax.runtime.trees import Params, PyTree
from ipadapter_jax.train.batches import EncodedBatch, FrozenModels, ImageBatch, TrainBatch, batch_of
from ipadapter_jax.train.config import Log
from ipadapter_jax.train.dataset import Samples, first_readable_sample
from ipadapter_jax.train.networks import LoadedNetworks, Networks
from ipadapter_jax.train.optim import Partitioned, combine
from ipadapter_jax.train.sharding import global_batch, local_indices, replicate_leaves
from ipadapter_jax.train.step import (
    denoising_inputs,
    gathered,
    image_features,
    in_parts,
    posterior,
    random_draws,
    sample_losses,
)
from ipadapter_jax.weights.load_tree import Tree
from ipadapter_jax.weights.open_component import LoadedComponent

T = TypeVar("T")

BUCKETS = 4  # quarters of the timesteps, the first being the least noisy
_SEED, _STEP = 0, 2**32 - 1  # of noise that no training step uses
_IMAGES = 4  # image prompts of the sample grid
_COLUMNS = 2  # images for each
_LEAST_SIDE = 192  # of an image in the grid, in pixels: labels need room


class Validation:
    """A fixed batch, encoded once. All processes call its methods together."""

    def __init__(self, log: Log, mesh: Mesh, loaded: LoadedNetworks, samples: Samples):
        self._log, self._mesh, self._loaded = log, mesh, loaded
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
        self._prompts = self._image_prompts() if log.sample_steps else None
        if log.clip is not None and self._prompts is None:
            raise InputError("log.clip scores the sample grid: give log.sample_steps as well")
        scores = log.clip is not None and jax.process_index() == 0
        self._scorer = open_scorer(str(log.clip)).load() if scores else None

    def losses(self, trainable: Partitioned) -> dict[str, float]:
        """By name, "validation_loss_0" being that of the least noisy quarter of the timesteps."""
        losses = np.asarray(self._losses(trainable, self._frozen, self._batch).addressable_data(0))
        named = {f"validation_loss_{i}": float(loss) for i, loss in enumerate(losses)}
        return {"validation_loss": float(np.mean(losses)), **named}

    def grid(self, trainable: Partitioned, step: int) -> "Grid":
        """A row for every image prompt: the reference and images of fixed seeds, without text, labelled; and by name
        what the scoring CLIP says of them. For process 0, which samples on its own devices; nothing for the others, and
        where there is to be none."""
        if self._prompts is None:
            return Grid(None, {})
        local, loaded = local_mesh(), self._loaded
        params = combine(trainable, loaded.frozen.params)
        params |= {name: loaded.frozen.params[name] for name in ("vae", "text_encoder")}
        params = local_copy(replicate_leaves(params, self._mesh), local)
        if jax.process_index():
            return Grid(None, {})
        groups = samples_of(pipeline_of(loaded, params, local), self._prompts, self._log)
        captions = [loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in self._prompts.input_ids]
        image = grid_sheet(self._prompts, captions, groups, self._log, step)
        if self._scorer is None:
            return Grid(image, {})
        scores = score(self._scorer, groups, self._prompts.references, [[caption] for caption in captions])
        return Grid(image, {name: float(values.mean()) for name, values in scores.prompt_means().items()})

    def _image_prompts(self) -> "ImagePrompts":
        vae, params = self._loaded.networks.vae, self._loaded.frozen.params["vae"]

        def first_samples(params: Params, batch: EncodedBatch) -> _GridInputs:
            batch = jax.tree.map(lambda x: x[:_IMAGES], batch)
            posterior = Posterior(batch.mean, batch.logvar)
            decoded: PyTree = vae.apply({"params": params}, vae.sample(posterior, 0.0), method=VAE.decode)
            return _GridInputs(decoded, batch.input_ids, batch.features)

        decoded, input_ids, positive = jax.tree.map(
            lambda x: np.asarray(x.addressable_data(0)),
            jax.jit(first_samples, out_shardings=replicated(self._mesh))(params, self._batch),
        )
        references = [Image.fromarray(image) for image in to_uint8(denormalize(decoded))]
        if positive is None:
            return ImagePrompts(references, input_ids, None)
        negative = np.zeros_like(positive)
        if self._frozen.zero_features is not None:
            negative[:] = np.asarray(self._frozen.zero_features.addressable_data(0))
        return ImagePrompts(references, input_ids, np.stack([negative, positive]))


class _GridInputs(NamedTuple):
    """The first samples of the validation batch."""

    decoded: Array  # (n, H, W, 3), the latents as images
    input_ids: Array  # (n, S)
    features: Array | None  # (n, ...)


class Grid(NamedTuple):
    """The sample grid as an image, and the scores of its images by name."""

    image: Image.Image | None
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ImagePrompts:
    """The prompts of the sample grid; arrays that every process holds."""

    references: list[Image.Image]  # through the VAE and back: the best that the latents allow
    input_ids: np.ndarray  # (n, S), of the captions
    features: np.ndarray | None  # (2, n, ...), the negative ones first


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


def samples_of(pipe: StableDiffusion, prompts: ImagePrompts, log: Log) -> list[list[Image.Image]]:
    """Images of fixed seeds for each prompt."""
    groups, side = [], prompts.references[0].width
    for i in range(len(prompts.references)):
        embeds = None
        if prompts.features is not None:
            features = prompts.features[:, i : i + 1]
            embeds = [features if log.guidance_scale > 1 else features[1:]]
        groups.append(
            pipe(
                "",
                ip_adapter_image_embeds=embeds,
                num_inference_steps=log.sample_steps,
                guidance_scale=log.guidance_scale,
                num_images_per_prompt=_COLUMNS,
                seed=i * _COLUMNS,
                height=side,
                width=side,
                progress_bar=False,
            )
        )
    return groups


def grid_sheet(
    prompts: ImagePrompts, captions: Sequence[str], groups: Sequence[Sequence[Image.Image]], log: Log, step: int
) -> Image.Image:
    """The samples of a step as a contact sheet: a row for each image prompt under its caption, the reference first,
    then its samples by seed."""
    rows = {}
    for number, (reference, caption, group) in enumerate(zip(prompts.references, captions, groups, strict=True)):
        samples = [(f"seed {number * _COLUMNS + column}", image) for column, image in enumerate(group)]
        rows[f"{number + 1}: {caption or 'no caption'}"] = [("reference", reference), *samples]
    prompted = "no prompt" if prompts.features is None else "image prompt alone, no text"
    note = f"step {step}: {prompted}, {log.sample_steps} sampling steps, guidance {log.guidance_scale:g}"
    return contact_sheet(rows, note, side=max(_LEAST_SIDE, prompts.references[0].width))


def pipeline_of(loaded: LoadedNetworks, params: dict[str, Tree], mesh: Mesh) -> StableDiffusion:
    """The sampler of a run's networks with these weights."""
    networks, adapters = loaded.networks, ()
    if networks.projection is not None and networks.adapter is not None:
        own = {part: params[part] for part in ("image_proj", "ip_adapter")}
        component = LoadedComponent(networks.image_encoder, {}, Path())
        encoder = CLIPFeatureEncoder(component, networks.projection.config.feature_kind)
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


def local_copy(tree: T, local: Mesh) -> T:
    """Arrays with a copy on every device, as arrays of this process's devices alone; the memory is shared."""

    def one(leaf: Array) -> Array:
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(local), shards)

    return jax.tree.map(one, tree)
