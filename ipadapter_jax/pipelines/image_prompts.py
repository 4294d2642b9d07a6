"""Image prompts as a person gives them, with scales and masks, and what becomes of them: entries of every
cross-attention (`sampling.Conditions`)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from jax import Array

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.arrays import is_array, plain
from ipadapter_jax.inputs.validation import Uncond, check_range
from ipadapter_jax.models.unet import KeyValue
from ipadapter_jax.models.unet_config import CrossAttentionLayer
from ipadapter_jax.pipelines.ip_adapter import Adapter, ImageLike, Prepared
from ipadapter_jax.pipelines.masks import check_inside, load_mask
from ipadapter_jax.pipelines.sampling import Conditions
from ipadapter_jax.pipelines.scales import Scale, scale_table

ImagePrompt = ImageLike | Sequence[ImageLike]


@dataclasses.dataclass(frozen=True)
class PerPrompt:
    """One image prompt, or one scale, for each text prompt: PerPrompt([cat, dog]) goes with two prompts."""

    items: Sequence[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedImageBranch:
    """One attention of every site beside the text's: an adapter's images, or one of them with a mask.

    `features` encodes the images (Q, G, n, ...); of these `images` are used, each times `image_weight` (Q or 1,
    n), with `swapped` the two branches of guidance exchanged. `weight` (steps, G, sites) and `mask` (H, W) say where it
    acts.
    """

    adapter: Adapter
    features: Callable[[], Array]
    images: slice
    image_weight: np.ndarray
    weight: np.ndarray
    mask: np.ndarray | None
    swapped: bool = False

    def keys_values(self) -> list[KeyValue]:
        """Per site (Q, G, n N, C)."""
        features = self.features()[:, :, self.images]
        return self.adapter.keys_values(features[:, ::-1] if self.swapped else features, self.image_weight)


@dataclasses.dataclass(frozen=True)
class ImagePromptSettings:
    """What a call says of its image prompts, as `StableDiffusion.__call__` describes it."""

    images: Any = None
    embeds: Any = None
    negative: Any = None
    uncond: Uncond = "default"
    scale: Any = 1.0
    masks: Any = None
    fit: str = "crop"


def plan_image_branches(
    settings: ImagePromptSettings,
    adapters: Sequence[Adapter],
    layers: Sequence[CrossAttentionLayer],
    num_steps: int,
    guided: bool,
    size: tuple[int, int],
    num_prompts: int,
    multiple: int = 8,
) -> list[PlannedImageBranch]:
    """All image branches of a call for images of `size` (height, width), one adapter after the other. multiple: pixels
    along each side of a latent.

    Reads and checks what was given; encoders run when a branch is asked for its keys and values. Raises InputError.
    """
    for name, word in (("fit", settings.fit), ("ip_adapter_uncond", settings.uncond)):
        if not isinstance(word, str):
            raise InputError(f"{argument(name)} is {type(word).__name__}; give one of its words")
    given = _per_adapter(settings, len(adapters), num_prompts)
    _check_combination(settings, guided)
    scales = _scales(settings.scale, len(adapters))
    masks = _masks(settings.masks, len(adapters))
    negatives = _negatives(settings.negative, len(adapters))
    found = []
    for adapter, prompt, negative, scale, its_masks in zip(adapters, given, negatives, scales, masks, strict=True):
        if settings.embeds is not None:
            features, count = adapter.from_embeds(prompt, guided, settings.uncond)
        else:
            prompts = [_images(p) for p in (prompt.items if isinstance(prompt, PerPrompt) else [prompt])]
            if len(prompts) not in (1, num_prompts):
                raise InputError(
                    f"{argument('ip_adapter_image')} has {len(prompts)} image prompts for {num_prompts} prompts; "
                    "PerPrompt takes one for each"
                )
            features, count = adapter.from_images(prompts, settings.fit, guided, negative, settings.uncond)
        guidance_branches = 2 if guided else 1
        plan = _AdapterPlan(
            adapter, functools.cache(features), count, layers, num_steps, guidance_branches, num_prompts
        )
        if its_masks is None:
            planned = plan.together(scale)
        else:
            loaded = [load_mask(mask, *size, what=f"mask {i + 1}") for i, mask in enumerate(its_masks)]
            for i, mask in enumerate(loaded):
                check_inside(mask, f"mask {i + 1}", multiple)
            planned = plan.apart(scale, loaded)
        for branch in planned:
            check_range(branch.weight, "ip_adapter_scale", adapter.projection.dtype)
            check_range(branch.image_weight, "ip_adapter_scale", adapter.projection.dtype)
        found += planned
    return found


def _check_combination(settings: ImagePromptSettings, guided: bool) -> None:
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


def entry_weights(entries: Sequence[PlannedImageBranch], conditions: Conditions, num_steps: int) -> np.ndarray:
    """The weights of all entries (steps, E, G, sites) for a run under these conditions."""
    if entries:
        return np.stack([entry.weight for entry in entries], axis=1)
    return np.zeros((num_steps, 0, conditions.text_kv[0][0].shape[1], len(conditions.text_kv)), np.float32)


@dataclasses.dataclass(frozen=True)
class _AdapterPlan:
    """From one adapter's images to its image branches."""

    adapter: Adapter
    features: Callable[[], Array]
    count: int
    layers: Sequence[CrossAttentionLayer]
    num_steps: int
    guidance_branches: int
    num_prompts: int

    def together(self, scale: Any) -> list[PlannedImageBranch]:
        """All images in one softmax; a list of numbers weighs each."""
        weight = np.ones((1, self.count), np.float32)
        if isinstance(scale, PerPrompt):
            weight, scale = self._by_prompt(scale)
        elif isinstance(scale, list | tuple):
            if any(not isinstance(s, Real) for s in scale):
                raise InputError(
                    f"{argument('ip_adapter_scale')}: several images without masks take one number each, or one scale"
                )
            tables = [scale_table(s, self.layers, 1).weight[0, 0] for s in self._each(scale)]
            weight, scale = np.asarray([tables], np.float32), 1.0
        return self._planned(slice(None), weight, scale, None)

    def apart(self, scale: Any, masks: Sequence[np.ndarray]) -> list[PlannedImageBranch]:
        """Every image in a softmax of its own, where its mask is."""
        if len(masks) != self.count:
            raise InputError(
                f"{argument('ip_adapter_masks')}: {len(masks)} masks for {self.count} {_SQUARES}; give one for each"
            )
        if isinstance(scale, PerPrompt):
            raise InputError(
                f"{argument('ip_adapter_scale')}: PerPrompt goes without masks; with them give a scale for each image"
            )
        scales = self._each(scale) if isinstance(scale, list | tuple) else [scale] * self.count
        made = [
            self._planned(slice(i, i + 1), np.ones((1, 1), np.float32), s, mask)
            for i, (s, mask) in enumerate(zip(scales, masks, strict=True))
        ]
        return [branch for branches in made for branch in branches]

    def _by_prompt(self, scales: "PerPrompt") -> tuple[np.ndarray, Scale]:
        """A weight for each prompt's images (Q, n), and the scale that they have in common."""
        full = [s if isinstance(s, Scale) else Scale(s) for s in scales.items]
        common = [dataclasses.replace(s, value=1.0) for s in full]
        if len(full) != self.num_prompts or any(s != common[0] for s in common):
            raise InputError(
                f"{argument('ip_adapter_scale')}: PerPrompt takes one for each of {self.num_prompts} prompts, and they "
                "may differ in their value alone"
            )
        for s in full:  # a number: presets belong into Scale(layers=...)
            scale_table(Scale(s.value), self.layers, 1)
        return np.repeat(np.asarray([s.value for s in full], np.float32)[:, None], self.count, axis=1), common[0]

    def _each(self, scales: Sequence[Any]) -> Sequence[Any]:
        if len(scales) != self.count:
            raise InputError(
                f"{argument('ip_adapter_scale')}: {len(scales)} scales for {self.count} {_SQUARES}; give one for each"
            )
        return scales

    def _planned(
        self, images: slice, image_weight: np.ndarray, scale: Any, mask: np.ndarray | None
    ) -> list[PlannedImageBranch]:
        """One branch, and with a precise preset under guidance a second one whose guidance branches are swapped."""
        table = scale_table(scale, self.layers, self.num_steps)
        plan = functools.partial(PlannedImageBranch, self.adapter, self.features, images, image_weight)
        found = [plan(np.repeat(table.weight[:, None], self.guidance_branches, axis=1), mask)]
        if table.swapped.any() and self.guidance_branches == 2:
            weight = np.stack([table.swapped, np.zeros_like(table.swapped)], axis=1)
            found.append(plan(weight, mask, swapped=True))
        return found


_SQUARES = 'images (of fit="tile" every square)'


def _images(prompt: Any) -> Any:
    if isinstance(prompt, Prepared):
        return prompt
    return list(prompt) if isinstance(prompt, list | tuple) else [prompt]


def _per_adapter(settings: ImagePromptSettings, adapters: int, num_prompts: int) -> Sequence[Any]:
    """One image prompt (or one array of embeddings) per adapter.

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
        for name, given in (("ip_adapter_scale", not _is_one(settings.scale)), ("fit", settings.fit != "crop")):
            if given:
                raise InputError(
                    f"{argument(name)} has no effect without an image prompt: leave it out, or call with_ip_adapter"
                )
        return []
    given = [images] * (adapters if isinstance(images, PerPrompt) else 1)
    if embeds is not None:
        given = list(embeds) if isinstance(embeds, list | tuple) else [embeds]
        if any(isinstance(e, PerPrompt) for e in given):
            raise InputError(
                f"{argument('ip_adapter_image_embeds')} are the same for all prompts; PerPrompt goes with "
                f"{argument('ip_adapter_image')}"
            )
    elif isinstance(images, list | tuple) and (adapters > 1 or any(isinstance(i, list | tuple) for i in images)):
        given = list(images)
    merged = images if isinstance(images, list | tuple) and given[0] is images and settings.masks is None else ()
    if len(merged) == num_prompts > 1:  # with masks it is one for each mask
        raise InputError(
            f"{argument('ip_adapter_image')} is a list of {num_prompts} images for {num_prompts} prompts: give "
            "PerPrompt([...]) for one image to each prompt, or a list in the list, [[...]], for all to every prompt"
        )
    if len(given) != adapters or any(prompt is None for prompt in given):
        name = "ip_adapter_image" if embeds is None else "ip_adapter_image_embeds"
        for_texts = "; for one for each text prompt give PerPrompt([...])" if embeds is None else ""
        raise InputError(
            f"{adapters} adapter(s) need as many image prompts ({argument(name)}), one for each{for_texts}"
        )
    return given


def _is_one(scale: Any) -> bool:
    """Whether this is what is taken where no scale is given."""
    if isinstance(scale, Scale):
        return scale == Scale()
    scale = plain(scale)
    return isinstance(scale, Real) and scale == 1


def _scales(scale: Any, adapters: int) -> list[Any]:
    scale = scale.tolist() if is_array(scale) else plain(scale)
    scales = list(scale) if isinstance(scale, list | tuple) else [scale] * adapters
    if len(scales) != adapters:
        raise InputError(
            f"{argument('ip_adapter_scale')} has {len(scales)} values for {adapters} adapters; give one for each, and "
            "for several images of one adapter a list in the list, [[0.7, 0.3]]"
        )
    return scales


def _masks(masks: Any, adapters: int) -> list[Sequence[Any] | None]:
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
    nested = [list(m[0]) if is_array(m) and m.ndim == 4 and len(m) == 1 else m for m in masks]  # (1, n, H, W) too
    if adapters == 1 and not any(isinstance(mask, list | tuple) for mask in nested):
        nested = [nested]
    if len(nested) != adapters:
        raise InputError(
            f"{argument('ip_adapter_masks')} has {len(nested)} lists for {adapters} adapters; give one for each"
        )
    return [m if m is None or isinstance(m, list | tuple) else [m] for m in nested]


def _negatives(negative: Any, adapters: int) -> list[list[ImageLike] | None]:
    if negative is None or adapters < 2:
        return [None if negative is None else _images(negative)] * adapters
    if not isinstance(negative, list | tuple) or len(negative) != adapters:
        raise InputError(
            f"{argument('negative_ip_adapter_image')}: give a list with one image for each of the {adapters} adapters"
        )
    return [None if image is None else _images(image) for image in negative]
