"""From the image prompts of a call to image branches of every cross-attention layer."""

import dataclasses
import functools
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
from jax import Array

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.validation import check_range
from ipadapter_jax.models.unet_config import CrossAttentionLayer
from ipadapter_jax.ops.attention import KeyValue
from ipadapter_jax.pipelines.adapter_inputs import AdapterInputs, PlannedFeatures
from ipadapter_jax.pipelines.conditioning import ImageBranch
from ipadapter_jax.pipelines.image_prompt_settings import (
    AdapterScale,
    EmbeddedPrompt,
    ImagePromptSettings,
    PerPrompt,
    ScalePerPrompt,
    check_combination,
    images_of_prompt,
    masks_by_adapter,
    negatives_by_adapter,
    prompts_by_adapter,
    scales_by_adapter,
)
from ipadapter_jax.pipelines.ip_adapter import Adapter
from ipadapter_jax.pipelines.masks import check_inside, layer_mask, load_mask
from ipadapter_jax.pipelines.scales import Scale, ScaleLike, scale_table


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedImageBranch:
    """One attention of every layer next to that of the text: to an adapter's images, or to one of them with a mask.

    Of the adapter's images `images` selects those of this branch, and `image_weight` (Q or 1, n) scales the values of
    each. `weight` (steps, G, layers) and `mask` (H, W) say where the branch acts. With `swapped`
    each branch of guidance sees the images of the other one.
    """

    images: slice
    image_weight: np.ndarray
    weight: np.ndarray
    mask: np.ndarray | None
    swapped: bool = False

    def keys_values(self, adapter: Adapter, features: Array) -> list[KeyValue]:
        """Of the adapter's features (Q, G, n, ...) -> per layer (Q, G, n N, C)."""
        chosen = features[:, :, self.images]
        return adapter.keys_values(chosen[:, ::-1] if self.swapped else chosen, self.image_weight)


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedImagePrompt:
    """What one adapter contributes: its images and its image branches."""

    features: PlannedFeatures
    branches: list[PlannedImageBranch]

    def encode(self, adapter: Adapter, grids: Sequence[tuple[int, int]]) -> list[ImageBranch]:
        """Runs the encoder once; masks are brought to each layer's grid of queries."""
        features = adapter.encode(self.features)
        return [
            ImageBranch(
                kv=branch.keys_values(adapter, features), weight=branch.weight, mask=layer_mask(branch.mask, grids)
            )
            for branch in self.branches
        ]


def plan_image_prompts(
    settings: ImagePromptSettings,
    adapters: Sequence[AdapterInputs],
    layers: Sequence[CrossAttentionLayer],
    num_steps: int,
    guided: bool,
    size: tuple[int, int],
    num_prompts: int,
    multiple: int = 8,
) -> list[PlannedImagePrompt]:
    """What each adapter contributes to a call for images of `size` (height, width). multiple: pixels along each side of
    a latent. Reads and checks what was given, from configurations alone; no encoder runs. Raises InputError.
    """
    for name, word in (("fit", settings.fit), ("ip_adapter_uncond", settings.uncond)):
        if not isinstance(word, str):
            raise InputError(f"{argument(name)} is {type(word).__name__}; give one of its words")
    given = prompts_by_adapter(settings, len(adapters), num_prompts)
    check_combination(settings, guided)
    scales = scales_by_adapter(settings.scale, len(adapters))
    masks = masks_by_adapter(settings.masks, len(adapters))
    negatives = negatives_by_adapter(settings.negative, len(adapters))
    found = []
    for adapter, prompt, negative, scale, its_masks in zip(adapters, given, negatives, scales, masks, strict=True):
        if isinstance(prompt, EmbeddedPrompt):
            features = adapter.from_embeds(prompt.embeds, guided, settings.uncond)
        else:
            prompts = [images_of_prompt(p) for p in (prompt.items if isinstance(prompt, PerPrompt) else [prompt])]
            if len(prompts) not in (1, num_prompts):
                raise InputError(
                    f"{argument('ip_adapter_image')} has {len(prompts)} image prompts for {num_prompts} prompts; "
                    "PerPrompt takes one for each"
                )
            features = adapter.from_images(prompts, settings.fit, guided, negative, settings.uncond)
        guidance_branches = 2 if guided else 1
        plan = _AdapterPlan(features.count, layers, num_steps, guidance_branches, num_prompts)
        if its_masks is None:
            planned = plan.together(scale)
        else:
            loaded = [load_mask(mask, *size, what=f"mask {i + 1}") for i, mask in enumerate(its_masks)]
            for i, mask in enumerate(loaded):
                check_inside(mask, f"mask {i + 1}", multiple)
            planned = plan.apart(scale, loaded)
        for branch in planned:
            check_range(branch.weight, "ip_adapter_scale", adapter.dtype)
            check_range(branch.image_weight, "ip_adapter_scale", adapter.dtype)
        found.append(PlannedImagePrompt(features, planned))
    return found


class _ScaleByPrompt(NamedTuple):
    """A weight for each prompt's images (Q, n), and the scale that they have in common."""

    weight: np.ndarray
    scale: Scale


@dataclasses.dataclass(frozen=True)
class _AdapterPlan:
    """From one adapter's images to its image branches."""

    count: int
    layers: Sequence[CrossAttentionLayer]
    num_steps: int
    guidance_branches: int
    num_prompts: int

    def together(self, scale: AdapterScale) -> list[PlannedImageBranch]:
        """All images in one softmax; a list of numbers weighs each."""
        weight = np.ones((1, self.count), np.float32)
        if isinstance(scale, PerPrompt):
            by_prompt = self._by_prompt(scale)
            weight, scale = by_prompt.weight, by_prompt.scale
        elif isinstance(scale, list | tuple):
            if any(not isinstance(s, Real) for s in scale):
                raise InputError(
                    f"{argument('ip_adapter_scale')}: several images without masks take one number each, or one scale"
                )
            tables = [scale_table(s, self.layers, 1).weight[0, 0] for s in self._each(scale)]
            weight, scale = np.asarray([tables], np.float32), 1.0
        return self._planned(slice(None), weight, scale, None)

    def apart(self, scale: AdapterScale, masks: Sequence[np.ndarray]) -> list[PlannedImageBranch]:
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

    def _by_prompt(self, scales: ScalePerPrompt) -> "_ScaleByPrompt":
        full = [s if isinstance(s, Scale) else Scale(s) for s in scales.items]
        common = [dataclasses.replace(s, value=1.0) for s in full]
        if len(full) != self.num_prompts or any(s != common[0] for s in common):
            raise InputError(
                f"{argument('ip_adapter_scale')}: PerPrompt takes one for each of {self.num_prompts} prompts, and they "
                "may differ in their value alone"
            )
        for s in full:  # a number: presets belong into Scale(layers=...)
            scale_table(Scale(s.value), self.layers, 1)
        weight = np.repeat(np.asarray([s.value for s in full], np.float32)[:, None], self.count, axis=1)
        return _ScaleByPrompt(weight, common[0])

    def _each(self, scales: Sequence[ScaleLike]) -> Sequence[ScaleLike]:
        if len(scales) != self.count:
            raise InputError(
                f"{argument('ip_adapter_scale')}: {len(scales)} scales for {self.count} {_SQUARES}; give one for each"
            )
        return scales

    def _planned(
        self, images: slice, image_weight: np.ndarray, scale: ScaleLike, mask: np.ndarray | None
    ) -> list[PlannedImageBranch]:
        """One branch, and with a precise preset under guidance a second one whose guidance branches are swapped."""
        table = scale_table(scale, self.layers, self.num_steps)
        plan = functools.partial(PlannedImageBranch, images, image_weight)
        found = [plan(np.repeat(table.weight[:, None], self.guidance_branches, axis=1), mask)]
        if table.swapped.any() and self.guidance_branches == 2:
            weight = np.stack([table.swapped, np.zeros_like(table.swapped)], axis=1)
            found.append(plan(weight, mask, swapped=True))
        return found


_SQUARES = 'images (of fit="tile" every square)'
