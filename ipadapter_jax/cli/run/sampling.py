"""What all commands that sample have in common: opening the models, and what an image's file says of them."""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import sys
from typing import Any

import jax
from PIL import Image, PngImagePlugin

from ipadapter_jax.cli.options import Sampling
from ipadapter_jax.diffusion.samplers import sample_table
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.validation import check_choices, latent_shape
from ipadapter_jax.models.unet_config import cross_attention_layers
from ipadapter_jax.pipelines.ip_adapter import open_adapter
from ipadapter_jax.pipelines.scales import scale_table
from ipadapter_jax.pipelines.stable_diffusion import GUIDANCE_SCALE, StableDiffusion
from ipadapter_jax.runtime.memory_limits import check_sampling_memory
from ipadapter_jax.runtime.prefetch import ordered_map
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.weights.base_model import BaseModel, check_text_to_image
from ipadapter_jax.weights.formats.shard_index import files_of
from ipadapter_jax.weights.open_base_model import open_base


def load(
    args: Sampling,
    *,
    images: int,
    size: tuple[int, int] | None = None,
    with_encoder: bool = True,
    inpainting: bool = False,
) -> StableDiffusion:
    """Opens all models, so that errors are found first, then reads their weights. `images`: how many are made
    at once; `size`: height and width of an initial image."""
    base = open_base(args.model_source(args.model, args.revision))
    unet = base.config("unet")
    if not inpainting:
        check_text_to_image(args.model, unet)
    layers = base.config("text_encoder").num_hidden_layers
    guidance = 1.0 if args.guidance_scale is None else args.guidance_scale
    check_choices(1, guidance, args.guidance_rescale, args.clip_skip, layers, args.eta, "pil", None)
    run = sample_table(args.scheduler, base.schedule.changed(args.scheduler_config()), args.steps, args.eta)
    points = _points(args, base, size)
    guided = (base.guidance_scale or GUIDANCE_SCALE) if args.guidance_scale is None else args.guidance_scale
    parts = _Sized(unet, args.dtype), _Sized(base.config("vae"), args.dtype)
    check_sampling_memory(parts[0], parts[1], images, points, run, jax.local_devices(), guided=guided > 1)
    scale_table(args.scale_of(), cross_attention_layers(unet), args.steps)
    encoder = args.image_encoder if with_encoder else False
    adapter = None if args.adapter is None else open_adapter(args.adapter, encoder, unet)
    if sys.stderr.isatty():
        print("loading the weights", file=sys.stderr)
    pipe = StableDiffusion.from_opened(base, args.dtype)
    return pipe if adapter is None else pipe.with_opened(adapter)


@dataclasses.dataclass(frozen=True)
class _Sized:
    """What `check_sampling_memory` asks of a network that is not read yet."""

    config: Any
    dtype: str


def _points(args: Sampling, base: BaseModel, size: tuple[int, int] | None) -> tuple[int, int]:
    """(h, w) of the latents, where nothing says otherwise the model's own. Raises InputError for what is no size."""
    multiple, own = base.config("vae").downscale, base.config("unet").sample_size
    if size is not None:
        height, width = (side // multiple * multiple for side in size)
    else:
        height, width = (side * multiple for side in (own if isinstance(own, tuple) else (own or 1, own or 1)))
    height, width = height if args.height is None else args.height, width if args.width is None else args.width
    h, w, _ = latent_shape(height, width, multiple, 0)
    return h, w


def digests(pipe: StableDiffusion) -> dict[str, dict[str, str]]:
    """Per part of the pipeline the sha256 of its weight files by name. Raises InputError when they are gone."""
    sources = dict(pipe.sources)
    for adapter in pipe.adapters:
        sources["ip_adapter"] = adapter.source
        if adapter.loaded_encoder is not None:
            sources["image_encoder"] = adapter.loaded_encoder.source
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
    parts: dict[str, object] = {part: getattr(pipe, part).config for part in ("unet", "vae", "text_encoder")}
    parts |= {"scheduler": pipe.schedule, "tokenizer": pipe.tokenizer.settings}
    encoders = [adapter.loaded_encoder for adapter in pipe.adapters if adapter.loaded_encoder is not None]
    parts["image_encoder"] = [encoder.module.config for encoder in encoders]
    return {part: hashlib.sha256(repr(settings).encode()).hexdigest()[:16] for part, settings in parts.items()}


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
