"""An adapter attached to a pipeline: its projection, its keys and values, and the image encoder that feeds it."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.images.preprocess import FITS, clip_pixel_values, load_image, square_tiles
from ipadapter_jax.inputs.validation import Uncond, to_float32
from ipadapter_jax.models.image_projections import Projection, image_projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.unet import KeyValue
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.pipelines import sampling
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.weights.hub import check_revision, path_here
from ipadapter_jax.weights.image_embeds import load_image_embeds
from ipadapter_jax.weights.image_encoder import open_image_encoder
from ipadapter_jax.weights.ip_adapter_file import (
    CheckedAdapter,
    IPAdapterFile,
    adapter_file,
    check_base,
    check_encoder,
    check_ip_adapter,
    open_ip_adapter,
)
from ipadapter_jax.weights.load_tree import Tree
from ipadapter_jax.weights.open_component import LazyComponent, LoadedComponent

ImageLike = Any
"""A path, a PIL image, or an array of numpy, jax or torch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Images of one image prompt as the image encoder sees them, (n, side, side, 3)."""

    pixels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One IP-Adapter with its image encoder, weights included; without an encoder it takes embeddings alone."""

    projection: Projection
    keys: IPAdapter
    params: dict[str, Tree]
    loaded_encoder: LoadedComponent | None
    source: Path

    def keys_values(self, features: Array, weight: np.ndarray) -> list[KeyValue]:
        """Features (Q, G, n, ...), weights of the images (Q or 1, n) -> per site keys and values (Q, G, n N, C)."""
        return sampling.image_keys_values(self.projection, self.keys, self.params, features, weight)

    def from_images(
        self,
        prompts: Sequence[Sequence[ImageLike] | Prepared],
        fit: str,
        guided: bool,
        negative: Sequence[ImageLike] | None = None,
        uncond: Uncond = "default",
    ) -> tuple[Callable[[], Array], int]:
        """Reads the images of Q prompts now and returns what encodes them, (Q, G, n, ...), without guidance G = 1;
        and n, the images of a prompt."""
        encoder, patches = self.encoder, self.projection.config.uses_patches
        side = encoder.module.config.image_size
        pixels = [_pixels(prompt, side, fit) for prompt in prompts]
        count = len(pixels[0])
        if any(len(prompt) != count for prompt in pixels):
            raise InputError(
                f"{argument('ip_adapter_image')}: all image prompts of one call must have the same number of images"
            )
        dark = None if negative is None else _pixels(negative, side, "crop" if fit == "tile" else fit)
        if dark is not None and len(dark) not in (1, count):
            raise InputError(
                f"{argument('negative_ip_adapter_image')} has {len(dark)} images for {count}; give one, or one for each"
            )
        uncond = _known_uncond(uncond)

        def encode(pixels: np.ndarray) -> Array:
            return sampling.encode_image(encoder.module, patches, encoder.params, pixels)

        def features() -> Array:
            rows = encode(np.concatenate(pixels))
            positive = rows.reshape(len(pixels), count, *rows.shape[1:])
            if not guided:
                return positive[:, None]
            unlike = self._negative(uncond, positive[0]) if dark is None else encode(dark)
            return jnp.stack([jnp.broadcast_to(unlike, positive.shape), positive], axis=1)

        return features, count

    def prepare(self, images: Sequence[ImageLike], fit: str) -> Prepared:
        """Reads images once, for a prompt that is used again or later. Raises InputError naming what cannot be."""
        return Prepared(_pixels(images, self.encoder.module.config.image_size, fit))

    def from_embeds(self, embeds: Any, guided: bool, uncond: Uncond = "default") -> tuple[Callable[[], Array], int]:
        """Features (G, n, F) or, for plus and full, (G, n, L, F), or a file of them, as `from_images` returns them.
        Those of the positive branch alone get the negative one that `uncond` says.

        Raises InputError naming the right shape.
        """
        config, name = self.projection.config, "ip_adapter_image_embeds"
        if isinstance(embeds, str | os.PathLike):
            name = str(embeds)
            found = load_image_embeds(Path(expand_home(os.fspath(embeds))), patches=config.uses_patches)
            if len(found) != 1:
                raise InputError(
                    f"{argument(name)} holds embeddings for {len(found)} adapters; give each adapter its own"
                )
            embeds = found[0].features
        array, branches = to_float32(embeds, name, self.projection.dtype), 2 if guided else 1
        axes = 4 if config.uses_patches else 3
        shape = array.shape
        if len(shape) != axes or shape[-1] != config.feature_dim or shape[0] not in (1, 2) or 0 in shape:
            positions = "positions, " if config.uses_patches else ""
            raise InputError(
                f"{argument(name)} of shape {shape}: this adapter needs ({branches}, images, "
                f"{positions}{config.feature_dim}), "
                "the negative branch first"
            )

        known = self.loaded_encoder
        if config.uses_patches and known is not None and shape[2] != known.module.config.num_positions:
            raise InputError(
                f"{argument(name)} of shape {shape}: this adapter's image encoder has "
                f"{known.module.config.num_positions} "
                "positions; these are of another encoder, or projected already"
            )

        def features() -> Array:
            positive = jnp.asarray(array[-1:])
            if not guided:
                return positive[None]
            negative = jnp.asarray(array[:1]) if len(array) == 2 else self._negative(uncond, positive)
            return jnp.concatenate([jnp.broadcast_to(negative, positive.shape), positive])[None]

        if len(array) == 2 and uncond != "default":
            raise InputError(
                f"{argument('ip_adapter_uncond', repr(uncond))}: {argument(name)} hold the negative branch already"
            )
        uncond = _known_uncond(uncond)
        if guided and len(array) == 1 and uncond != "zeros" and (config.uses_patches or uncond != "default"):
            _ = self.encoder  # which makes the negative branch
        return features, array.shape[1]

    def _negative(self, uncond: Uncond, like: Array) -> Array:
        """What `uncond` says in place of features (..., n, F) or (..., n, L, F): the same for every image."""
        patches = self.projection.config.uses_patches
        if uncond == "zeros" or (uncond == "default" and not patches):
            return jnp.zeros_like(like)
        encoder = self.encoder
        side = encoder.module.config.image_size
        painted = np.zeros((side, side, 3), np.uint8)  # black
        if uncond == "noise":
            painted = np.random.default_rng(0).integers(0, 256, painted.shape, np.uint8)
        pixels = clip_pixel_values([Image.fromarray(painted)], side)
        if uncond in ("default", "zero-pixels"):
            pixels = np.zeros_like(pixels)
        return sampling.encode_image(encoder.module, patches, encoder.params, pixels)

    @property
    def encoder(self) -> LoadedComponent:
        """Its image encoder. Raises InputError when it was opened without."""
        if self.loaded_encoder is None:
            raise InputError(
                f"adapter {self.source}: it was opened without an image encoder and takes embeddings of both branches "
                f"alone; name the encoder with {argument('image_encoder')}"
            )
        return self.loaded_encoder


def _known_uncond(uncond: str) -> Uncond:
    """The choice in its present spelling. Raises InputError for what is not a choice."""
    if uncond == "zero pixels":  # in older releases
        return "zero-pixels"
    for known in get_args(Uncond):
        if uncond == known:
            return known
    raise InputError(f"{argument('ip_adapter_uncond')} {uncond!r} is not known; choose {', '.join(get_args(Uncond))}")


def _pixels(images: Sequence[ImageLike] | Prepared, side: int, fit: str) -> np.ndarray:
    """Images -> what the encoder sees of them (n, side, side, 3), with fit "tile" several squares of each."""
    if isinstance(images, Prepared):
        return images.pixels
    if fit not in (*FITS, "tile"):
        raise InputError(f"{argument('fit', repr(fit))}: choose {', '.join(FITS)} or tile")
    loaded = [load_image(image) for image in images]
    if not loaded:
        raise InputError("an image prompt is an empty list; give at least one image")
    if fit == "tile":
        return clip_pixel_values([tile for image in loaded for tile in square_tiles(image)], side)
    return clip_pixel_values(loaded, side, fit)


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedAdapter:
    """An adapter file and its image encoder, which fit a UNet with cross-attentions of these widths; still unread."""

    file: IPAdapterFile
    weights: CheckedAdapter
    encoder: LazyComponent | None
    widths: tuple[int, ...]

    def load(self, dtype: Any, put: Callable, attached: Sequence[Adapter]) -> Adapter:
        """Reads both; the encoder is shared with an `attached` adapter that uses the same one."""
        params = self.weights.load(np.dtype(dtype), put)
        encoder = None
        if self.encoder is not None:
            others = [adapter.loaded_encoder for adapter in attached if adapter.loaded_encoder is not None]
            shared = [encoder for encoder in others if encoder.source == self.encoder.source]
            encoder = shared[0] if shared else self.encoder.load(np.dtype(dtype), put)
        keys = IPAdapter(self.widths, dtype)
        return Adapter(image_projection(self.file.config, dtype), keys, params, encoder, self.file.path)


def open_adapter(
    path: str | os.PathLike,
    image_encoder: str | os.PathLike | Literal[False] | None,
    unet: UNetConfig,
    revision: str | None = None,
) -> OpenedAdapter:
    """Opens an adapter for this UNet and the image encoder that feeds it, by default the one beside the adapter; False
    leaves it out, for embeddings.

    Raises WeightFileError or InputError when the three do not fit, naming what is needed.
    """
    if not image_encoder or path_here(image_encoder, "image encoder") is not None:
        check_revision(path, revision, "adapter")  # else it may be meant for the encoder
    local = adapter_file(path, revision)
    file = open_ip_adapter(local)
    widths = tuple(site.width for site in cross_attention_layers(unet))
    check_base(file, unet.cross_attention_dim, widths)
    weights = check_ip_adapter(file, widths)
    if image_encoder is False:
        return OpenedAdapter(file, weights, None, widths)
    encoder = open_image_encoder(_encoder_beside(path, local) if image_encoder is None else image_encoder, revision)
    check_encoder(file, encoder.config.projection_dim, encoder.config.hidden_size, str(encoder.source))
    return OpenedAdapter(file, weights, encoder, widths)


def _encoder_beside(path: str | os.PathLike, local: Path) -> str | os.PathLike:
    here = path_here(path, "adapter") is not None  # else on the Hub, whose cache may hold half a download
    beside = (local if here else PurePosixPath(str(path))).parent / "image_encoder"
    if here and not os.path.isdir(beside):
        raise InputError(
            f"adapter {path}: there is no folder image_encoder beside it; name the encoder with "
            f"{argument('image_encoder')}"
        )
    return beside
