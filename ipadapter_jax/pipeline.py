"""`StableDiffusion`: a text-to-image model with image prompts, in the words of diffusers' pipelines."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from ipadapter_jax import sampling
from ipadapter_jax.adapters import Adapter, ImagePrompt, load_adapter
from ipadapter_jax.compilation_cache import enable_compilation_cache
from ipadapter_jax.diffusion.ddim import DDIMSteps, ddim_steps
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError
from ipadapter_jax.models.clip import CLIPText
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.preprocess import to_uint8
from ipadapter_jax.tokens import load_tokenizer, tokenize
from ipadapter_jax.weights.components import (
    TEXT_ENCODER,
    UNET,
    VAE_COMPONENT,
    choose_files,
    load_component,
    read_json,
)
from ipadapter_jax.weights.hub import local_path
from ipadapter_jax.weights.tree import Tree

DTYPES = ("float32", "bfloat16", "float16")
_FOLDERS = {"unet": UNET, "vae": VAE_COMPONENT, "text_encoder": TEXT_ENCODER}
_EXTRAS = ("model_index.json", "tokenizer/*", "scheduler/*.json")

OnStep = Callable[[int, int, Array], None]
"""Called after every step with its number, its timestep and the latents (B, h, w, 4)."""


@dataclasses.dataclass(frozen=True)
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

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: str = "float32",
        variant: str | None = None,
        revision: str | None = None,
    ) -> "StableDiffusion":
        """From a folder in diffusers' layout (PyTorch or Flax weights) or a Hub id.

        `dtype` is that of weights and networks: float32, bfloat16 or float16; norms, softmax and the sampler stay in
        float32. `variant` ("fp16") picks such weight files. Raises InputError (or WeightFileError) naming what is wrong.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
        enable_compilation_cache()
        choose = functools.partial(choose_files, folders=_FOLDERS, extras=_EXTRAS, variant=variant)
        root = local_path(path, choose, what="base model", revision=revision)
        if not (root / "unet").is_dir():
            raise InputError(f"base model {path}: no folder in diffusers' layout (it has no unet/config.json)")
        schedule = NoiseSchedule.from_json(read_json(root / "scheduler" / "scheduler_config.json"))
        tokenizer = load_tokenizer(root / "tokenizer")
        mesh = sampling.device_mesh()
        put = functools.partial(jax.device_put, device=sampling.replicated(mesh))
        load = functools.partial(load_component, dtype=jnp.dtype(dtype), variant=variant, put=put)
        parts = {name: load(component, root / name) for name, component in _FOLDERS.items()}
        if len(tokenizer) > parts["text_encoder"].module.config.vocab_size:
            raise InputError(f"base model {path}: its tokenizer has {len(tokenizer)} tokens, more than its text encoder knows")
        return cls(
            **{name: part.module for name, part in parts.items()},
            tokenizer=tokenizer,
            schedule=schedule,
            params={name: part.params for name, part in parts.items()},
            mesh=mesh,
            sources={name: part.source for name, part in parts.items()},
        )

    def with_ip_adapter(
        self, path: str | os.PathLike, *, image_encoder: str | os.PathLike | None = None, revision: str | None = None
    ) -> "StableDiffusion":
        """This pipeline with one more adapter: a file, or "owner/name/path/in/repository.safetensors" on the Hub.

        `image_encoder` is a folder or Hub place with CLIP's vision model; by default the folder `image_encoder` beside
        the adapter, as in the authors' repository. Raises WeightFileError when adapter, base and encoder do not fit.
        """
        put = functools.partial(jax.device_put, device=sampling.replicated(self.mesh))
        adapter = load_adapter(path, image_encoder, self.unet, put, revision, self.adapters)
        return dataclasses.replace(self, adapters=(*self.adapters, adapter))

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        ip_adapter_image: ImagePrompt | Sequence[ImagePrompt] | None = None,
        ip_adapter_image_embeds: Sequence[np.ndarray] | None = None,
        ip_adapter_scale: float | Sequence[float] = 1.0,
        fit: str = "crop",
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        scheduler: str = "ddim",
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        latents: np.ndarray | None = None,
        output_type: str = "pil",
        callback_on_step_end: OnStep | None = None,
    ) -> Any:
        """Pictures for every prompt, prompt-major.

        ip_adapter_image: one picture, several for one adapter (their tokens share one softmax), or with several adapters
        a list of these, one per adapter; each a PIL image, an array or a path, brought to a square by `fit` ("crop",
        "resize", "pad"). ip_adapter_image_embeds instead: per adapter the encoder's features (G, n, ...), the negative
        branch first when guidance_scale > 1 (G = 2). ip_adapter_scale: lambda of the paper, one or one per adapter.
        seed: picture i uses seed + i, or seed[i], and nothing else. latents (B, h, w, 4): standard normal.
        guidance_scale <= 1 leaves the unconditional branch out. callback_on_step_end makes every step a call of its own.

        Returns PIL images ("pil"), a float array (B, H, W, 3) in [0, 1] ("np") or the final latents ("latent"). Raises
        InputError before anything is compiled when an argument cannot be used.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        count = len(prompts) * num_images_per_prompt
        _check_arguments(prompts, negatives, num_images_per_prompt, guidance_scale, eta, scheduler, output_type)
        shape = self._latent_shape(height, width)
        steps = ddim_steps(self.schedule, num_inference_steps, eta)
        seeds = _seeds(seed, count)
        if latents is not None and np.shape(latents) != (count, *shape):
            raise InputError(f"latents have shape {np.shape(latents)}, these settings need {(count, *shape)}")
        guided = guidance_scale > 1
        weight = self._image_weight(ip_adapter_scale)
        features = self._features(ip_adapter_image, ip_adapter_image_embeds, fit, guided)

        ids = np.stack([self._tokenize(negatives), self._tokenize(prompts)][0 if guided else 1 :], axis=1)
        text = sampling.encode_prompt(self.text_encoder, self.params["text_encoder"], ids.reshape(-1, ids.shape[-1]))
        text_kv = sampling.text_keys_values(self.unet, self.params["unet"], text.reshape(*ids.shape, -1))
        image_kv = [a.keys_values(f()) for a, f in zip(self.adapters, features, strict=True)]
        batch = _Batch(self.mesh, count, seeds, np.repeat(np.arange(len(prompts)), num_images_per_prompt))
        start = batch.noise(shape, 0) if latents is None else batch.spread(np.asarray(latents, np.float32))
        run = functools.partial(
            self._denoise, text_kv=text_kv, image_kv=image_kv, weight=weight, guidance_scale=guidance_scale, batch=batch
        )
        final = run(start, steps, on_step=callback_on_step_end)
        if output_type == "latent":
            return np.asarray(final)[:count]
        decoded = np.asarray(sampling.decode(self.vae, self.mesh, self.params["vae"], final))[:count]
        return _pictures(decoded, output_type)

    def _denoise(self, x, steps: DDIMSteps, *, text_kv, image_kv, weight, guidance_scale, batch, on_step) -> Array:
        """All steps in one call, or with `on_step` one call per step."""
        stochastic, total = bool(np.any(steps.sigma)), len(steps.timestep)
        length = total if on_step is None else 1
        for first in range(0, total, length):
            segment = jax.tree.map(lambda field, first=first: field[first : first + length], steps)
            numbers = range(first, first + length)
            noise = jnp.stack([batch.noise(x.shape[1:], 1 + i) for i in numbers]) if stochastic else None
            x = sampling.denoise(
                self.unet,
                self.schedule,
                self.mesh,
                self.params["unet"],
                x,
                segment,
                noise,
                batch.prompt_of_image,
                text_kv,
                image_kv,
                weight,
                np.float32(guidance_scale),
            )
            if on_step is not None:
                on_step(first, int(segment.timestep[0]), x[: batch.count])
        return x

    def _tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        return tokenize(self.tokenizer, prompts, self.text_encoder.config.max_position_embeddings)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        scale, default = self.vae.config.downscale, self.unet.config.sample_size
        sizes = []
        for name, pixels in (("height", height), ("width", width)):
            pixels = default * scale if pixels is None else pixels
            if pixels < scale or pixels % scale:
                nearest = max(scale, round(pixels / scale) * scale)
                raise InputError(f"{name}={pixels} is not a multiple of {scale}; the nearest size is {nearest}")
            sizes.append(pixels // scale)
        return (*sizes, self.unet.config.in_channels)

    def _image_weight(self, scale: float | Sequence[float]) -> np.ndarray:
        """One weight per (adapter, site)."""
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(self.adapters)
        if len(scales) != len(self.adapters):
            raise InputError(f"ip_adapter_scale has {len(scales)} values for {len(self.adapters)} adapters; give one for each")
        for value in scales:
            if not math.isfinite(value):
                raise InputError(f"ip_adapter_scale={value} is not a finite number; 0 is the base model, 1 the full image prompt")
        sites = len(self.adapters[0].widths) if self.adapters else 0
        return np.broadcast_to(np.asarray(scales, np.float32)[:, None], (len(scales), sites))

    def _features(self, images, embeds, fit: str, guided: bool) -> list[Callable[[], Array]]:
        """Per adapter a function that gives its features (G, n, ...): pictures are read now, encoders run later."""
        if images is not None and embeds is not None:
            raise InputError("ip_adapter_image and ip_adapter_image_embeds are both given; give one of them")
        if not self.adapters:
            if images is not None or embeds is not None:
                raise InputError("an image prompt needs an adapter: call with_ip_adapter first")
            return []
        if embeds is not None:
            given: Sequence[Any] = list(embeds)
        elif isinstance(images, list | tuple) and (len(self.adapters) > 1 or any(isinstance(i, list | tuple) for i in images)):
            given = images
        else:
            given = [images]
        if len(given) != len(self.adapters) or any(prompt is None for prompt in given):
            raise InputError(f"{len(self.adapters)} adapters need as many image prompts (ip_adapter_image), one for each")
        if embeds is not None:
            return [a.from_embeds(e, guided) for a, e in zip(self.adapters, given, strict=True)]
        return [a.from_images(i, fit, guided) for a, i in zip(self.adapters, given, strict=True)]


class _Batch:
    """The images of one call, filled up to a multiple of the devices."""

    def __init__(self, mesh: Mesh, count: int, seeds: np.ndarray, prompt_of_image: np.ndarray):
        self.mesh, self.count = mesh, count
        self._padding = -count % mesh.size
        self._seeds = self.spread(seeds)
        self.prompt_of_image = self.spread(prompt_of_image)

    def spread(self, rows: np.ndarray) -> Array:
        """Rows (B, ...) over the devices, the last one repeated."""
        rows = np.concatenate([rows, np.repeat(rows[-1:], self._padding, axis=0)])
        return jax.device_put(rows, sampling.by_image(self.mesh))

    def noise(self, shape: tuple[int, ...], step: int) -> Array:
        return sampling.initial_noise(shape, self._seeds, np.uint32(step), self.mesh)


def _check_arguments(prompts, negatives, images_per_prompt, guidance_scale, eta, scheduler, output_type) -> None:
    if not prompts or not all(isinstance(p, str) for p in (*prompts, *negatives)):
        raise InputError("prompt and negative_prompt must be a text or a list of texts")
    if len(negatives) != len(prompts):
        raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
    if images_per_prompt < 1:
        raise InputError(f"num_images_per_prompt={images_per_prompt} must be at least 1")
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale={guidance_scale} is not a finite number; 7.5 is usual, 1 turns guidance off")
    if not 0 <= eta <= 1:
        raise InputError(f"eta={eta} must lie between 0 (deterministic) and 1 (as DDPM)")
    if scheduler != "ddim":
        raise InputError(f"scheduler {scheduler!r} is not known; choose ddim")
    if output_type not in ("pil", "np", "latent"):
        raise InputError(f"output_type {output_type!r} is not known; choose pil, np or latent")


def _seeds(seed: int | Sequence[int], count: int) -> np.ndarray:
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} pictures; give one number, or one for each picture")
    if not all(0 <= s < 2**32 for s in seeds):
        raise InputError(f"seed {seed} must lie between 0 and 2^32 - 1")
    return np.asarray(seeds, np.uint32)


def _pictures(decoded: np.ndarray, output_type: str) -> Any:
    if not np.isfinite(decoded).all():
        raise InputError("the picture is not finite: float16 overflowed or the weights are damaged; try bfloat16 or float32")
    pixels = np.clip(decoded / 2 + 0.5, 0.0, 1.0)
    if output_type == "np":
        return pixels
    from PIL import Image

    return [Image.fromarray(picture) for picture in to_uint8(pixels)]
