"""`StableDiffusion`: a text-to-image model with image prompts, in the words of diffusers' pipelines."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.inputs.validation import Uncond, check_callback, check_dtype
from ipadapter_jax.models.clip import CLIPText
from ipadapter_jax.models.text_encoders import TextEncoders
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import attention_grids, cross_attention_layers
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.adapter_inputs import GivenEmbeds
from ipadapter_jax.pipelines.attention_maps import AttentionMaps
from ipadapter_jax.pipelines.denoise import OnStep, run_sampler
from ipadapter_jax.pipelines.denoiser import UNET, Denoiser
from ipadapter_jax.pipelines.encode_plan import encode_plan
from ipadapter_jax.pipelines.feature_encoder import ImageLike
from ipadapter_jax.pipelines.image_prompt_settings import (
    GivenImages,
    GivenMasks,
    GivenScales,
    ImagePrompt,
)
from ipadapter_jax.pipelines.inpainting import start
from ipadapter_jax.pipelines.ip_adapter import Adapter, OpenedAdapter, open_adapter
from ipadapter_jax.pipelines.outputs import SamplingResult, check_finite, images_of
from ipadapter_jax.pipelines.request import ModelConfigs, SamplingPlan, SamplingRequest
from ipadapter_jax.pipelines.sample_batch import SampleBatch
from ipadapter_jax.pipelines.size_conditioning import GivenSize, SizeConditioning
from ipadapter_jax.pipelines.text_conditioner import TextConditioner
from ipadapter_jax.runtime.compilation_cache import enable_compilation_cache
from ipadapter_jax.runtime.mesh import local_mesh, replicated
from ipadapter_jax.runtime.progress_bar import step_bar
from ipadapter_jax.weights.base_model import BaseModel
from ipadapter_jax.weights.load_tree import Tree
from ipadapter_jax.weights.model_source import ModelSource
from ipadapter_jax.weights.open_base_model import open_base
from ipadapter_jax.weights.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
GUIDANCE_SCALE = 7.5  # Stable Diffusion's usual one


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StableDiffusion:
    """A Stable Diffusion model (1.x, 2.x, XL), ready to sample on all devices of this process. Nothing in it is ever
    changed: `with_ip_adapter` returns another pipeline that shares the weights."""

    unet: UNet
    vae: VAE
    text: TextConditioner
    schedule: NoiseSchedule
    params: dict[str, Tree]  # by part: "unet", "vae" and the text encoders
    mesh: Mesh
    sources: dict[str, Path]
    adapters: tuple[Adapter, ...] = ()
    guidance_scale: float = GUIDANCE_SCALE  # where a call names none
    zeros_for_no_negative: bool = False  # whether no negative prompt means zeros in place of text states

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        adapters = ", ".join(adapter.source.name for adapter in self.adapters) or "none"
        return f"StableDiffusion({count:,} parameters in {jnp.dtype(self.unet.dtype)}, adapters: {adapters})"

    @property
    def text_encoder(self) -> CLIPText:  # the first
        return self.text.encoders.first.network

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the first text encoder."""
        return self.text.tokenizers[self.text.encoders.first.role.part]

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: str = "float32",
        variant: str | None = None,
        revision: str | None = None,
        config: str | os.PathLike | None = None,
        vae: str | os.PathLike | None = None,
        text_encoder: str | os.PathLike | None = None,
        extract_ema: bool = False,
    ) -> "StableDiffusion":
        """From a folder in diffusers' layout (PyTorch or Flax weights), a single file of the first layout
        (.safetensors or .ckpt), a Hub id, or "mini": the model inside this package ("./mini" is a folder of that name).

        `dtype` is that of weights and networks: float32, bfloat16 or float16; norms, softmax and the sampler stay in
        float32. The other arguments are those of `ModelSource`. Raises InputError, WeightFileError among them, before
        any weights are read when the parts do not fit.
        """
        source = ModelSource(path, variant, revision, config, vae, text_encoder, extract_ema)
        return cls.from_opened(open_base(source), dtype)

    @classmethod
    def from_opened(cls, base: BaseModel, dtype: str = "float32") -> "StableDiffusion":
        """Reads the weights of a base model that was opened."""
        dtype = check_dtype(dtype, DTYPES)
        enable_compilation_cache()
        base.check()
        mesh, schedule = local_mesh(), base.schedule
        put = functools.partial(jax.device_put, device=replicated(mesh))
        parts = {name: base.part(name).load(jnp.dtype(dtype), put) for name in base.components}
        encoders = TextEncoders.of(base.family, {part: parts[part].module for part in base.tokenizers})
        return cls(
            unet=parts["unet"].module,
            vae=parts["vae"].module,
            text=TextConditioner(encoders, base.tokenizers),
            schedule=schedule,
            params={name: part.params for name, part in parts.items()},
            mesh=mesh,
            sources={name: part.source for name, part in parts.items()},
            guidance_scale=base.guidance_scale or GUIDANCE_SCALE,
            zeros_for_no_negative=base.zeros_for_no_negative,
        )

    def with_ip_adapter(
        self,
        path: str | os.PathLike,
        *,
        image_encoder: str | os.PathLike | Literal[False] | None = None,
        revision: str | None = None,
    ) -> "StableDiffusion":
        """This pipeline with one more adapter: a file, "owner/name/path/in/repository.safetensors" on the Hub, or for
        the base model "mini" its own "mini" (4 tokens) and "mini-plus" (16).

        `image_encoder` is a folder or Hub place with CLIP's vision model; by default the folder `image_encoder` beside
        the adapter, as in the authors' repository; False leaves it out, for embeddings alone. Raises WeightFileError
        when adapter, base and encoder do not fit.
        """
        return self.with_opened(open_adapter(path, image_encoder, self.unet.config, revision))

    def with_opened(self, adapter: OpenedAdapter) -> "StableDiffusion":
        """This pipeline with an adapter that was opened for its UNet."""
        put = functools.partial(jax.device_put, device=replicated(self.mesh))
        return dataclasses.replace(self, adapters=(*self.adapters, adapter.load(self.unet.dtype, put, self.adapters)))

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        ip_adapter_image: GivenImages | None = None,
        ip_adapter_image_embeds: Sequence[GivenEmbeds] | GivenEmbeds | None = None,
        negative_ip_adapter_image: ImagePrompt | None = None,
        ip_adapter_uncond: Uncond = "default",
        ip_adapter_scale: GivenScales = 1.0,
        ip_adapter_masks: GivenMasks | None = None,
        fit: str = "crop",
        image: ImageLike | None = None,
        mask_image: ImageLike | None = None,
        strength: float | None = None,
        exact_outside_mask: bool = False,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        original_size: GivenSize | None = None,
        crops_coords_top_left: GivenSize = (0, 0),
        target_size: GivenSize | None = None,
        negative_original_size: GivenSize | None = None,
        negative_crops_coords_top_left: GivenSize = (0, 0),
        negative_target_size: GivenSize | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int = 0,
        scheduler: str = "ddim",
        scheduler_config: Mapping[str, object] | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = 0,
        latents: np.ndarray | None = None,
        output_type: str = "pil",
        return_attention_maps: bool = False,
        callback: OnStep | None = None,
        progress_bar: bool = True,
    ) -> Any:
        """Generates images for every prompt, those of one prompt one after the other.

        Image prompts:
            ip_adapter_image: one image; several for one adapter, whose tokens share one softmax; or with several
                adapters a list with one of these for each. An image is a path, an https URL, a PIL image or an array
                (numpy, jax or torch). `PerPrompt` holds one for each prompt; a flat list of as many images as prompts
                is refused, because both could be meant.
            fit: how a reference image becomes square: "crop", "resize", "pad", or "tile" (several squares of it).
            ip_adapter_image_embeds: in place of images, for each adapter the image features (G, n, ...), the negative
                ones first when guidance_scale > 1 (G = 2), or a file of them.
            negative_ip_adapter_image: what the unconditional branch sees; by default what `ip_adapter_uncond` says.
            ip_adapter_scale: lambda of the paper, one or one for each adapter: a number, a preset's name, diffusers'
                dictionary or a `Scale`; a list in the list has one for each image.
            ip_adapter_masks: where each image acts.

        Initial image:
            image: for image-to-image, in its own size unless height and width are given. With `mask_image`, white
                where to generate, inpainting. `strength`: the fraction of the steps that run (0.8; with a mask 1).
            exact_outside_mask: keeps the pixels of `image` where the mask is black.

        SDXL:
            prompt_2, negative_prompt_2: what the second text encoder reads, by default the same as the first. Without
                a negative prompt the unconditional branch has zeros for text, as most of these models want it.
            original_size, crops_coords_top_left, target_size: (height, width) and (top, left) in pixels that the model
                is told, by default those of the whole generated image; and the same for the unconditional branch,
                which has sizes of its own only where both are given.

        Sampling:
            scheduler: ddim, ddpm, pndm, dpmsolver++, euler, euler_a, unipc or lcm. scheduler_config changes settings of
                the model's scheduler_config.json, such as {"use_karras_sigmas": True, "timestep_spacing": "trailing"}.
            guidance_scale: by default the pipeline's own; up to 1 there is no unconditional branch.
            clip_skip: how many of the text encoder's last layers the prompt leaves out.
            seed: image i depends on seed + i, or seed[i], alone; None picks one at random and prints it.
            latents: (B, h, w, 4) in place of the initial noise, standard normal.
            callback(step, timestep, latents) is called after every step. With it, or with a visible progress bar, each
                step is a jitted call of its own.

        Returns PIL images ("pil"), a float array (B, H, W, 3) in [0, 1] ("np") or the final latents ("latent"); with
        return_attention_maps a pair of these and `AttentionMaps`. Raises InputError before anything is compiled when
        an argument cannot be used or would have no effect, NonFiniteImageError when an image is not finite.
        """
        request = SamplingRequest(
            prompt=prompt,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
            negative_ip_adapter_image=negative_ip_adapter_image,
            ip_adapter_uncond=ip_adapter_uncond,
            ip_adapter_scale=ip_adapter_scale,
            ip_adapter_masks=ip_adapter_masks,
            fit=fit,
            image=image,
            mask_image=mask_image,
            strength=strength,
            exact_outside_mask=exact_outside_mask,
            negative_prompt=negative_prompt,
            prompt_2=prompt_2,
            negative_prompt_2=negative_prompt_2,
            sizes=SizeConditioning(
                original_size=original_size,
                crops_coords_top_left=crops_coords_top_left,
                target_size=target_size,
                negative_original_size=negative_original_size,
                negative_crops_coords_top_left=negative_crops_coords_top_left,
                negative_target_size=negative_target_size,
            ),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            clip_skip=clip_skip,
            scheduler=scheduler,
            scheduler_config=scheduler_config,
            eta=eta,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            seed=seed,
            latents=latents,
            output_type=output_type,
            return_attention_maps=return_attention_maps,
        )
        check_callback(callback)
        found = self.sample(request.resolve(self.configs), callback=callback, progress_bar=progress_bar)
        return found.images if found.maps is None else (found.images, found.maps)

    @property
    def configs(self) -> ModelConfigs:
        """What `SamplingRequest.resolve` needs of this pipeline."""
        return ModelConfigs(
            name=str(self.sources.get("unet", "of this pipeline")),
            unet=self.unet.config,
            vae=self.vae.config,
            text_layers=self.text.encoders.layers,
            second_text_encoder=len(self.text.tokenizers) > 1,
            zeros_for_no_negative=self.zeros_for_no_negative,
            schedule=self.schedule,
            dtype=self.unet.dtype,
            guidance_scale=self.guidance_scale,
            adapters=[adapter.inputs for adapter in self.adapters],
        )

    def sample(
        self, plan: SamplingPlan, *, callback: OnStep | None = None, progress_bar: bool = True
    ) -> SamplingResult:
        """The images of a plan that was made for this pipeline's `configs`."""
        count, vae_params = len(plan.seeds), self.params["vae"]
        batch = SampleBatch(self.mesh, plan.seeds, plan.prompt_of_sample, plan.given_noise)
        encode = functools.partial(programs.encode_init_image, self.vae, vae_params)
        begin = start(
            plan.init_image, encode, batch, plan.run, plan.encoded_posteriors, plan.latent_shape, plan.strength
        )
        conditioning = encode_plan(self.unet, self.text, self.adapters, self.params, plan, batch, begin)
        denoiser = Denoiser(self.unet, attention_maps=plan.attention_maps)
        program = functools.partial(programs.denoise, denoiser, self.mesh, {UNET: self.params["unet"]})
        with step_bar(progress_bar, plan.num_steps, callback) as on_step:
            final, maps = run_sampler(program, plan.run.steps, begin.latents, conditioning, batch, on_step)
        if plan.output_type == "latent":
            images = np.asarray(final)[:count]
            check_finite(images, "latents of image")
        else:
            decoded = np.asarray(programs.decode(self.vae, self.mesh, vae_params, final))[:count]
            images = images_of(decoded, plan.output_type, plan.init_image if plan.exact_outside_mask else None)
        if maps is None:
            return SamplingResult(images, None)
        branches = [branch for prompt in plan.image_prompts for branch in prompt.branches]
        maps = [attention for attention, branch in zip(maps, branches, strict=True) if not branch.swapped]
        layers = cross_attention_layers(self.unet.config)
        grids = attention_grids(self.unet.config, *plan.latent_shape[:2])
        timesteps = np.asarray(plan.run.steps.timestep)
        return SamplingResult(images, AttentionMaps(maps, layers, grids, timesteps, count))
