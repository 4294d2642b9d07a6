"""What a call gives back: latents or decoded images that are finite, in the form that was asked for."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from ipadapter_jax.errors import NonFiniteImageError
from ipadapter_jax.images.preprocess import to_uint8
from ipadapter_jax.models.vae import denormalize
from ipadapter_jax.pipelines.attention_maps import AttentionMaps
from ipadapter_jax.pipelines.inpainting import InitImage

Images = list[Image.Image] | np.ndarray
"""PIL images ("pil"), a float array (B, H, W, 3) in [0, 1] ("np") or the final latents (B, h, w, C) ("latent")."""


class SamplingResult(NamedTuple):
    """Images, and the attention to their image prompts where it was requested."""

    images: Images
    maps: AttentionMaps | None


def check_finite(rows: np.ndarray, what: str) -> None:
    """Raises NonFiniteImageError naming which of the images (B, ...) is not finite; others of its batch may be good."""
    bad = [str(i) for i, row in enumerate(rows) if not np.isfinite(row).all()]
    if bad:
        raise NonFiniteImageError(
            f"{what} {', '.join(bad[:20])} of {len(rows)}, counted from 0, is not finite: float16 overflowed or the "
            "weights are damaged; try bfloat16 or float32"
        )


def images_of(decoded: np.ndarray, output_type: str, init_image: InitImage | None) -> Images:
    """What the decoder gives (B, H, W, 3), about [-1, 1], as "np" or "pil", outside of its mask with the pixels of the
    initial image. Raises NonFiniteImageError as `check_finite`."""
    check_finite(decoded, "image")
    pixels = denormalize(decoded)
    if init_image is not None:
        pixels = init_image.restored(pixels)
    return pixels if output_type == "np" else [Image.fromarray(image) for image in to_uint8(pixels)]
