"""Checks the arguments of a pipeline call and converts them, before anything is compiled."""

import contextlib
import secrets
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Literal, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import DTypeLike

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.arrays import to_numpy
from ipadapter_jax.inputs.strings import is_utf8
from ipadapter_jax.inputs.suggestions import did_you_mean

Uncond = Literal["default", "zeros", "zero-pixels", "black", "noise"]
"""What the unconditional branch of guidance sees in place of an image: zero features, the features of normalized pixels
that are zero, those of a black image (ComfyUI's choice for plus and full adapters), or of noise, which pulls the images
away from grain. The default is what adapters were trained with: zero features for base ones, zero pixels for plus and
full ones."""


class PromptPairs(NamedTuple):
    """Prompts, and a negative prompt for each."""

    prompts: list[str]
    negatives: list[str]


class LatentShape(NamedTuple):
    """The shape of the latents of one image, channels last."""

    height: int
    width: int
    channels: int


def prompt_pairs(prompt: str | Sequence[str], negative: str | Sequence[str | None] | None) -> PromptPairs:
    """Prompts, and as many negative prompts, which are empty where none are given. Raises InputError."""
    negative = ["" if text is None else text for text in negative] if isinstance(negative, list | tuple) else negative
    negative = "" if negative is None else negative
    for name, texts in (("prompt", prompt), ("negative_prompt", negative)):
        if not isinstance(texts, str | list | tuple) or (not texts and texts != ""):
            raise InputError(f"{argument(name)} must be a text or a list of texts")
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str) or not is_utf8(text):
                raise InputError(f"{argument(name)} holds {text!r}, which is not text in UTF-8")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else [str(text) for text in negative]
    if len(negatives) != len(prompts):
        raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
    return PromptPairs(prompts, negatives)


def missing_texts(texts: str | Sequence[str | None] | None, count: int) -> np.ndarray:
    """(count,) bool: for which of the prompts no text was given."""
    given = texts if isinstance(texts, list | tuple) else [texts]
    return np.broadcast_to([text is None for text in given], (count,))


def check_choices(
    images_per_prompt: int,
    guidance_scale: float,
    guidance_rescale: float,
    clip_skip: int,
    text_layers: int,
    eta: float,
    output_type: str,
) -> None:
    """Raises InputError naming the first argument that cannot be used."""
    if not isinstance(images_per_prompt, Integral) or images_per_prompt < 1:
        raise InputError(f"{argument('num_images_per_prompt', images_per_prompt)} must be a whole number of at least 1")
    if not is_number(guidance_scale):
        raise InputError(
            f"{argument('guidance_scale', guidance_scale)} is not a finite number; 7.5 is usual, 1 turns guidance off"
        )
    if not is_number(guidance_rescale) or not 0 <= guidance_rescale <= 1:
        raise InputError(
            f"{argument('guidance_rescale', guidance_rescale)} must lie between 0 (none) and 1; 0.7 is usual"
        )
    if not isinstance(clip_skip, Integral) or not 0 <= clip_skip < text_layers:
        raise InputError(
            f"{argument('clip_skip', clip_skip)} must be a whole number of layers to leave out, 0 to {text_layers - 1}"
        )
    if not is_number(eta) or not 0 <= eta <= 1:
        raise InputError(f"{argument('eta', eta)} must lie between 0 (deterministic) and 1 (as DDPM)")
    if output_type not in ("pil", "np", "latent"):
        raise InputError(f"output_type {output_type!r} is not known; choose pil, np or latent")


def check_callback(callback: object) -> None:
    """Raises InputError for what cannot be called."""
    if callback is not None and not callable(callback):
        raise InputError("callback must be a function of (step, timestep, latents)")


def check_dtype(dtype: object, known: Collection[str]) -> str:
    """The name of a data type, given by its name or as jnp.bfloat16. Raises InputError unless it is known."""
    if isinstance(dtype, type | np.dtype):
        with contextlib.suppress(TypeError):  # a class that is not a data type
            dtype = np.dtype(dtype).name
    if dtype not in known:
        near = did_you_mean(dtype, known)
        raise InputError(f"{argument('dtype')} {dtype!r}: choose {', '.join(known)}{near}")
    return str(dtype)


def latent_shape(height: int, width: int, downscale: int, channels: int) -> LatentShape:
    """The shape of the latents of an image of this size in pixels. Raises InputError for a size that is not a multiple
    of `downscale`."""
    for name, pixels in (("height", height), ("width", width)):
        if not isinstance(pixels, Integral) or pixels < downscale or pixels % downscale:
            nearest = max(downscale, round(pixels / downscale) * downscale) if is_number(pixels) else downscale
            raise InputError(
                f"{argument(name, pixels)} is not a multiple of {downscale}; the nearest size is {nearest}"
            )
    return LatentShape(height // downscale, width // downscale, channels)


def check_guided(guidance_scale: float, given: Mapping[str, object]) -> None:
    """Raises InputError for a given argument that has no effect without guidance."""
    if guidance_scale > 1:
        return
    for name, value in given.items():
        if value:
            raise InputError(
                f"{argument(name)} has no effect without guidance, {argument('guidance_scale', guidance_scale)}: give "
                "one above 1, or leave it out"
            )


def resolve_seeds(seed: int | Sequence[int] | None, count: int, used: bool = True) -> np.ndarray:
    """One seed per image, (count,) uint32: seed + i, or the given ones. If `seed` is None, one is chosen at random and
    printed to standard error, so that the images can be generated again.

    used: whether sampling draws noise; if not, a seed other than 0 gives a warning.
    Raises InputError for seeds that are not in [0, 2^32), or not as many as images.
    """
    if not used and seed is None:
        seed = 0
    elif not used and np.any(np.asarray(seed) != 0):
        warnings.warn(
            f"{argument('seed')} has no effect: {argument('latents')} are given and this scheduler draws no noise",
            stacklevel=3,
        )
    if seed is None:
        seed = secrets.randbelow(2**32 - count + 1)
        print(f"seed {seed}", file=sys.stderr)
    seeds = _listed(seed, "seed")
    if not all(isinstance(s, int) and 0 <= s < 2**32 for s in seeds):
        raise InputError(f"{argument('seed')} {seed} must be a whole number between 0 and 2^32 - 1, or a list of them")
    if np.ndim(seed) == 0:
        seeds = [seeds[0] + i for i in range(count)]
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} images; give one number, or one for each image")
    if max(seeds) >= 2**32:
        raise InputError(
            f"{argument('seed')} {seed} is too large for {count} images: seed + {count - 1} must stay below 2^32"
        )
    return np.asarray(seeds, np.uint32)


def check_latents(latents: object, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> np.ndarray:
    """The caller's initial latents as float32. Raises InputError for another shape, or for values that are not finite
    in `dtype`, that of the networks."""
    array = to_float32(latents, "latents", dtype)
    if array.shape != shape:
        raise InputError(f"latents have shape {array.shape}, these settings need {shape} (channels last)")
    return array


def to_float32(value: object, name: str, dtype: DTypeLike = np.float32) -> np.ndarray:
    """A float32 array from an array of any library or lists of numbers. Raises InputError naming the argument unless
    all numbers are finite, also in `dtype`."""
    array = to_numpy(value, name)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{name} must be an array of numbers")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds numbers that are not finite")
    check_range(array, name, dtype)
    with np.errstate(over="ignore"):  # float64
        array = array.astype(np.float32)
    check_range(array, name, np.float32)
    return array


def check_range(numbers: np.ndarray, name: str, dtype: DTypeLike) -> None:
    """Raises InputError naming the argument when its numbers become infinite in `dtype`, that of the networks."""
    most, dtype = largest_finite(dtype), np.dtype(dtype)
    found = float(np.abs(numbers).max(initial=0))
    if not found <= most:
        remedy = "load the model in bfloat16 or float32" if dtype == np.float16 else "scale them down"
        raise InputError(
            f"{argument(name)} reaches {found:.6g}, beyond {most:.6g}, the largest number of {dtype}; {remedy}"
        )


def largest_finite(dtype: DTypeLike) -> float:
    """The largest finite number of float32, bfloat16 or float16."""
    return {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}.get(np.dtype(dtype).name, 3.4028234663852886e38)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number that is finite as float32."""
    try:
        return isinstance(value, Real) and abs(float(value)) < 1e38  # not NaN: that compares as false
    except OverflowError:  # integers of any length
        return False


def _listed(value: object, name: str) -> list:
    """A number, a list or an array as a list of Python numbers."""
    if isinstance(value, str):
        return [value]
    return np.atleast_1d(to_numpy(value, name)).tolist()
