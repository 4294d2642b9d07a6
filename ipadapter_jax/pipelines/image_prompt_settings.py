"""What a call says of its image prompts, sorted by adapter: images or embeddings, scales, masks, negative images."""

import dataclasses
from collections.abc import Sequence
from numbers import Real
from typing import Generic, TypeVar

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.arrays import AnyArray, is_array, to_numpy, to_python_number
from ipadapter_jax.inputs.validation import Uncond
from ipadapter_jax.pipelines.adapter_inputs import GivenEmbeds
from ipadapter_jax.pipelines.feature_encoder import ImageLike, PreparedImages
from ipadapter_jax.pipelines.scales import Scale, ScaleLike

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class PerPrompt(Generic[Item]):
    """One image prompt, or one scale, for each text prompt: PerPrompt([cat, dog]) goes with two prompts."""

    items: Sequence[Item]


# What a caller may give, by the argument. A sequence has one for each adapter; with one adapter it may be left out.
ImagePrompt = ImageLike | Sequence[ImageLike] | PreparedImages
AdapterPrompt = ImagePrompt | PerPrompt[ImagePrompt]
GivenImages = AdapterPrompt | Sequence[AdapterPrompt]
ScalePerPrompt = PerPrompt[float | Scale]
GivenScales = ScaleLike | ScalePerPrompt | Sequence[ScaleLike | ScalePerPrompt | Sequence[ScaleLike]] | AnyArray
GivenMasks = Sequence[ImageLike | Sequence[ImageLike] | None] | AnyArray

AdapterScale = ScaleLike | list[ScaleLike] | tuple[ScaleLike, ...] | ScalePerPrompt
"""The scale of one adapter: for all its images, for each of them, or for each text prompt."""


@dataclasses.dataclass(frozen=True)
class ImagePromptSettings:
    """What a call says of its image prompts, as `StableDiffusion.__call__` describes it."""

    images: GivenImages | None = None
    embeds: GivenEmbeds | Sequence[GivenEmbeds] | None = None
    negative: ImagePrompt | None = None
    uncond: Uncond = "default"
    scale: GivenScales = 1.0
    masks: GivenMasks | None = None
    fit: str = "crop"


def check_combination(settings: ImagePromptSettings, guided: bool) -> None:
    """Raises InputError for settings that contradict each other or have no effect."""
    if settings.embeds is not None and settings.negative is not None:
        raise InputError(
            f"{argument('negative_ip_adapter_image')} goes with {argument('ip_adapter_image')}; embeddings "
            "hold their negative branch"
        )
    if settings.embeds is not None and settings.fit != "crop":
        raise InputError(
            f"{argument('fit', settings.fit)} is for images; {argument('ip_adapter_image_embeds')} are encoded already"
        )
    if settings.negative is not None and settings.uncond != "default":
        raise InputError(
            f"{argument('negative_ip_adapter_image')} and {argument('ip_adapter_uncond')} say the same; give one of "
            "them"
        )
    if not guided and (settings.negative is not None or settings.uncond != "default"):
        raise InputError(
            f"{argument('negative_ip_adapter_image')} and {argument('ip_adapter_uncond')} need guidance: "
            f"{argument('guidance_scale')} above 1"
        )


def _listed(given: Item | Sequence[Item]) -> list[Item]:
    """The items of a list or tuple; anything else is the only item. Which of both is known at run time alone: a string
    and an array are sequences, too."""
    items: list = list(given) if isinstance(given, list | tuple) else [given]
    return items


def images_of_prompt(prompt: ImagePrompt) -> list[ImageLike] | PreparedImages:
    """The images of one image prompt."""
    return prompt if isinstance(prompt, PreparedImages) else _listed(prompt)


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedPrompt:
    """Embeddings in place of an image prompt."""

    embeds: GivenEmbeds


def prompts_by_adapter(
    settings: ImagePromptSettings, adapters: int, num_prompts: int
) -> Sequence[AdapterPrompt | EmbeddedPrompt]:
    """What each adapter is given.

    With a single adapter a flat list is one prompt of several images; diffusers wants it nested, which works too. As
    many as there are text prompts may be meant otherwise: then it must be nested, or `PerPrompt`.
    """
    images, embeds = settings.images, settings.embeds
    if images is not None and embeds is not None:
        raise InputError(
            f"{argument('ip_adapter_image')} and {argument('ip_adapter_image_embeds')} are both given; give one of them"
        )
    if not adapters:
        needing = (images, embeds, settings.negative, settings.masks)
        if any(value is not None for value in needing) or settings.uncond != "default":
            raise InputError("an image prompt, negative or with masks, needs an adapter: call with_ip_adapter first")
        for name, is_given in (("ip_adapter_scale", not _is_one(settings.scale)), ("fit", settings.fit != "crop")):
            if is_given:
                raise InputError(
                    f"{argument(name)} has no effect without an image prompt: leave it out, or call with_ip_adapter"
                )
        return []
    if embeds is not None:
        return [EmbeddedPrompt(given) for given in _embeds_by_adapter(embeds, adapters)]
    given: list = [images] * (adapters if isinstance(images, PerPrompt) else 1)
    if isinstance(images, list | tuple) and (adapters > 1 or any(isinstance(i, list | tuple) for i in images)):
        given = list(images)
    merged = images if isinstance(images, list | tuple) and given[0] is images and settings.masks is None else ()
    if len(merged) == num_prompts > 1:  # with masks it is one for each mask
        raise InputError(
            f"{argument('ip_adapter_image')} is a list of {num_prompts} images for {num_prompts} prompts: give "
            "PerPrompt([...]) for one image to each prompt, or a list in the list, [[...]], for all to every prompt"
        )
    if len(given) != adapters or any(prompt is None for prompt in given):
        raise InputError(
            f"{adapters} adapter(s) need as many image prompts ({argument('ip_adapter_image')}), one for each; for "
            "one for each text prompt give PerPrompt([...])"
        )
    return given


def _embeds_by_adapter(embeds: GivenEmbeds | Sequence[GivenEmbeds], adapters: int) -> list[GivenEmbeds]:
    given = _listed(embeds)
    if any(isinstance(e, PerPrompt) for e in given):
        raise InputError(
            f"{argument('ip_adapter_image_embeds')} are the same for all prompts; PerPrompt goes with "
            f"{argument('ip_adapter_image')}"
        )
    if len(given) != adapters or any(e is None for e in given):
        name = argument("ip_adapter_image_embeds")
        raise InputError(f"{adapters} adapter(s) need as many image prompts ({name}), one for each")
    return given


def _is_one(scale: GivenScales) -> bool:
    """Whether this is what is taken where no scale is given."""
    if isinstance(scale, Scale):
        return scale == Scale()
    scale = to_python_number(scale)
    return isinstance(scale, Real) and scale == 1


def scales_by_adapter(scale: GivenScales, adapters: int) -> list[AdapterScale]:
    """The scale of each adapter's image prompt."""
    scale = to_numpy(scale, "ip_adapter_scale").tolist() if is_array(scale) else to_python_number(scale)
    scales: list = list(scale) if isinstance(scale, list | tuple) else [scale] * adapters
    if len(scales) != adapters:
        raise InputError(
            f"{argument('ip_adapter_scale')} has {len(scales)} values for {adapters} adapters; give one for each, and "
            "for several images of one adapter a list in the list, [[0.7, 0.3]]"
        )
    return scales


def masks_by_adapter(masks: GivenMasks | None, adapters: int) -> list[Sequence[ImageLike] | None]:
    """Per adapter a mask for each image, or none."""
    if masks is None:
        return [None] * adapters
    if is_array(masks) and masks.ndim in (3, 4):  # (n, H, W), or (n, 1, H, W) as diffusers' processor makes them
        masks = list(masks[0] if masks.ndim == 4 and len(masks) == 1 else masks)
    if not isinstance(masks, list | tuple):
        raise InputError(
            f"{argument('ip_adapter_masks')} is a list with one mask for each image, for several adapters a list of "
            "these"
        )
    nested: list = [list(m[0]) if is_array(m) and m.ndim == 4 and len(m) == 1 else m for m in masks]  # (1, n, H, W) too
    if adapters == 1 and not any(isinstance(mask, list | tuple) for mask in nested):
        nested = [nested]
    if len(nested) != adapters:
        raise InputError(
            f"{argument('ip_adapter_masks')} has {len(nested)} lists for {adapters} adapters; give one for each"
        )
    return [m if m is None or isinstance(m, list | tuple) else [m] for m in nested]


def negatives_by_adapter(negative: ImagePrompt | None, adapters: int) -> list[list[ImageLike] | PreparedImages | None]:
    """The negative images of each adapter, or none."""
    if negative is None or adapters < 2:
        return [None if negative is None else images_of_prompt(negative)] * adapters
    if not isinstance(negative, list | tuple) or len(negative) != adapters:
        raise InputError(
            f"{argument('negative_ip_adapter_image')}: give a list with one image for each of the {adapters} adapters"
        )
    return [None if image is None else images_of_prompt(image) for image in negative]
