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
    PromptPairs,
    Uncond,
    check_choices,
    check_guided,
    check_latents,
    latent_shape,
    missing_texts,
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
from ipadapter_jax.pipelines.size_conditioning import SizeConditioning
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
    second_text_encoder: bool
    zeros_for_no_negative: bool  # for no negative prompt, in place of the states of an empty one
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
    negative_prompt: str | Sequence[str | None] | None = None
    prompt_2: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    sizes: SizeConditioning = dataclasses.field(default_factory=SizeConditioning)
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
        second = self._second_prompts(model, prompts, negatives)
        only_guided = {"negative_prompt": any(negatives), "guidance_rescale": guidance_rescale}
        only_guided |= {"negative_prompt_2": self.negative_prompt_2} | dict.fromkeys(self.sizes.given_of_negative, True)
        check_guided(guidance_scale, only_guided)
        warn_of_foreign_syntax({"prompt": prompts, "negative_prompt": negatives})
        warn_of_foreign_syntax({"prompt_2": second.prompts, "negative_prompt_2": second.negatives})
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
            second=second,
            zero_negative=model.zeros_for_no_negative & missing_texts(self.negative_prompt, len(prompts)),
            time_ids=self._time_ids(model, shape, guided, init_image is not None),
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

    def _second_prompts(self, model: ModelConfigs, prompts: list[str], negatives: list[str]) -> PromptPairs:
        """What a second text encoder reads: by default the same as the first."""
        given = {"prompt_2": self.prompt_2, "negative_prompt_2": self.negative_prompt_2}
        for name, value in given.items():
            if value is not None and not model.second_text_encoder:
                raise InputError(f"{argument(name)} is for a second text encoder; {model.name} has one")
        if self.negative_prompt_2 is not None and model.zeros_for_no_negative and self.negative_prompt is None:
            raise InputError(
                f"{argument('negative_prompt_2')} has no effect without {argument('negative_prompt')}: this model has "
                "zeros for text then; give both"
            )
        second = prompts if self.prompt_2 is None else self.prompt_2
        if not isinstance(second, str) and len(second) != len(prompts):
            count = len(second)
            raise InputError(f"{count} texts in {argument('prompt_2')} for {len(prompts)} prompts; give one for each")
        texts = [second] * len(prompts) if isinstance(second, str) else second
        return prompt_pairs(texts, negatives if self.negative_prompt_2 is None else self.negative_prompt_2)

    def _time_ids(self, model: ModelConfigs, shape: LatentShape, guided: bool, from_image: bool) -> np.ndarray | None:
        if model.unet.pooled_dim is None:
            if self.sizes.given:
                raise InputError(
                    f"{argument(self.sizes.given[0])} is for SDXL; {model.name} is not conditioned on sizes"
                )
            return None
        height, width = (side * model.vae.downscale for side in shape[:2])
        return self.sizes.time_ids(height, width, guided=guided, from_image=from_image)

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
    second: PromptPairs  # what a second text encoder reads
    zero_negative: np.ndarray  # (P,) bool: whose unconditional branch has zeros for text
    time_ids: np.ndarray | None  # (G, 6), where the UNet is conditioned on sizes
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
