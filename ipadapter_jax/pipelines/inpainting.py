"""Image-to-image (SDEdit, arXiv 2108.01073) and inpainting: the initial image, its mask, and the latents that sampling
starts from."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from ipadapter_jax.diffusion.parameterization import add_noise
from ipadapter_jax.diffusion.samplers import SamplerRun
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.images.preprocess import load_image
from ipadapter_jax.inputs.validation import latent_shape
from ipadapter_jax.models.vae import normalize
from ipadapter_jax.pipelines.conditioning import PreservedRegion
from ipadapter_jax.pipelines.feature_encoder import ImageLike
from ipadapter_jax.pipelines.masks import check_latent_mask, latent_mask, load_mask
from ipadapter_jax.pipelines.noise import INITIAL, MASKED_POSTERIOR, POSTERIOR
from ipadapter_jax.pipelines.sample_batch import SampleBatch


@dataclasses.dataclass(frozen=True, eq=False)
class InitImage:
    """The initial image (H, W, 3) uint8, and for inpainting the mask (H, W) in [0, 1], 1 where to generate."""

    image: np.ndarray
    mask: np.ndarray | None

    @classmethod
    def load(
        cls, image: ImageLike | None, mask: ImageLike | None, height: int | None, width: int | None, multiple: int
    ) -> "InitImage":
        """Reads image and mask in this size in pixels, by default the image's own rounded down to a `multiple`. Raises
        InputError."""
        if image is None:
            raise InputError(
                f"{argument('mask_image')} says where to generate, {argument('image')} what the rest shows: give both"
            )
        loaded = load_image(image)
        if (height is None and loaded.height < multiple) or (width is None and loaded.width < multiple):
            raise InputError(f"{argument('image')} is {loaded.width} x {loaded.height} pixels; give a larger one")
        height = loaded.height // multiple * multiple if height is None else height
        width = loaded.width // multiple * multiple if width is None else width
        latent_shape(height, width, multiple, 0)  # refuses what is no size
        drawn_for = loaded.height, loaded.width
        if loaded.size != (width, height):
            loaded = loaded.resize((width, height), Image.Resampling.LANCZOS)  # as diffusers
        inside = None if mask is None else load_mask(mask, height, width, argument("mask_image"), drawn_for)
        return cls(np.asarray(loaded), inside)

    @property
    def pixels(self) -> np.ndarray:
        """(1, H, W, 3) float32 in [-1, 1]."""
        return normalize(self.image[None])

    @property
    def masked_pixels(self) -> np.ndarray:
        """`pixels` with 0 where to generate, as inpainting UNets take them."""
        assert self.mask is not None
        return self.pixels * (self.mask < 0.5)[None, :, :, None]

    def restored(self, images: np.ndarray) -> np.ndarray:
        """Images (B, H, W, 3) in [0, 1] with the pixels of this one where the mask is black. Up to 1 % of white
        counts as black, because JPEG changes black by as much."""
        assert self.mask is not None
        mask = np.where(self.mask < 0.01, 0, self.mask)[:, :, None]
        return mask * images + (1 - mask) * (self.image.astype(np.float32) / 255)


def open_init_image(
    image: ImageLike | None,
    mask: ImageLike | None,
    strength: float | None,
    exact: bool,
    size: tuple[int | None, int | None],
    multiple: int,
    *,
    sees_mask: bool,
) -> InitImage | None:
    """The initial image of a call, or None without one. `exact`: the pixels outside of the mask are kept;
    `sees_mask`: the UNet is an inpainting one. Raises InputError, also for arguments that would have no effect."""
    if image is None and mask is None:
        for name, given in (("strength", strength is not None), ("exact_outside_mask", exact)):
            if given:
                raise InputError(f"{argument(name)} is for image-to-image and inpainting: give {argument('image')}")
        return None
    if exact and mask is None:
        raise InputError(f"{argument('exact_outside_mask')} needs {argument('mask_image')}, which says what is outside")
    init_image = InitImage.load(image, mask, *size, multiple)
    if init_image.mask is not None:
        check_latent_mask(init_image.mask, multiple, sees_mask=sees_mask)
    return init_image


def strength_of(strength: float | None, image: ImageLike | None, mask: ImageLike | None) -> float:
    """The fraction of the steps that run: by default 1 without an image or with a mask, else 0.8."""
    if strength is not None:
        return strength
    return 1.0 if image is None or mask is not None else 0.8


def encoded_posteriors(init_image: InitImage | None, strength: float, *, inpaint_unet: bool) -> frozenset[int]:
    """The draws of posteriors that `start` makes. An inpainting model of full strength does not begin with the image
    itself, and is shown only the masked one."""
    if init_image is None:
        return frozenset()
    if init_image.mask is None or not inpaint_unet:
        return frozenset({POSTERIOR})
    return frozenset({MASKED_POSTERIOR} if strength == 1 else {POSTERIOR, MASKED_POSTERIOR})


class Start(NamedTuple):
    """What sampling starts from: latents (B, h, w, C), and how inpainting enters the conditioning."""

    latents: Array
    preserved: PreservedRegion | None = None
    extra_channels: Array | None = None


def start(
    init_image: InitImage | None,
    encode: Callable[[np.ndarray, Array], Array],
    batch: SampleBatch,
    run: SamplerRun,
    encoded: frozenset[int],
    shape: tuple[int, ...],
    strength: float,
) -> Start:
    """Latents of pure noise (B, *shape); or with less than full strength, or without a mask, of the initial image under
    noise. `encode` gives the latents of pixels and the noise of their posterior; `encoded` is what `encoded_posteriors`
    gives for the initial image."""
    noise = batch.noise(shape, INITIAL)
    latents = noise * np.float32(run.init_noise_sigma)
    if init_image is None:
        return Start(latents)
    mask, preserved, extra_channels = None, None, None
    if init_image.mask is not None:
        h, w, _ = shape
        inside = np.broadcast_to(latent_mask(init_image.mask, h, w)[:, :, None], (batch.count, h, w, 1))
        mask = batch.sharded(inside)
    if POSTERIOR in encoded:
        clean = encode(init_image.pixels, batch.noise(shape, POSTERIOR))
        if mask is None or strength < 1:
            latents = add_noise(run.level.alpha, run.level.sigma, clean, noise)
        if mask is not None and MASKED_POSTERIOR not in encoded:
            preserved = PreservedRegion(mask=mask, latents=clean, noise=noise)
    if mask is not None and MASKED_POSTERIOR in encoded:
        masked = encode(init_image.masked_pixels, batch.noise(shape, MASKED_POSTERIOR))
        extra_channels = jnp.concatenate([mask, masked], axis=-1)
    return Start(latents, preserved, extra_channels)
