"""The networks of a run: the frozen ones with their weights on the mesh, and the adapter's, which is trainable."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError
from ipadapter_jax.models import forward
from ipadapter_jax.models.clip import CLIPVision, clip_features
from ipadapter_jax.models.clip_config import CLIPVisionConfig
from ipadapter_jax.models.image_projections import Projection, image_projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.text_encoders import TextEncoders
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import cross_attention_layers
from ipadapter_jax.models.vae import VAE, Posterior, normalize
from ipadapter_jax.runtime.mesh import replicated
from ipadapter_jax.runtime.trees import Params
from ipadapter_jax.train.batches import FrozenModels
from ipadapter_jax.train.config import Train
from ipadapter_jax.train.init import init_adapter, load_adapter_params, projection_config
from ipadapter_jax.train.optim import trainable_mask
from ipadapter_jax.train.sharding import frozen_sharding, put_global
from ipadapter_jax.weights.base_model import BaseModel, check_one_text_encoder, check_text_to_image
from ipadapter_jax.weights.image_encoder import open_image_encoder
from ipadapter_jax.weights.ip_adapter_file import adapter_file, check_base, open_ip_adapter
from ipadapter_jax.weights.load_tree import Tree
from ipadapter_jax.weights.open_base_model import open_base_folder
from ipadapter_jax.weights.tokenizer import Tokenizer, tokenize


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Networks:
    """The modules that a training step applies, without their weights."""

    unet: UNet
    vae: VAE
    text_encoders: TextEncoders
    schedule: NoiseSchedule
    latent_shape: tuple[int, int, int]  # (h, w, C)
    image_encoder: CLIPVision | None = None
    projection: Projection | None = None
    adapter: IPAdapter | None = None

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Channels of one attention head, of every size that there is in UNet and image encoder."""
        vision = [] if self.image_encoder is None else [self.image_encoder.config]
        return *self.unet.config.head_dims, *(config.hidden_size // config.num_attention_heads for config in vision)

    def posterior(self, frozen: FrozenModels, pixels: Array) -> Posterior:
        """pixels (B, H, W, 3) uint8 -> the unscaled posterior of their latents (B, h, w, C)."""
        return forward.apply(self.vae, frozen.params["vae"], normalize(pixels), method=VAE.posterior)

    def text_states(self, frozen: FrozenModels, ids: Array) -> Array:
        """Token ids (B, S) of the first text encoder -> (B, S, D)."""
        return self.text_encoders(frozen.params, {self.text_encoders.first.role.part: ids}).states

    def image_features(self, frozen: FrozenModels, pixels: Array) -> Array:
        """Normalized pixels (B, S, S, 3) -> what the projection reads: (B, F), or for patches (B, L, F)."""
        assert self.projection is not None and self.image_encoder is not None
        output = forward.apply(self.image_encoder, frozen.params["image_encoder"], pixels)
        return clip_features(output, self.projection.config.feature_kind)

    def predict(
        self, params: Mapping[str, Params], noisy: Array, timestep: Array, text: Array, features: Array | None
    ) -> Array:
        """The UNet's output (B, h, w, C) float32 with the image prompt at weight 1."""
        text_kv = forward.text_keys_values(self.unet, params["unet"], text)
        context = forward.UNetContext(text_kv)
        if features is not None and self.projection is not None and self.adapter is not None:
            image_kv, _ = forward.image_keys_values(self.projection, self.adapter, params, features, len(features))
            context = forward.UNetContext(text_kv, [image_kv], [[1.0] * len(image_kv)])
        shifts = forward.time_shifts(self.unet, params["unet"], timestep)
        return forward.unet_output(self.unet, params["unet"], noisy, shifts, context)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoadedNetworks:
    """Networks, their frozen weights, the initial weights of the trainable parts, and the files that all came from."""

    networks: Networks
    frozen: FrozenModels
    params: dict[str, Tree]
    tokenizer: Tokenizer
    sources: dict[str, Path]
    base: BaseModel


@dataclasses.dataclass(frozen=True)
class PrecomputedEncoder:
    """What training from precomputed features needs to know of the encoder that made them."""

    encoder: CLIPVisionConfig
    zero_features: np.ndarray | None  # of a zero image, where the variant reads patches


def load_networks(config: Train, mesh: Mesh, encoded: PrecomputedEncoder | None) -> LoadedNetworks:
    """Reads all weights, each onto its place on the mesh. With precomputed features the image encoder is not read.

    Raises InputError and WeightFileError as the readers do.
    """
    model, mask = config.model, trainable_mask(config.model)
    compute, opened = jnp.dtype(model.dtype), open_base_folder(model.base, model.variant)
    opened.check()
    unet_config = opened.config("unet")
    check_text_to_image(model.base, unet_config)
    check_one_text_encoder("base model", model.base, opened.family)
    if model.init_from is not None:  # before gigabytes are read
        widths = tuple(site.width for site in cross_attention_layers(unet_config))
        check_base(open_ip_adapter(adapter_file(model.init_from)), unet_config.cross_attention_dim, widths)
    parts, tokenizer, schedule = {}, opened.tokenizer, opened.schedule
    for name in opened.components:
        dtype = np.dtype(np.float32) if mask.get(name) else compute
        parts[name] = opened.part(name).load(dtype, functools.partial(_onto, mesh))
    unet = UNet(parts["unet"].module.config, compute, remat=model.remat == "always")
    side = latent_side(config.data.resolution, parts["vae"].module.config.downscale, unet.config.levels)
    networks = Networks(
        unet=unet,
        vae=parts["vae"].module,
        text_encoders=TextEncoders.of(opened.family, {part: parts[part].module for part in opened.tokenizers}),
        schedule=schedule,
        latent_shape=(side, side, unet.config.in_channels),
    )
    length = networks.text_encoders.first.network.config.max_position_embeddings
    frozen = FrozenModels(
        empty_ids=put_global(tokenize(tokenizer, [""], length)[0], replicated(mesh)),
        params={name: part.params for name, part in parts.items() if not mask.get(name)},
    )
    params = {"unet": parts["unet"].params} if mask["unet"] else {}
    sources = {name: part.source for name, part in parts.items()}
    base = LoadedNetworks(networks, frozen, params, tokenizer, sources, opened)
    return base if model.adapter == "none" else _with_adapter(base, config, mesh, encoded)


def _with_adapter(
    base: LoadedNetworks, config: Train, mesh: Mesh, encoded: PrecomputedEncoder | None
) -> LoadedNetworks:
    """The image encoder, unless its features are given, and the adapter's networks and initial weights."""
    model, unet, compute = config.model, base.networks.unet, jnp.dtype(config.model.dtype)
    frozen, sources, zero_features = dict(base.frozen.params), dict(base.sources), None
    if encoded is None:
        loaded = open_image_encoder(model.image_encoder).load(compute, functools.partial(_onto, mesh))
        vision, frozen["image_encoder"] = loaded.module.config, loaded.params
        sources["image_encoder"] = loaded.source
    else:
        vision = encoded.encoder
        if encoded.zero_features is not None:
            zero_features = put_global(encoded.zero_features, replicated(mesh))
    projection = projection_config(
        model.adapter,
        vision,
        unet.config.cross_attention_dim,
        num_tokens=model.num_tokens,
        depth=model.resampler_depth,
        heads=model.resampler_heads,
    )
    widths = tuple(site.width for site in cross_attention_layers(unet.config))
    unet_params = base.params.get("unet", base.frozen.params.get("unet"))
    if model.init_from is None:  # compiled, as no process alone may hold all of a UNet that is split
        initial = functools.partial(init_adapter, unet_config=unet.config, projection=projection, seed=config.seed)
        adapter = jax.jit(initial, out_shardings=replicated(mesh))(unet_params)
    else:
        loaded = load_adapter_params(adapter_file(model.init_from), unet.config, projection)
        adapter = jax.tree.map(lambda x: put_global(x, replicated(mesh)), loaded)
    mask, params = trainable_mask(model), dict(base.params)
    params |= {part: tree for part, tree in adapter.items() if mask[part]}
    rest = {part: tree for part, tree in adapter.items() if not mask[part]}
    frozen |= jax.tree.map(lambda x: x.astype(compute), rest)
    networks = dataclasses.replace(
        base.networks,
        image_encoder=CLIPVision(vision, compute),
        projection=image_projection(projection, compute),
        adapter=IPAdapter(widths, compute),
    )
    models = FrozenModels(base.frozen.empty_ids, frozen, zero_features)
    return LoadedNetworks(networks, models, params, base.tokenizer, sources, base.base)


def latent_side(resolution: int, downscale: int, levels: int) -> int:
    """Side of the latents. Raises InputError for a resolution that VAE and UNet cannot halve evenly."""
    step = downscale * 2 ** (levels - 1)
    if resolution % step:
        raise InputError(f"--data.resolution {resolution} must be a multiple of {step} for this model")
    return resolution // downscale


def _onto(mesh: Mesh, array: np.ndarray) -> Array:
    return put_global(array, frozen_sharding(mesh, array))
