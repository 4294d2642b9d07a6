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
from ipadapter_jax.errors import InputError
from ipadapter_jax.models.adapter import IPAdapter
from ipadapter_jax.models.clip import CLIPVision, CLIPVisionConfig
from ipadapter_jax.models.projections import Projection, image_projection
from ipadapter_jax.models.unet import KeyValue, UNet, cross_attention_sites
from ipadapter_jax.preprocess import clip_pixel_values, load_image
from ipadapter_jax.weights.components import IMAGE_ENCODER, Loaded, choose_files, load_component, read_config
from ipadapter_jax.weights.hub import local_path, path_here
from ipadapter_jax.weights.ip_adapter_file import check_base, check_encoder, load_ip_adapter, open_ip_adapter
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


def load_adapter(
    path: str | os.PathLike,
    image_encoder: str | os.PathLike | None,
    unet: UNet,
    put: Callable,
    revision: str | None,
    attached: Sequence[Adapter],
) -> Adapter:
    """Reads an adapter for `unet` and its encoder (shared with an `attached` adapter that uses the same one)."""
    local = adapter_file(path, revision)
    file = open_ip_adapter(local)
    widths = tuple(site.width for site in cross_attention_sites(unet.config))
    check_base(file, unet.config.cross_attention_dim, widths)
    folder = encoder_folder(_encoder_beside(path, local) if image_encoder is None else image_encoder, revision)
    vision = read_config(IMAGE_ENCODER, folder / "config.json")
    check_encoder(file, vision.projection_dim, vision.hidden_size, str(folder))
    dtype = np.dtype(unet.dtype)
    params = load_ip_adapter(file, widths, dtype, put)
    shared = [a.encoder for a in attached if a.encoder.source.parent == folder]
    encoder = shared[0] if shared else load_component(IMAGE_ENCODER, folder, dtype, put=put)
    assert isinstance(encoder.module, CLIPVision)
    return Adapter(image_projection(file.config, dtype), IPAdapter(widths, dtype), params, encoder, local)


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


def encoder_folder(image_encoder: str | os.PathLike, revision: str | None = None) -> Path:
    """Where an image encoder lies on this machine, downloaded if need be. Raises InputError naming it."""

    def choose(names: Sequence[str]) -> Sequence[str]:
        return choose_files(names, {"": IMAGE_ENCODER}, (), None)

    folder = local_path(image_encoder, choose, what="image encoder", revision=revision)
    if not folder.is_dir():
        raise InputError(
            f"image encoder {image_encoder}: give its folder (config.json and model.safetensors), not a file"
        )
    return folder


def _refuse_folder(names: Sequence[str]) -> Sequence[str]:
    files = ", ".join(name for name in names if name.endswith((".safetensors", ".bin"))) or "none"
    raise InputError(f"the adapter is a folder; name one of its files ({files})")
