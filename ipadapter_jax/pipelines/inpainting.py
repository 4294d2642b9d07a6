"""Image-to-image and inpainting: a picture as the start of a run (SDEdit, arXiv 2108.01073), and what is kept of it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from ipadapter_jax.diffusion.samplers import Run
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.images.preprocess import load_image
from ipadapter_jax.inputs.validation import latent_shape
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.pipelines import sampling
from ipadapter_jax.pipelines.masks import check_latent_mask, latent_mask, load_mask
from ipadapter_jax.weights.load_tree import Tree

# Numbers of noise draws beside those of the steps: of the picture's posterior, and of the masked picture's.
POSTERIOR, MASKED_POSTERIOR = 2**32 - 2, 2**32 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Canvas:
    """The picture to paint over, (H, W, 3) uint8, and with inpainting the mask (H, W) in [0, 1], 1 where to paint."""

    picture: np.ndarray
    mask: np.ndarray | None

    @classmethod
    def load(cls, image: Any, mask: Any, height: int | None, width: int | None, multiple: int) -> "Canvas":
        """Picture and mask in this size, by default the picture's own rounded down to a `multiple`. Raises
        InputError."""
        if image is None:
            raise InputError(
                f"{argument('mask_image')} says where to paint, {argument('image')} what to paint on: give both"
            )
        loaded = load_image(image)
        if (height is None and loaded.height < multiple) or (width is None and loaded.width < multiple):
            raise InputError(
                f"{argument('image')}, to paint on, is {loaded.width} x {loaded.height} pixels; give a larger one"
            )
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
        return self.picture[None].astype(np.float32) / 127.5 - 1

    def restored(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, 3) in [0, 1] with the very pixels of this one where the mask is black, up to 1 % of white,
        which is how far JPEG strays."""
        assert self.mask is not None
        mask = np.where(self.mask < 0.01, 0, self.mask)[:, :, None]
        return mask * pictures + (1 - mask) * (self.picture.astype(np.float32) / 255)


def open_canvas(
    image: Any,
    mask: Any,
    strength: float | None,
    exact: bool,
    size: tuple[int | None, int | None],
    multiple: int,
    *,
    sees_mask: bool,
) -> Canvas | None:
    """What a call says of painting over a picture; None where it does not. `sees_mask`: the UNet is an inpainting one.
    Raises InputError, also for what would have no effect."""
    if image is None and mask is None:
        for name, given in (("strength", strength is not None), ("exact_outside_mask", exact)):
            if given:
                raise InputError(f"{argument(name)} is for painting over a picture: give {argument('image')}")
        return None
    if exact and mask is None:
        raise InputError(f"{argument('exact_outside_mask')} needs {argument('mask_image')}, which says what is outside")
    canvas = Canvas.load(image, mask, *size, multiple)
    if canvas.mask is not None:
        check_latent_mask(canvas.mask, multiple, sees_mask=sees_mask)
    return canvas


def strength_of(strength: float | None, image: Any, mask: Any) -> float:
    """The part of the steps that is made: all without a picture, and by default with a mask; 0.8 of a picture's."""
    if strength is not None:
        return strength
    return 1.0 if image is None or mask is not None else 0.8


def start(
    canvas: Canvas,
    vae: VAE,
    params: Tree,
    batch: sampling.Batch,
    run: Run,
    noise: Array,
    *,
    strength: float,
    shown: bool,
) -> sampling.Start:
    """The canvas under noise (B, h, w, 4); noise alone where inpainting has full strength. `shown`: the UNet is an
    inpainting one of 9 channels, which sees mask and masked picture."""
    h, w, _ = shape = noise.shape[1:]
    clean = sampling.encode_picture(vae, params, canvas.pixels, batch.noise(shape, POSTERIOR))
    latents = run.level[0] * clean + run.level[1] * noise
    if canvas.mask is None:
        return sampling.Start(latents)
    if strength == 1:
        latents = noise * np.float32(run.init_noise_sigma)
    inside = np.broadcast_to(latent_mask(canvas.mask, h, w)[:, :, None], (batch.count, h, w, 1))
    mask = batch.spread(inside)
    if not shown:
        return sampling.Start(latents, sampling.Kept(mask, clean, noise))
    masked = canvas.pixels * (canvas.mask < 0.5)[None, :, :, None]
    seen = sampling.encode_picture(vae, params, masked, batch.noise(shape, MASKED_POSTERIOR))
    return sampling.Start(latents, more_channels=jnp.concatenate([mask, seen], axis=-1))
