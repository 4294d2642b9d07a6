"""What all commands that sample have in common: opening the models, and what an image's file says of them."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import sys

from PIL import Image, PngImagePlugin

from ipadapter_jax.cli.options import Sampling
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.config_fields import settings_text
from ipadapter_jax.models.unet_config import cross_attention_layers
from ipadapter_jax.pipelines.image_prompt_settings import ImagePrompt
from ipadapter_jax.pipelines.ip_adapter import OpenedAdapter, encoders_of, open_adapter
from ipadapter_jax.pipelines.request import ModelConfigs, SamplingPlan, SamplingRequest
from ipadapter_jax.pipelines.scales import scale_table
from ipadapter_jax.pipelines.stable_diffusion import GUIDANCE_SCALE, StableDiffusion
from ipadapter_jax.runtime.prefetch import ordered_map
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.weights.base_model import BaseModel, check_text_to_image
from ipadapter_jax.weights.formats.shard_index import files_of
from ipadapter_jax.weights.open_base_model import open_base


def shared_request(args: Sampling, negative: ImagePrompt | None) -> SamplingRequest:
    """What is the same for all images of a command. negative: the image of --negative-image, or its path."""
    return SamplingRequest(
        negative_ip_adapter_image=negative,
        ip_adapter_uncond=args.uncond,
        fit=args.reference_resize,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        guidance_rescale=args.guidance_rescale,
        clip_skip=args.clip_skip,
        scheduler=args.scheduler,
        scheduler_config=args.scheduler_config(),
        eta=args.eta,
        height=args.height,
        width=args.width,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedModels:
    """Base model and adapter, opened; no weights are read yet."""

    name: str
    base: BaseModel
    adapter: OpenedAdapter | None
    dtype: str

    @classmethod
    def open(cls, args: Sampling, *, with_encoder: bool = True, inpainting: bool = False) -> "OpenedModels":
        """Those that the options name. Raises InputError where they do not fit. `inpainting`: there is a mask."""
        base = open_base(args.model_source(args.model, args.revision))
        if not inpainting:
            check_text_to_image(args.model, base.config("unet"))
        encoder = args.image_encoder if with_encoder else False
        adapter = None if args.adapter is None else open_adapter(args.adapter, encoder, base.config("unet"))
        return cls(args.model, base, adapter, args.dtype)

    @functools.cached_property
    def configs(self) -> ModelConfigs:
        """What requests are resolved against."""
        return ModelConfigs(
            name=self.name,
            unet=self.base.config("unet"),
            vae=self.base.config("vae"),
            text_layers=self.base.text_layers,
            second_text_encoder=len(self.base.tokenizers) > 1,
            zeros_for_no_negative=self.base.zeros_for_no_negative,
            schedule=self.base.schedule,
            dtype=self.dtype,
            guidance_scale=self.base.guidance_scale or GUIDANCE_SCALE,
            adapters=[] if self.adapter is None else [self.adapter.inputs(self.dtype)],
        )

    def load(self) -> StableDiffusion:
        """Reads all weights."""
        if sys.stderr.isatty():
            print("loading the weights", file=sys.stderr)
        pipe = StableDiffusion.from_opened(self.base, self.dtype)
        return pipe if self.adapter is None else pipe.with_opened(self.adapter)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedJob:
    """The models of a job, and the plan of its batches but for prompts, image prompts and seeds."""

    pipe: StableDiffusion
    plan: SamplingPlan


def load_for_job(args: Sampling, *, images: int, with_encoder: bool = True) -> LoadedJob:
    """Opens and reads the models of a job that makes `images` at once. What all of its batches have in common is
    checked here, once and before any weights are read."""
    opened = OpenedModels.open(args, with_encoder=with_encoder)
    configs = opened.configs
    # Without image prompts, which differ by row: their settings are those of `ImagePromptSettings`.
    request = dataclasses.replace(
        shared_request(args, None), prompt=[""] * images, ip_adapter_uncond="default", fit="crop"
    )
    plan = request.resolve(dataclasses.replace(configs, adapters=[]))
    scale_table(args.scale_of(), cross_attention_layers(configs.unet), args.steps)
    return LoadedJob(opened.load(), plan)


def digests(pipe: StableDiffusion) -> dict[str, dict[str, str]]:
    """Per part of the pipeline the sha256 of its weight files by name. Raises InputError when they are gone."""
    sources = dict(pipe.sources)
    for adapter in pipe.adapters:
        sources["ip_adapter"] = adapter.source
        for encoder in encoders_of([adapter]):
            sources["image_encoder"] = encoder.source
    try:
        files = {part: files_of(source) for part, source in sources.items()}
        distinct = list(dict.fromkeys(file for part in files.values() for file in part))  # a single file has all parts
        hashed = ordered_map(sha256, distinct, threads=_HASHING_THREADS, ahead=len(distinct))
        sha256_of = dict(zip(distinct, hashed, strict=True))
    except OSError as error:
        raise InputError(f"the weights cannot be read again ({error}); did somebody remove them?") from None
    return {part: {file.name: sha256_of[file] for file in of_part} for part, of_part in files.items()}


_HASHING_THREADS = 4  # one hashes about 1.2 GB/s; a model has about four large files


def configurations(pipe: StableDiffusion) -> dict[str, str]:
    """Per part of the pipeline a digest of its settings, which decide as much as its weights: those of the networks,
    the noise schedule and the tokenizer."""
    parts: dict[str, object] = {"unet": pipe.unet.config, "vae": pipe.vae.config}
    parts |= {role.part: network.config for role, network in pipe.text.encoders.encoders}
    tokenizers = {role.tokenizer: pipe.text.tokenizers[role.part] for role, _ in pipe.text.encoders.encoders}
    parts |= {"scheduler": pipe.schedule} | {name: tokenizer.settings for name, tokenizer in tokenizers.items()}
    parts["image_encoder"] = [encoder.module.config for encoder in encoders_of(pipe.adapters)]
    texts = {part: settings_text(settings) for part, settings in parts.items()}
    return {part: hashlib.sha256(text.encode()).hexdigest()[:16] for part, text in texts.items()}


def versions() -> dict[str, str]:
    """Of the packages that decide what an image looks like."""
    return {name: importlib.metadata.version(name) for name in ("ipadapter-jax", "jax", "jaxlib", "flax")}


def png(image: Image.Image, metadata: dict[str, object]) -> bytes:
    """The image as PNG, with the metadata in its text chunk "ipadapter_jax"."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("ipadapter_jax", json.dumps(metadata))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()
