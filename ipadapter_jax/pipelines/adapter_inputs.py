"""What an adapter takes, read and checked from its configuration alone: images or features of its image prompts."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import DTypeLike

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.arrays import AnyArray
from ipadapter_jax.inputs.validation import Uncond, to_float32
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.pipelines.feature_encoder import FeatureInputs, ImageLike, PreparedImages
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.weights.image_embeds import load_image_embeds

GivenEmbeds = AnyArray | Sequence[object] | str | os.PathLike[str]
"""Image features of one adapter as a caller gives them: an array, nested lists of numbers, or a file."""


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedFeatures:
    """The image prompts of one adapter before its encoder runs: Q prompts of `count` images each.

    positive: prepared images (Q, n, ...), or with `encoded` their features. negative: the same (1 or n, ...) for the
    unconditional branch, None for zero features. `negative_encoded` says whether these are features. guided: whether
    there is an unconditional branch.
    """

    positive: np.ndarray
    negative: np.ndarray | None
    guided: bool
    encoded: bool
    negative_encoded: bool

    @property
    def count(self) -> int:
        return self.positive.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterInputs:
    """The configuration of an adapter and of its encoder: without one it takes features alone."""

    projection: ImageProjConfig
    encoder_inputs: FeatureInputs | None
    dtype: DTypeLike
    source: Path

    @property
    def encoder(self) -> FeatureInputs:
        """What its encoder takes. Raises InputError when it was opened without one."""
        if self.encoder_inputs is None:
            raise InputError(
                f"adapter {self.source}: it was opened without an image encoder and takes embeddings of both branches "
                f"alone; name the encoder with {argument('image_encoder')}"
            )
        return self.encoder_inputs

    def prepare(self, images: Sequence[ImageLike], fit: str) -> PreparedImages:
        """Reads images once, for a prompt that is used again or later. Raises InputError naming what cannot be read."""
        return self.encoder.prepare(images, fit)

    def prepare_negative(self, images: Sequence[ImageLike], fit: str) -> PreparedImages:
        """Reads negative images, whole where those of the prompt are tiled. Raises InputError as `prepare`."""
        return self.encoder.prepare(images, "crop" if fit == "tile" else fit)

    def from_images(
        self,
        prompts: Sequence[Sequence[ImageLike] | PreparedImages],
        fit: str,
        guided: bool,
        negative: Sequence[ImageLike] | PreparedImages | None = None,
        uncond: Uncond = "default",
    ) -> PlannedFeatures:
        """The images of Q prompts, read now. Raises InputError naming what cannot be used."""
        encoder = self.encoder
        pixels = [(p if isinstance(p, PreparedImages) else encoder.prepare(p, fit)).pixels for p in prompts]
        count = len(pixels[0])
        if any(len(prompt) != count for prompt in pixels):
            raise InputError(
                f"{argument('ip_adapter_image')}: all image prompts of one call must have the same number of images"
            )
        if negative is not None and not isinstance(negative, PreparedImages):
            negative = self.prepare_negative(negative, fit)
        unlike = None if negative is None else negative.pixels
        if unlike is not None and len(unlike) not in (1, count):
            raise InputError(
                f"{argument('negative_ip_adapter_image')} has {len(unlike)} images for {count}; give one, or one for "
                "each"
            )
        uncond = known_uncond(uncond)
        if guided and unlike is None:
            unlike = self._unconditional(uncond)
        return PlannedFeatures(np.stack(pixels), unlike, guided, encoded=False, negative_encoded=False)

    def from_embeds(self, embeds: GivenEmbeds, guided: bool, uncond: Uncond = "default") -> PlannedFeatures:
        """Features (G, n, F), or (G, n, L, F) for kinds that have positions, or a file of them. Those of the positive
        branch alone get the negative one that `uncond` says. Raises InputError naming the right shape."""
        kind, name = self.projection.feature_kind, "ip_adapter_image_embeds"
        if isinstance(embeds, str | os.PathLike):
            name = str(embeds)
            found = load_image_embeds(Path(expand_home(os.fspath(embeds))), patches=kind.has_positions)
            if len(found) != 1:
                raise InputError(
                    f"{argument(name)} holds embeddings for {len(found)} adapters; give each adapter its own"
                )
            embeds = found[0].features
        array = to_float32(embeds, name, self.dtype)
        self._check_shape(array.shape, name, 2 if guided else 1)
        both = len(array) == 2
        if both and uncond != "default":
            raise InputError(
                f"{argument('ip_adapter_uncond', repr(uncond))}: {argument(name)} hold the negative branch already"
            )
        uncond = known_uncond(uncond)
        negative = array[0] if both else None
        if guided and not both and uncond != "zeros" and (kind.has_positions or uncond != "default"):
            negative = self._unconditional(uncond)
        return PlannedFeatures(array[-1:], negative, guided, encoded=True, negative_encoded=both)

    def _check_shape(self, shape: tuple[int, ...], name: str, branches: int) -> None:
        config, has_positions = self.projection, self.projection.feature_kind.has_positions
        axes = 4 if has_positions else 3
        if len(shape) != axes or shape[-1] != config.feature_dim or shape[0] not in (1, 2) or 0 in shape:
            positions = "positions, " if has_positions else ""
            raise InputError(
                f"{argument(name)} of shape {shape}: this adapter needs ({branches}, images, "
                f"{positions}{config.feature_dim}), "
                "the negative branch first"
            )
        known = None if self.encoder_inputs is None else self.encoder_inputs.positions
        if has_positions and known is not None and shape[2] != known:
            raise InputError(
                f"{argument(name)} of shape {shape}: this adapter's image encoder has {known} positions; these are of "
                "another encoder, or projected already"
            )

    def _unconditional(self, uncond: Uncond) -> np.ndarray | None:
        images = self.encoder.unconditional(uncond)
        return None if images is None else images.pixels


def known_uncond(uncond: str) -> Uncond:
    """The choice in its present spelling. Raises InputError for what is not a choice."""
    if uncond == "zero pixels":  # in older releases
        return "zero-pixels"
    for known in get_args(Uncond):
        if uncond == known:
            return known
    raise InputError(f"{argument('ip_adapter_uncond')} {uncond!r} is not known; choose {', '.join(get_args(Uncond))}")
