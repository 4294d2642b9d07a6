"""Features of image prompts: how images become what an adapter's projection reads.

`FeatureInputs` reads and checks images from a configuration alone; `FeatureEncoder` has the weights too. Both are
interfaces, of which the classes for CLIP's vision model are one implementation. Features that are given need neither.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jax import Array
from PIL import Image

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.images.preprocess import FITS, clip_pixel_values, load_image, square_tiles
from ipadapter_jax.inputs.arrays import AnyArray
from ipadapter_jax.inputs.validation import Uncond
from ipadapter_jax.models.clip_config import CLIPVisionConfig
from ipadapter_jax.models.image_features import FeatureKind
from ipadapter_jax.pipelines import programs
from ipadapter_jax.weights.open_component import LoadedComponent

ImageLike = str | os.PathLike[str] | Image.Image | AnyArray
"""An image as a caller gives it: a path, an https URL, a PIL image, or an array of numpy, jax or torch."""


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedImages:
    """Images of one image prompt as a feature encoder takes them: n in the leading axis."""

    pixels: np.ndarray


class FeatureInputs(Protocol):
    """What a feature encoder takes, known without its weights."""

    @property
    def kind(self) -> FeatureKind: ...

    @property
    def positions(self) -> int | None:
        """Of one image's features, where the kind has positions."""
        ...

    def prepare(self, images: Sequence[ImageLike], fit: str) -> PreparedImages:
        """Reads images. Raises InputError naming what cannot be read or used."""
        ...

    def unconditional(self, uncond: Uncond) -> PreparedImages | None:
        """What the unconditional branch sees in place of images; None for zero features."""
        ...


class FeatureEncoder(Protocol):
    """Makes features of images."""

    @property
    def inputs(self) -> FeatureInputs: ...

    @property
    def source(self) -> Path:
        """The file of its weights."""
        ...

    def encode(self, pixels: np.ndarray) -> Array:
        """Prepared images (n, ...) -> features (n, F), or (n, L, F) for kinds that have positions."""
        ...


@dataclasses.dataclass(frozen=True)
class CLIPFeatureInputs:
    """Squares of pixels, normalized for CLIP."""

    config: CLIPVisionConfig
    kind: FeatureKind

    @property
    def positions(self) -> int | None:
        return self.config.num_positions if self.kind.has_positions else None

    def prepare(self, images: Sequence[ImageLike], fit: str) -> PreparedImages:
        """(n, side, side, 3), with fit "tile" several squares of each image."""
        if fit not in (*FITS, "tile"):
            raise InputError(f"{argument('fit', repr(fit))}: choose {', '.join(FITS)} or tile")
        side = self.config.image_size
        loaded = [load_image(image) for image in images]
        if not loaded:
            raise InputError("an image prompt is an empty list; give at least one image")
        if fit == "tile":
            return PreparedImages(clip_pixel_values([tile for image in loaded for tile in square_tiles(image)], side))
        return PreparedImages(clip_pixel_values(loaded, side, fit))

    def unconditional(self, uncond: Uncond) -> PreparedImages | None:
        """The default is what adapters were trained with: zero features, or the features of zero pixels for kinds that
        have positions."""
        if uncond == "zeros" or (uncond == "default" and not self.kind.has_positions):
            return None
        side = self.config.image_size
        image = np.zeros((side, side, 3), np.uint8)  # black
        if uncond == "noise":
            image = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
        pixels = clip_pixel_values([Image.fromarray(image)], side)
        return PreparedImages(np.zeros_like(pixels) if uncond in ("default", "zero-pixels") else pixels)


@dataclasses.dataclass(frozen=True, eq=False)
class CLIPFeatureEncoder:
    """CLIP's vision model."""

    component: LoadedComponent
    kind: FeatureKind

    @property
    def inputs(self) -> CLIPFeatureInputs:
        return CLIPFeatureInputs(self.component.module.config, self.kind)

    @property
    def source(self) -> Path:
        return self.component.source

    def encode(self, pixels: np.ndarray) -> Array:
        return programs.encode_image(self.component.module, self.kind, self.component.params, pixels)
