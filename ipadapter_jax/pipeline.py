"""`StableDiffusion`: a text-to-image model with image prompts, in the words of diffusers' pipelines."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from ipadapter_jax import sampling
from ipadapter_jax.adapters import Adapter, ImagePrompt, OpenedAdapter, open_adapter
from ipadapter_jax.arguments import (
    check_choices,
    given_latents,
    image_weights,
    latent_shape,
    prompt_pairs,
    prompts_of_adapters,
    seeds_of,
)
from ipadapter_jax.base_model import BASE_COMPONENTS, BaseModel, check_text_to_image, open_base
from ipadapter_jax.compilation_cache import enable_compilation_cache
from ipadapter_jax.diffusion.samplers import sample_table
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.diffusion.steps import State, Steps, begin
from ipadapter_jax.errors import InputError
from ipadapter_jax.models.clip import CLIPText
from ipadapter_jax.models.unet import UNet, cross_attention_sites
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.preprocess import to_uint8
from ipadapter_jax.tokens import tokenize
from ipadapter_jax.weights.tree import Tree

DTYPES = ("float32", "bfloat16", "float16")
GUIDANCE_SCALE = 7.5  # Stable Diffusion's usual one

OnStep = Callable[[int, float, Array], None]
"""Called after every step with its number, its timestep and the latents (B, h, w, 4)."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StableDiffusion:
    """A Stable Diffusion 1.x model, ready to sample on all devices of this process. Nothing in it is ever changed:
    `with_ip_adapter` returns another pipeline that shares the weights."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: Any
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
        float32. `variant` ("fp16") picks such weight files. A single file takes tokenizer and settings from `config`, a
        folder or Hub id of its family, by default Stable Diffusion 1.5's, and with `extract_ema` the UNet's moving
        average. `vae` and `text_encoder`, folders, Hub ids or files, stand in for the model's own. Raises InputError,
        WeightFileError among them, before any weights are read when the parts do not fit.
        """
        options = {"config": config, "vae": vae, "text_encoder": text_encoder, "extract_ema": extract_ema}
        return cls.from_opened(open_base(path, variant=variant, revision=revision, **options), dtype)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_opened(cls, base: BaseModel, dtype: str = "float32") -> "StableDiffusion":
        """Reads the weights of a base model that was opened."""
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
        enable_compilation_cache()
        base.check()
        mesh, schedule = sampling.device_mesh(), base.schedule
        put = functools.partial(jax.device_put, device=sampling.replicated(mesh))
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
        self, path: str | os.PathLike, *, image_encoder: str | os.PathLike | None = None, revision: str | None = None
    ) -> "StableDiffusion":
        """This pipeline with one more adapter: a file, "owner/name/path/in/repository.safetensors" on the Hub, or for
        the base model "mini" its own "mini" (4 tokens) and "mini-plus" (16).

        `image_encoder` is a folder or Hub place with CLIP's vision model; by default the folder `image_encoder` beside
        the adapter, as in the authors' repository. Raises WeightFileError when adapter, base and encoder do not fit.
        """
        return self.with_opened(open_adapter(path, image_encoder, self.unet.config, revision))

    def with_opened(self, adapter: OpenedAdapter) -> "StableDiffusion":
        """This pipeline with an adapter that was opened for its UNet."""
        put = functools.partial(jax.device_put, device=sampling.replicated(self.mesh))
        return dataclasses.replace(self, adapters=(*self.adapters, adapter.load(self.unet.dtype, put, self.adapters)))

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        ip_adapter_image: ImagePrompt | Sequence[ImagePrompt] | None = None,
        ip_adapter_image_embeds: Sequence[np.ndarray] | None = None,
        ip_adapter_scale: float | Sequence[float] = 1.0,
        fit: str = "crop",
        negative_prompt: str | Sequence[str] | None = "",
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        scheduler: str = "ddim",
        scheduler_config: Mapping[str, Any] | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        latents: np.ndarray | None = None,
        output_type: str = "pil",
        callback: OnStep | None = None,
    ) -> Any:
        """Pictures for every prompt, prompt-major.

        ip_adapter_image: one picture, several for one adapter (their tokens share one softmax), or with several
        adapters a list of these, one per adapter; each a PIL image, an array or a path, brought to a square by `fit`
        ("crop", "resize", "pad"). ip_adapter_image_embeds instead: per adapter the encoder's features (G, n, ...), the
        negative branch first when guidance_scale > 1 (G = 2). ip_adapter_scale: lambda of the paper, one or one per
        adapter. scheduler: ddim, ddpm, pndm, dpmsolver++, euler, euler_a, unipc or lcm; scheduler_config changes
        settings of the model's scheduler_config.json, such as {"use_karras_sigmas": True, "timestep_spacing":
        "trailing", "rescale_betas_zero_snr": True}. seed: picture i uses seed + i, or seed[i], and nothing else.
        latents (B, h, w, 4): standard normal. guidance_scale: by default the pipeline's own; <= 1 leaves the
        unconditional branch out. callback(step, timestep, latents) is called after every step; then each step is a
        jitted call of its own.

        Returns PIL images ("pil"), a float array (B, H, W, 3) in [0, 1] ("np") or the final latents ("latent"). Raises
        InputError before anything is compiled when an argument cannot be used.
        """
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        prompts, negatives = prompt_pairs(prompt, negative_prompt)
        check_choices(num_images_per_prompt, guidance_scale, eta, output_type, callback)
        check_text_to_image(str(self.sources.get("unet", "of this pipeline")), self.unet.config)
        steps, sigma = sample_table(scheduler, self.schedule.changed(scheduler_config or {}), num_inference_steps, eta)
        shape = self._latent_shape(height, width)
        count = len(prompts) * num_images_per_prompt
        seeds = seeds_of(seed, count)
        given = None if latents is None else given_latents(latents, (count, *shape))
        weight = image_weights(ip_adapter_scale, len(self.adapters), len(cross_attention_sites(self.unet.config)))
        guided = guidance_scale > 1
        features = self._features(ip_adapter_image, ip_adapter_image_embeds, fit, guided)

        ids = np.stack([self._tokenize(texts) for texts in ((negatives, prompts) if guided else (prompts,))], axis=1)
        text = sampling.encode_prompt(self.text_encoder, self.params["text_encoder"], ids.reshape(-1, ids.shape[-1]))
        text = text.reshape(*ids.shape[:2], *text.shape[1:])
        text_kv = sampling.text_keys_values(self.unet, self.params["unet"], text)
        image_kv = [a.keys_values(f()) for a, f in zip(self.adapters, features, strict=True)]
        batch = sampling.Batch(self.mesh, seeds, np.repeat(np.arange(len(prompts)), num_images_per_prompt))
        first = batch.noise(shape, 0) if given is None else batch.spread(given)
        final = self._denoise(
            sampling.placed(begin(first * np.float32(sigma)), self.mesh),
            steps,
            batch,
            functools.partial(sampling.denoise, self.unet, self.mesh, self.params["unet"]),
            (batch.prompt_of_image, text_kv, image_kv, weight, np.float32(guidance_scale)),
            callback,
        )
        if output_type == "latent":
            return np.asarray(final)[:count]
        decoded = np.asarray(sampling.decode(self.vae, self.mesh, self.params["vae"], final))[:count]
        return _pictures(decoded, output_type)

    def _denoise(
        self,
        state: State,
        steps: Steps,
        batch: sampling.Batch,
        run: Callable,
        conditions: tuple,
        on_step: OnStep | None,
    ) -> Array:
        """All steps in one call, or with `on_step` one call per step."""
        stochastic, total = bool(np.any(steps.noise)), len(steps.timestep)
        length = total if on_step is None else 1
        for first in range(0, total, length):
            segment = jax.tree.map(lambda field, first=first: field[first : first + length], steps)
            numbers = range(first, first + length)
            noise = jnp.stack([batch.noise(state.x.shape[1:], 1 + i) for i in numbers]) if stochastic else None
            state = run(state, segment, noise, *conditions)
            if on_step is not None:
                on_step(first, float(segment.timestep[0]), state.x[: batch.count])
        return state.x

    def _tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        return tokenize(self.tokenizer, prompts, length)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        scale, own = self.vae.config.downscale, self.unet.config.sample_size
        if own is None and (height is None or width is None):
            raise InputError("this model does not say its size; give height and width")
        h, w = own if isinstance(own, tuple) else (own or 0, own or 0)
        height, width = h * scale if height is None else height, w * scale if width is None else width
        return latent_shape(height, width, scale, self.unet.config.in_channels)

    def _features(self, images, embeds, fit: str, guided: bool) -> list[Callable[[], Array]]:
        """Per adapter a function that gives its features (G, n, ...): pictures are read now, encoders run later."""
        given = prompts_of_adapters(images, embeds, len(self.adapters))
        if embeds is not None:
            return [a.from_embeds(e, guided) for a, e in zip(self.adapters, given, strict=True)]
        return [a.from_images(i, fit, guided) for a, i in zip(self.adapters, given, strict=True)]


def _pictures(decoded: np.ndarray, output_type: str) -> Any:
    if not np.isfinite(decoded).all():
        raise InputError(
            "the picture is not finite: float16 overflowed or the weights are damaged; try bfloat16 or float32"
        )
    pixels = np.clip(decoded / 2 + 0.5, 0.0, 1.0)
    if output_type == "np":
        return pixels
    from PIL import Image

    return [Image.fromarray(picture) for picture in to_uint8(pixels)]
