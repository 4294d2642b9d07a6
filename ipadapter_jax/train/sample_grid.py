"""The sample grid: what the adapter makes of a few fixed image prompts, as one image."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from PIL import Image

from ipadapter_jax.evaluate.clip_scorer import open_scorer
from ipadapter_jax.evaluate.metrics import score
from ipadapter_jax.images.contact_sheet import contact_sheet
from ipadapter_jax.images.preprocess import to_uint8
from ipadapter_jax.models.vae import VAE, Posterior, denormalize
from ipadapter_jax.pipelines.feature_encoder import CLIPFeatureEncoder
from ipadapter_jax.pipelines.ip_adapter import Adapter
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion
from ipadapter_jax.pipelines.text_conditioner import TextConditioner
from ipadapter_jax.runtime.mesh import local_mesh, replicated
from ipadapter_jax.runtime.trees import Params, PyTree
from ipadapter_jax.train.batches import EncodedBatch
from ipadapter_jax.train.config import Log
from ipadapter_jax.train.networks import LoadedNetworks
from ipadapter_jax.train.optim import Partitioned, combine
from ipadapter_jax.train.sharding import replicate_leaves
from ipadapter_jax.weights.load_tree import Tree
from ipadapter_jax.weights.open_component import LoadedComponent

T = TypeVar("T")

_IMAGES = 4  # image prompts of the sample grid
_COLUMNS = 2  # images for each
_LEAST_SIDE = 192  # of an image in the grid, in pixels: labels need room


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


class SampleGrid:
    """Samples of fixed image prompts, the first images of the validation batch. All processes call its methods
    together."""

    def __init__(self, log: Log, mesh: Mesh, loaded: LoadedNetworks, batch: EncodedBatch, zero_features: Array | None):
        """`zero_features`: what a dropped image is, None for zeros."""
        self._log, self._mesh, self._loaded = log, mesh, loaded
        self._prompts = image_prompts(mesh, loaded, batch, zero_features)
        scores = log.clip is not None and jax.process_index() == 0
        self._scorer = open_scorer(str(log.clip)).load() if scores else None

    def draw(self, trainable: Partitioned, step: int) -> Grid:
        """A row for every image prompt: the reference and images of fixed seeds, without text, labeled; and by name
        what the scoring CLIP says of them. For process 0, which samples on its own devices; nothing for the others."""
        local, loaded = local_mesh(), self._loaded
        params = combine(trainable, loaded.frozen.params)
        params |= {name: loaded.frozen.params[name] for name in ("vae", *loaded.base.tokenizers)}
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


def image_prompts(mesh: Mesh, loaded: LoadedNetworks, batch: EncodedBatch, zero_features: Array | None) -> ImagePrompts:
    """The first samples of a batch as image prompts. All processes call this together."""
    vae = loaded.networks.vae

    def first_samples(params: Params, batch: EncodedBatch) -> _GridInputs:
        batch = jax.tree.map(lambda x: x[:_IMAGES], batch)
        posterior = Posterior(batch.mean, batch.logvar)
        decoded: PyTree = vae.apply({"params": params}, vae.sample(posterior, 0.0), method=VAE.decode)
        return _GridInputs(decoded, batch.input_ids, batch.features)

    decoded, input_ids, positive = jax.tree.map(
        lambda x: np.asarray(x.addressable_data(0)),
        jax.jit(first_samples, out_shardings=replicated(mesh))(loaded.frozen.params["vae"], batch),
    )
    references = [Image.fromarray(image) for image in to_uint8(denormalize(decoded))]
    if positive is None:
        return ImagePrompts(references, input_ids, None)
    negative = np.zeros_like(positive)
    if zero_features is not None:
        negative[:] = np.asarray(zero_features.addressable_data(0))
    return ImagePrompts(references, input_ids, np.stack([negative, positive]))


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
        text=TextConditioner(networks.text_encoders, loaded.base.tokenizers),
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
