"""An adapter attached to a pipeline: its projection, its keys and values, and the image encoder that feeds it."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from jax import Array
from PIL import Image

from ipadapter_jax import sampling
from ipadapter_jax.arguments import as_floats
from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.models.adapter import IPAdapter
from ipadapter_jax.models.clip import CLIPVision, CLIPVisionConfig
from ipadapter_jax.models.projections import Projection, image_projection
from ipadapter_jax.models.unet import KeyValue, UNetConfig, cross_attention_sites
from ipadapter_jax.preprocess import clip_pixel_values, load_image
from ipadapter_jax.weights.components import (
    IMAGE_ENCODER,
    Loaded,
    Opened,
    blueprint_of,
    choose_files,
    choose_weights,
    open_component,
    open_weights,
)
from ipadapter_jax.weights.hub import local_path, path_here
from ipadapter_jax.weights.ip_adapter_file import (
    IPAdapterFile,
    check_base,
    check_encoder,
    check_ip_adapter,
    load_ip_adapter,
    open_ip_adapter,
)
from ipadapter_jax.weights.kinds import OPENCLIP, identify
from ipadapter_jax.weights.openclip import to_transformers, vision_settings
from ipadapter_jax.weights.tensors import open_tensors
from ipadapter_jax.weights.tree import Tree

Picture = str | os.PathLike | Image.Image | np.ndarray
ImagePrompt = Picture | Sequence[Picture]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One IP-Adapter with its image encoder, weights included."""

    projection: Projection
    keys: IPAdapter
    params: dict[str, Tree]
    encoder: Loaded
    source: Path

    def keys_values(self, features: Array) -> list[KeyValue]:
        """Features (G, n, ...) -> per site keys and values (G, n N, C)."""
        return sampling.image_keys_values(self.projection, self.keys, self.params, features)

    def from_images(self, prompt: ImagePrompt, fit: str, guided: bool) -> Callable[[], Array]:
        """Reads the pictures now and returns what encodes them: (G, n, ...), without guidance G = 1.

        The negative branch is what the adapters were trained with: base ones see zero embeddings, plus and full ones
        the states of zero pixels.
        """
        given: Sequence[Any] = prompt if isinstance(prompt, list | tuple) else [prompt]
        pictures = [load_image(picture) for picture in given]
        if not pictures:
            raise InputError("ip_adapter_image is an empty list; give at least one picture")
        config: CLIPVisionConfig = self.encoder.module.config
        pixels = clip_pixel_values(pictures, config.image_size, fit)
        patches = self.projection.config.uses_patches

        def encode(pixels: np.ndarray) -> Array:
            return sampling.encode_image(self.encoder.module, patches, self.encoder.params, pixels)

        def features() -> Array:
            positive = encode(pixels)
            if not guided:
                return positive[None]
            negative = encode(np.zeros_like(pixels)) if patches else np.zeros_like(positive)
            return jax.numpy.stack([negative, positive])

        return features

    def from_embeds(self, embeds: Any, guided: bool) -> Callable[[], Array]:
        """Checks features (G, n, F) or, for plus and full, (G, n, L, F). Raises InputError naming the right shape."""
        config, vision = self.projection.config, self.encoder.module.config
        array, branches = as_floats(embeds, "ip_adapter_image_embeds"), 2 if guided else 1
        rest = (vision.num_positions, config.feature_dim) if config.uses_patches else (config.feature_dim,)
        if array.ndim != 2 + len(rest) or array.shape[0] != branches or array.shape[2:] != rest or not array.shape[1]:
            raise InputError(
                f"ip_adapter_image_embeds have shape {array.shape}, this adapter needs ({branches}, pictures, "
                f"{', '.join(map(str, rest))}) at this guidance_scale, the negative branch first"
            )
        return lambda: jax.numpy.asarray(array)


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedAdapter:
    """An adapter file and its image encoder, which fit a UNet with cross-attentions of these widths; still unread."""

    file: IPAdapterFile
    encoder: Opened
    widths: tuple[int, ...]

    def load(self, dtype: Any, put: Callable, attached: Sequence[Adapter]) -> Adapter:
        """Reads both; the encoder is shared with an `attached` adapter that uses the same one."""
        params = load_ip_adapter(self.file, self.widths, np.dtype(dtype), put)
        shared = [adapter.encoder for adapter in attached if adapter.encoder.source == self.encoder.source]
        encoder = shared[0] if shared else self.encoder.load(np.dtype(dtype), put)
        assert isinstance(encoder.module, CLIPVision)
        keys = IPAdapter(self.widths, dtype)
        return Adapter(image_projection(self.file.config, dtype), keys, params, encoder, self.file.path)


def open_adapter(
    path: str | os.PathLike, image_encoder: str | os.PathLike | None, unet: UNetConfig, revision: str | None = None
) -> OpenedAdapter:
    """Opens an adapter for this UNet and the image encoder that feeds it, by default the one beside the adapter.

    Raises WeightFileError or InputError when the three do not fit, naming what is needed.
    """
    local = adapter_file(path, revision)
    file = open_ip_adapter(local)
    widths = tuple(site.width for site in cross_attention_sites(unet))
    check_base(file, unet.cross_attention_dim, widths)
    check_ip_adapter(file, widths)
    encoder = open_image_encoder(_encoder_beside(path, local) if image_encoder is None else image_encoder, revision)
    check_encoder(file, encoder.config.projection_dim, encoder.config.hidden_size, str(encoder.source))
    return OpenedAdapter(file, encoder, widths)


def adapter_file(path: str | os.PathLike, revision: str | None = None) -> Path:
    """Where an adapter file lies on this machine, downloaded if need be. Raises InputError naming it."""
    local = local_path(path, _refuse_folder, what="adapter", revision=revision)
    if local.is_dir():
        _refuse_folder([name.name for name in local.iterdir()])
    return local


def _encoder_beside(path: str | os.PathLike, local: Path) -> str | os.PathLike:
    here = path_here(path, "adapter") is not None  # else on the Hub, whose cache may hold half a download
    beside = (local if here else PurePosixPath(str(path))).parent / "image_encoder"
    if here and not os.path.isdir(beside):
        raise InputError(
            f"adapter {path}: there is no folder image_encoder beside it; name the encoder with image_encoder"
        )
    return beside


def open_image_encoder(image_encoder: str | os.PathLike, revision: str | None = None) -> Opened:
    """Opens a CLIP vision model: a folder (config.json beside the weights), one file in transformers' or OpenCLIP's
    layout, or a Hub place of either. Raises InputError naming what is wrong."""

    def choose(names: Sequence[str]) -> Sequence[str]:
        return choose_files(names, {"": IMAGE_ENCODER}, ("open_clip_config.json",), None)

    place = local_path(image_encoder, choose, what="image encoder", revision=revision)
    if place.is_dir() and (place / "config.json").is_file():
        return open_component(IMAGE_ENCODER, place)
    if place.is_dir():
        place = place / choose_weights(IMAGE_ENCODER, [file.name for file in place.iterdir()], str(place), None)
    tensors = open_tensors(place)
    kind = identify(tensors)
    if kind.name not in (OPENCLIP, IMAGE_ENCODER.kind):
        raise WeightFileError(f"image encoder {place}: this is {kind}, not a CLIP image encoder; {kind.advice}")
    settings = vision_settings(place, to_transformers(tensors))
    return open_weights(blueprint_of(IMAGE_ENCODER, settings, place), tensors, place)


def _refuse_folder(names: Sequence[str]) -> Sequence[str]:
    files = ", ".join(name for name in names if name.endswith((".safetensors", ".bin"))) or "none"
    raise InputError(f"the adapter is a folder; name one of its files ({files})")
