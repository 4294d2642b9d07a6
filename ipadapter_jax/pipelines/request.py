"""A request for images and the plan that it becomes: arguments are read and checked once, before any weights."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from numpy.typing import DTypeLike

from ipadapter_jax.diffusion.samplers import SamplerRun, sample_table
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.arrays import to_python_number
from ipadapter_jax.inputs.prompt_syntax import warn_of_foreign_syntax
from ipadapter_jax.inputs.validation import (
    LatentShape,
    Uncond,
    check_choices,
    check_guided,
    check_latents,
    latent_shape,
    prompt_pairs,
    resolve_seeds,
)
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.models.vae import VAEConfig
from ipadapter_jax.pipelines.adapter_inputs import AdapterInputs, GivenEmbeds
from ipadapter_jax.pipelines.feature_encoder import ImageLike
from ipadapter_jax.pipelines.image_prompt_settings import (
    GivenImages,
    GivenMasks,
    GivenScales,
    ImagePrompt,
    ImagePromptSettings,
)
from ipadapter_jax.pipelines.image_prompts import PlannedImagePrompt, plan_image_prompts
from ipadapter_jax.pipelines.inpainting import InitImage, encoded_posteriors, open_init_image, strength_of
from ipadapter_jax.pipelines.noise import INITIAL, taken_noise
from ipadapter_jax.runtime.memory_limits import check_sampling_memory
from ipadapter_jax.weights.base_model import check_text_to_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfigs:
    """What a request needs to know of a model: configurations, no weights. `dtype` is that of the networks, `name` what
    messages call the base model, `guidance_scale` what is used where a request names none."""

    name: str
    unet: UNetConfig
    vae: VAEConfig
    text_layers: int  # of the text encoder
    schedule: NoiseSchedule
    dtype: DTypeLike
    guidance_scale: float
    adapters: Sequence[AdapterInputs] = ()

    @property
    def sees_mask(self) -> bool:
        """Whether the UNet is an inpainting one, which reads mask and masked image."""
        return self.unet.in_channels != self.unet.out_channels

    def latent_shape(self, height: int | None, width: int | None) -> LatentShape:
        """The shape of the latents for a size in pixels, by default the model's own. Raises InputError."""
        scale, own = self.vae.downscale, self.unet.sample_size
        if own is None and (height is None or width is None):
            raise InputError(f"this model does not say its size; give {argument('height')} and {argument('width')}")
        h, w = own if isinstance(own, tuple) else (own or 0, own or 0)
        height, width = h * scale if height is None else height, w * scale if width is None else width
        return latent_shape(height, width, scale, self.vae.latent_channels)

    def image_prompts(
        self, settings: ImagePromptSettings, run: SamplerRun, guided: bool, shape: LatentShape, prompts: int
    ) -> list[PlannedImagePrompt]:
        """What each adapter contributes to images of `prompts` text prompts with latents of this shape. Raises
        InputError."""
        scale = self.vae.downscale
        size, layers = (shape[0] * scale, shape[1] * scale), cross_attention_layers(self.unet)
        steps = len(run.steps.timestep)
        return plan_image_prompts(settings, self.adapters, layers, steps, guided, size, prompts, scale)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SamplingRequest:
    """What is asked for, in diffusers' words; `StableDiffusion.__call__` describes every field."""

    prompt: str | Sequence[str] = ""
    ip_adapter_image: GivenImages | None = None
    ip_adapter_image_embeds: Sequence[GivenEmbeds] | GivenEmbeds | None = None
    negative_ip_adapter_image: ImagePrompt | None = None
    ip_adapter_uncond: Uncond = "default"
    ip_adapter_scale: GivenScales = 1.0
    ip_adapter_masks: GivenMasks | None = None
    fit: str = "crop"
    image: ImageLike | None = None
    mask_image: ImageLike | None = None
    strength: float | None = None
    exact_outside_mask: bool = False
    negative_prompt: str | Sequence[str] | None = ""
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    clip_skip: int = 0
    scheduler: str = "ddim"
    scheduler_config: Mapping[str, object] | None = None
    eta: float = 0.0
    num_images_per_prompt: int = 1
    height: int | None = None
    width: int | None = None
    seed: int | Sequence[int] | None = 0
    latents: np.ndarray | None = None
    output_type: str = "pil"
    return_attention_maps: bool = False

    def resolve(self, model: ModelConfigs) -> "SamplingPlan":
        """Reads and checks everything, once. Raises InputError naming the first argument that cannot be used or would
        have no effect."""
        scales = model.guidance_scale if self.guidance_scale is None else self.guidance_scale, self.guidance_rescale
        guidance_scale, guidance_rescale, eta = to_python_number((*scales, self.eta))
        strength, height, width = to_python_number((self.strength, self.height, self.width))
        prompts, negatives = prompt_pairs(self.prompt, self.negative_prompt)
        count = self.num_images_per_prompt
        check_choices(count, guidance_scale, guidance_rescale, self.clip_skip, model.text_layers, eta, self.output_type)
        check_guided(guidance_scale, negatives, guidance_rescale)
        warn_of_foreign_syntax({"prompt": prompts, "negative_prompt": negatives})
        init_image = self._init_image(model, strength, height, width)
        strength = strength_of(strength, self.image, self.mask_image)
        schedule = model.schedule.changed(self.scheduler_config or {}, self.scheduler)
        run = sample_table(self.scheduler, schedule, self.num_inference_steps, eta, strength)
        shape = model.latent_shape(*((height, width) if init_image is None else init_image.image.shape[:2]))
        count, guided = len(prompts) * count, guidance_scale > 1
        networks = model.unet, model.vae, model.dtype
        check_sampling_memory(*networks, count, shape, run, jax.local_devices(), guided=guided)
        given = {} if self.latents is None else {INITIAL: check_latents(self.latents, (count, *shape), model.dtype)}
        image_prompts = model.image_prompts(self._image_prompt_settings, run, guided, shape, len(prompts))
        if self.return_attention_maps and not image_prompts:
            raise InputError(f"{argument('return_attention_maps')} needs an image prompt to look at")
        used = not given or init_image is not None or bool(np.any(run.steps.noise))
        seeds = resolve_seeds(self.seed, count, used=used)
        encoded = encoded_posteriors(init_image, strength, inpaint_unet=model.sees_mask)
        given |= taken_noise().by_number(encoded, not given, np.asarray(run.steps.noise), (count, *shape))
        return SamplingPlan(
            prompts=prompts,
            negative_prompts=negatives,
            prompt_of_sample=np.repeat(np.arange(len(prompts)), self.num_images_per_prompt),
            clip_skip=self.clip_skip,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            run=run,
            latent_shape=shape,
            image_prompts=image_prompts,
            init_image=init_image,
            strength=strength,
            exact_outside_mask=self.exact_outside_mask,
            encoded_posteriors=encoded,
            seeds=seeds,
            given_noise=given,
            output_type=self.output_type,
            attention_maps=self.return_attention_maps,
        )

    def _init_image(
        self, model: ModelConfigs, strength: float | None, height: int | None, width: int | None
    ) -> InitImage | None:
        """The image that sampling starts from, if there is one."""
        if self.exact_outside_mask and self.output_type == "latent":
            raise InputError(f"{argument('exact_outside_mask')} is for images; latents hold no pixels to keep")
        if self.mask_image is None:
            check_text_to_image(model.name, model.unet)
        return open_init_image(
            self.image,
            self.mask_image,
            strength,
            self.exact_outside_mask,
            (height, width),
            model.vae.downscale,
            sees_mask=model.sees_mask,
        )

    @property
    def _image_prompt_settings(self) -> ImagePromptSettings:
        return ImagePromptSettings(
            images=self.ip_adapter_image,
            embeds=self.ip_adapter_image_embeds,
            negative=self.negative_ip_adapter_image,
            uncond=self.ip_adapter_uncond,
            scale=self.ip_adapter_scale,
            masks=self.ip_adapter_masks,
            fit=self.fit,
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SamplingPlan:
    """A request that was checked against a model: what `StableDiffusion.sample` runs.

    B samples, prompt-major, of latents (h, w, C) = `latent_shape`; `seeds` (B,); `prompt_of_sample` (B,);
    `given_noise` by number (`noise.py`), each (B, h, w, C).
    """

    prompts: list[str]
    negative_prompts: list[str]
    prompt_of_sample: np.ndarray
    clip_skip: int
    guidance_scale: float
    guidance_rescale: float
    run: SamplerRun
    latent_shape: LatentShape
    image_prompts: list[PlannedImagePrompt]
    init_image: InitImage | None
    strength: float
    exact_outside_mask: bool
    encoded_posteriors: frozenset[int]
    seeds: np.ndarray
    given_noise: dict[int, np.ndarray]
    output_type: str
    attention_maps: bool

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.guidance_scale > 1

    @property
    def num_steps(self) -> int:
        return len(self.run.steps.timestep)
