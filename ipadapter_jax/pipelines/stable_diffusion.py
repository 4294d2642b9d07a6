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
from jax import Array
from jax.sharding import Mesh

from ipadapter_jax.diffusion.samplers import SamplerRun, sample_table
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.arrays import to_python_number
from ipadapter_jax.inputs.prompt_syntax import warn_of_foreign_syntax
from ipadapter_jax.inputs.validation import (
    Uncond,
    check_choices,
    check_dtype,
    check_guided,
    check_latents,
    latent_shape,
    prompt_pairs,
    resolve_seeds,
)
from ipadapter_jax.models.clip import CLIPText
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import attention_grids, cross_attention_layers
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.pipelines import sampling
from ipadapter_jax.pipelines.attention_maps import AttentionMaps
from ipadapter_jax.pipelines.image_prompt_settings import ImagePrompt, ImagePromptSettings, PerPrompt
from ipadapter_jax.pipelines.image_prompts import PlannedImageBranch, entry_weights, plan_image_branches
from ipadapter_jax.pipelines.inpainting import InitImage, encoded_posteriors, open_init_image, start, strength_of
from ipadapter_jax.pipelines.ip_adapter import Adapter, ImageLike, OpenedAdapter, open_adapter
from ipadapter_jax.pipelines.masks import layer_masks
from ipadapter_jax.pipelines.noise import INITIAL, taken_noise
from ipadapter_jax.pipelines.outputs import check_finite, images_of
from ipadapter_jax.runtime.compilation_cache import enable_compilation_cache
from ipadapter_jax.runtime.memory_limits import check_sampling_memory
from ipadapter_jax.runtime.mesh import local_mesh, replicated
from ipadapter_jax.runtime.progress_bar import step_bar
from ipadapter_jax.weights.base_model import BASE_COMPONENTS, BaseModel, check_text_to_image
from ipadapter_jax.weights.load_tree import Tree
from ipadapter_jax.weights.model_source import ModelSource
from ipadapter_jax.weights.open_base_model import open_base
from ipadapter_jax.weights.tokenizer import Tokenizer, tokenize

DTYPES = ("float32", "bfloat16", "float16")
GUIDANCE_SCALE = 7.5  # Stable Diffusion's usual one


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StableDiffusion:
    """A Stable Diffusion 1.x model, ready to sample on all devices of this process. Nothing in it is ever changed:
    `with_ip_adapter` returns another pipeline that shares the weights."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    params: dict[str, Tree]
    mesh: Mesh
    sources: dict[str, Path]
    adapters: tuple[Adapter, ...] = ()
    guidance_scale: float = GUIDANCE_SCALE  # where a call names none

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        adapters = ", ".join(adapter.source.name for adapter in self.adapters) or "none"
        return f"StableDiffusion({count:,} parameters in {jnp.dtype(self.unet.dtype)}, adapters: {adapters})"

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
        parts = {name: base.part(name).load(jnp.dtype(dtype), put) for name in BASE_COMPONENTS}
        return cls(
            **{name: part.module for name, part in parts.items()},
            tokenizer=base.tokenizer,
            schedule=schedule,
            params={name: part.params for name, part in parts.items()},
            mesh=mesh,
            sources={name: part.source for name, part in parts.items()},
            guidance_scale=base.guidance_scale or GUIDANCE_SCALE,
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
        ip_adapter_image: ImagePrompt | PerPrompt | Sequence[ImagePrompt] | None = None,
        ip_adapter_image_embeds: Sequence[Any] | None = None,
        negative_ip_adapter_image: ImagePrompt | None = None,
        ip_adapter_uncond: Uncond = "default",
        ip_adapter_scale: Any = 1.0,
        ip_adapter_masks: Sequence[Any] | None = None,
        fit: str = "crop",
        image: ImageLike | None = None,
        mask_image: ImageLike | None = None,
        strength: float | None = None,
        exact_outside_mask: bool = False,
        negative_prompt: str | Sequence[str] | None = "",
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int = 0,
        scheduler: str = "ddim",
        scheduler_config: Mapping[str, Any] | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = 0,
        latents: np.ndarray | None = None,
        output_type: str = "pil",
        return_attention_maps: bool = False,
        callback: sampling.OnStep | None = None,
        progress_bar: bool = True,
    ) -> Any:
        """Images for every prompt, prompt-major.

        ip_adapter_image: one image, several for one adapter (their tokens share one softmax), or with several
        adapters a list of these, one per adapter; each a PIL image, an array (of numpy, jax or torch) or a path,
        brought to a square by `fit` ("crop", "resize", "pad", or "tile": several squares). `PerPrompt` holds one for
        each prompt; a flat list of as many images as prompts is refused, as both may be meant.
        ip_adapter_image_embeds instead: per adapter the encoder's features (G, n, ...), the negative branch first when
        guidance_scale > 1 (G = 2), or a file of them. negative_ip_adapter_image: what the unconditional branch sees,
        by default what `ip_adapter_uncond` says.
        ip_adapter_scale: lambda of the paper, one or one per adapter: a number, a preset's name, diffusers' dictionary
        or a `Scale`; in a list in the list one for each image. ip_adapter_masks: where each image acts.
        image: an image to paint over, by the last `strength` (0.8; with a mask 1) of the steps, in its own size unless
        height and width are given; mask_image: white where to paint; exact_outside_mask: its own pixels elsewhere.
        scheduler: ddim, ddpm, pndm, dpmsolver++, euler, euler_a, unipc or lcm; scheduler_config changes settings of
        the model's scheduler_config.json, such as {"use_karras_sigmas": True, "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True}. seed: image i uses seed + i, or seed[i], and nothing else; None draws one and
        prints it. latents (B, h, w, 4): standard normal. guidance_scale: by default the pipeline's own; <= 1 leaves the
        unconditional branch out. clip_skip: layers of the text encoder to leave out for the prompt. callback(step,
        timestep, latents) is called after every step, and progress_bar shows them in a terminal or a notebook; with
        either each step is a jitted call of its own.

        Returns PIL images ("pil"), a float array (B, H, W, 3) in [0, 1] ("np") or the final latents ("latent"), with
        return_attention_maps in a pair with `AttentionMaps`. Raises InputError before anything is compiled when an
        argument cannot be used or would have no effect, NonFiniteImageError when what comes out is not finite.
        """
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        numbers = guidance_scale, guidance_rescale, eta, strength, height, width
        guidance_scale, guidance_rescale, eta, strength, height, width = to_python_number(numbers)
        prompts, negatives = prompt_pairs(prompt, negative_prompt)
        layers = self.text_encoder.config.num_hidden_layers
        check_choices(
            num_images_per_prompt, guidance_scale, guidance_rescale, clip_skip, layers, eta, output_type, callback
        )
        check_guided(guidance_scale, negatives, guidance_rescale)
        warn_of_foreign_syntax({"prompt": prompts, "negative_prompt": negatives})
        if exact_outside_mask and output_type == "latent":
            raise InputError(f"{argument('exact_outside_mask')} is for images; latents hold no pixels to keep")
        init_image = self._init_image(image, mask_image, strength, exact_outside_mask, height, width)
        strength = strength_of(strength, image, mask_image)
        schedule = self.schedule.changed(scheduler_config or {}, scheduler)
        run = sample_table(scheduler, schedule, num_inference_steps, eta, strength)
        shape = self._latent_shape(*((height, width) if init_image is None else init_image.image.shape[:2]))
        count = len(prompts) * num_images_per_prompt
        check_sampling_memory(
            self.unet, self.vae, count, shape[:2], run, self.mesh.devices.flat, guided=guidance_scale > 1
        )
        given = {} if latents is None else {INITIAL: check_latents(latents, (count, *shape), self.unet.dtype)}
        controls = ImagePromptSettings(
            images=ip_adapter_image,
            embeds=ip_adapter_image_embeds,
            negative=negative_ip_adapter_image,
            uncond=ip_adapter_uncond,
            scale=ip_adapter_scale,
            masks=ip_adapter_masks,
            fit=fit,
        )
        entries = self._entries(controls, run, guidance_scale, shape, len(prompts))
        if return_attention_maps and not entries:
            raise InputError(f"{argument('return_attention_maps')} needs an image prompt to look at")
        seeds = resolve_seeds(seed, count, used=not given or init_image is not None or bool(np.any(run.steps.noise)))
        inpaint_unet = self.unet.config.in_channels != shape[-1]
        encoded = encoded_posteriors(init_image, strength, inpaint_unet=inpaint_unet)
        given |= taken_noise().by_number(encoded, not given, np.asarray(run.steps.noise), (count, *shape))

        batch = sampling.SampleBatch(self.mesh, seeds, np.repeat(np.arange(len(prompts)), num_images_per_prompt), given)
        began = start(init_image, self.vae, self.params["vae"], batch, run, encoded, shape, strength)
        conditions = self._conditions(
            prompts, negatives, clip_skip, guidance_scale, guidance_rescale, entries, shape, batch
        )
        denoise = functools.partial(sampling.denoise, self.unet, self.mesh, return_attention_maps, self.params["unet"])
        weight = entry_weights(entries, conditions, len(run.steps.timestep))
        with step_bar(progress_bar, len(run.steps.timestep), callback) as on_step:
            final, maps = sampling.run_steps(denoise, run.steps, weight, conditions, batch, began, on_step)
        if output_type == "latent":
            found = np.asarray(final)[:count]
            check_finite(found, "latents of image")
        else:
            decoded = np.asarray(sampling.decode(self.vae, self.mesh, self.params["vae"], final))[:count]
            found = images_of(decoded, output_type, init_image if exact_outside_mask else None)
        if maps is None:
            return found
        maps = [seen for seen, entry in zip(maps, entries, strict=True) if not entry.swapped]
        sites, grids = cross_attention_layers(self.unet.config), attention_grids(self.unet.config, *shape[:2])
        return found, AttentionMaps(maps, sites, grids, np.asarray(run.steps.timestep), count)

    def _init_image(
        self, image: Any, mask: Any, strength: float | None, exact: bool, height: int | None, width: int | None
    ) -> InitImage | None:
        """The image to paint over, if there is one. Raises InputError when the model cannot, or has to."""
        if mask is None:
            check_text_to_image(str(self.sources.get("unet", "of this pipeline")), self.unet.config)
        size, sees_mask = (height, width), self.unet.config.in_channels != self.unet.config.out_channels
        return open_init_image(image, mask, strength, exact, size, self.vae.config.downscale, sees_mask=sees_mask)

    def _entries(
        self,
        controls: ImagePromptSettings,
        run: SamplerRun,
        guidance_scale: float,
        shape: tuple[int, ...],
        prompts: int,
    ) -> list[PlannedImageBranch]:
        scale, steps = self.vae.config.downscale, len(run.steps.timestep)
        sites, size = cross_attention_layers(self.unet.config), (shape[0] * scale, shape[1] * scale)
        return plan_image_branches(controls, self.adapters, sites, steps, guidance_scale > 1, size, prompts, scale)

    def _conditions(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        clip_skip: int,
        guidance_scale: float,
        guidance_rescale: float,
        entries: Sequence[PlannedImageBranch],
        shape: tuple[int, ...],
        batch: sampling.SampleBatch,
    ) -> sampling.Conditions:
        """Runs the encoders: all that a network sees beside latents and time."""
        branches = [self._text(prompts, clip_skip)]
        if guidance_scale > 1:
            branches.insert(0, self._text(negatives, 0))  # diffusers leaves out layers for the prompt alone
        image_kv = [entry.keys_values() for entry in entries]
        several = max([kv[0][0].shape[0] for kv in image_kv], default=1) > 1
        return sampling.Conditions(
            prompt_of_image=batch.prompt_of_image,
            reference_of_image=batch.prompt_of_image if several else jnp.zeros_like(batch.prompt_of_image),
            text_kv=sampling.text_keys_values(self.unet, self.params["unet"], jnp.stack(branches, axis=1)),
            image_kv=image_kv,
            image_masks=layer_masks([entry.mask for entry in entries], attention_grids(self.unet.config, *shape[:2])),
            guidance_scale=np.float32(guidance_scale),
            guidance_rescale=np.float32(guidance_rescale),
        )

    def _text(self, prompts: Sequence[str], clip_skip: int) -> Array:
        """Text states (P, S, D)."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        ids = tokenize(self.tokenizer, prompts, length)
        return sampling.encode_prompt(self.text_encoder, clip_skip, self.params["text_encoder"], ids)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        scale, own = self.vae.config.downscale, self.unet.config.sample_size
        if own is None and (height is None or width is None):
            raise InputError(f"this model does not say its size; give {argument('height')} and {argument('width')}")
        h, w = own if isinstance(own, tuple) else (own or 0, own or 0)
        height, width = h * scale if height is None else height, w * scale if width is None else width
        return latent_shape(height, width, scale, self.vae.config.latent_channels)
