"""What a person passes to a pipeline, checked and brought into form before anything is compiled."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from ipadapter_jax.errors import InputError


def prompt_pairs(prompt: str | Sequence[str], negative: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts and as many negative prompts."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not prompts or not all(isinstance(p, str) for p in (*prompts, *negatives)):
        raise InputError("prompt and negative_prompt must be a text or a list of texts")
    if len(negatives) != len(prompts):
        raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
    return prompts, negatives


def check_choices(images_per_prompt: int, guidance_scale: float, eta: float, scheduler: str, output_type: str) -> None:
    """Raises InputError naming the first argument that cannot be used."""
    if not isinstance(images_per_prompt, Integral) or images_per_prompt < 1:
        raise InputError(f"num_images_per_prompt={images_per_prompt} must be a whole number of at least 1")
    if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale={guidance_scale} is not a finite number; 7.5 is usual, 1 turns guidance off")
    if not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise InputError(f"eta={eta} must lie between 0 (deterministic) and 1 (as DDPM)")
    if scheduler != "ddim":
        raise InputError(f"scheduler {scheduler!r} is not known; choose ddim")
    if output_type not in ("pil", "np", "latent"):
        raise InputError(f"output_type {output_type!r} is not known; choose pil, np or latent")


def latent_shape(height: int, width: int, downscale: int, channels: int) -> tuple[int, int, int]:
    """Pixels to (h, w, C)."""
    for name, pixels in (("height", height), ("width", width)):
        if not isinstance(pixels, Integral) or pixels < downscale or pixels % downscale:
            nearest = max(downscale, round(pixels / downscale) * downscale) if isinstance(pixels, Real) else downscale
            raise InputError(f"{name}={pixels} is not a multiple of {downscale}; the nearest size is {nearest}")
    return height // downscale, width // downscale, channels


def seeds_of(seed: int | Sequence[int], count: int) -> np.ndarray:
    """One seed per picture, (count,) uint32: seed + i, or those given."""
    seeds = list(seed) if isinstance(seed, Sequence | np.ndarray) else [seed + i for i in range(count)]
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} pictures; give one number, or one for each picture")
    if not all(isinstance(s, int | np.integer) and 0 <= s < 2**32 for s in seeds):
        raise InputError(f"seed {seed} must lie between 0 and 2^32 - 1")
    return np.asarray(seeds, np.uint32)


def given_latents(latents: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The caller's initial latents as float32."""
    array = np.asarray(latents, np.float32)
    if array.shape != shape:
        raise InputError(f"latents have shape {array.shape}, these settings need {shape} (channels last)")
    if not np.isfinite(array).all():
        raise InputError("latents are not finite; give standard normal ones")
    return array


def image_weights(scale: float | Sequence[float], adapters: int, sites: int) -> np.ndarray:
    """One weight per (adapter, site), float32."""
    scales = list(scale) if isinstance(scale, Sequence | np.ndarray) else [scale] * adapters
    if len(scales) != adapters:
        raise InputError(f"ip_adapter_scale has {len(scales)} values for {adapters} adapters; give one for each")
    for value in scales:
        if not isinstance(value, Real) or not math.isfinite(value):
            raise InputError(f"ip_adapter_scale={value} is not a finite number; 0 is the base model, 1 the full image")
    return np.broadcast_to(np.asarray(scales, np.float32)[:, None], (adapters, sites))


def prompts_of_adapters(images: Any, embeds: Sequence[Any] | None, adapters: int) -> Sequence[Any]:
    """One image prompt (or one array of embeddings) per adapter.

    With a single adapter a flat list is one prompt of several pictures; diffusers wants it nested, which works too.
    """
    if images is not None and embeds is not None:
        raise InputError("ip_adapter_image and ip_adapter_image_embeds are both given; give one of them")
    if not adapters:
        if images is not None or embeds is not None:
            raise InputError("an image prompt needs an adapter: call with_ip_adapter first")
        return []
    given = [images]
    if embeds is not None:
        given = list(embeds)
    elif isinstance(images, list | tuple) and (adapters > 1 or any(isinstance(i, list | tuple) for i in images)):
        given = list(images)
    if len(given) != adapters or any(prompt is None for prompt in given):
        raise InputError(f"{adapters} adapter(s) need as many image prompts (ip_adapter_image), one for each")
    return given
