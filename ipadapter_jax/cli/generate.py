"""`ipadapter-jax generate`: pictures from a picture and a prompt."""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import io
import json
import math
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tqdm
from PIL import Image, PngImagePlugin

from ipadapter_jax import embedded
from ipadapter_jax.adapters import open_adapter
from ipadapter_jax.base_model import check_text_to_image, open_base
from ipadapter_jax.diffusion.samplers import sample_table
from ipadapter_jax.errors import InputError
from ipadapter_jax.files import check_writable, sha256, write_whole
from ipadapter_jax.pipeline import StableDiffusion
from ipadapter_jax.preprocess import image_grid, load_image
from ipadapter_jax.weights.tensors import files_of


@dataclasses.dataclass
class Generate:
    """Samples pictures from a base model, with an image prompt when --adapter and --image are given; by default from
    mini, the small model inside this package, which has adapters of its own: --image is all it needs.

    Every PNG carries the settings, versions and weight digests in its text chunk "ipadapter_jax".
    """

    out: Path
    """The PNG to write. With several pictures this is their grid, and the single ones lie beside it, numbered."""
    base: str = embedded.NAME
    """Base model: a folder in diffusers' layout (PyTorch or Flax weights), a single file (.safetensors or .ckpt), a
    Hub id such as owner/name, or mini, the model inside this package (./mini is a folder of that name)."""
    config: str | None = None
    """For a single file: folder or Hub id of its family, for settings and tokenizer; by default Stable Diffusion
    1.5."""
    vae: str | None = None
    """Another VAE than the base model's: a folder, a Hub id or a file."""
    text_encoder: str | None = None
    """Another text encoder than the base model's: a folder, a Hub id or a file."""
    extract_ema: bool = False
    """For a single file: take the moving average of its UNet."""
    prompt: str = ""
    """What to paint; may be empty with an image prompt."""
    negative_prompt: str = ""
    """What to avoid."""
    image: tuple[str, ...] = ()
    """Reference pictures; several share the one image prompt."""
    adapter: str | None = None
    """IP-Adapter file (.safetensors or .bin), or a place on the Hub such as owner/name/folder/file.safetensors. The
    base model mini has two, mini and mini-plus; with --image the first is its default."""
    image_encoder: str | None = None
    """Folder, file or Hub place of the CLIP vision model; by default image_encoder beside the adapter."""
    scale: float = 1.0
    """Weight of the image prompt: 0 is the base model, 0.5 to 0.7 balances with the text, 1 follows the picture."""
    fit: Literal["crop", "resize", "pad"] = "crop"
    """How a reference that is not square becomes so."""
    num_images: int = 1
    """Pictures to make, picture i with seed + i."""
    seed: int = 0
    """Seed of the first picture."""
    steps: int = 50
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 turns it off. By default the model's own, 7.5 for Stable Diffusion."""
    scheduler: Literal["ddim", "ddpm", "pndm", "dpmsolver++", "euler", "euler_a", "unipc", "lcm"] = "ddim"
    """The sampler. dpmsolver++ and unipc need 20 to 30 steps; lcm is for models that were distilled for it."""
    karras: bool = False
    """Noise levels after Karras et al., for dpmsolver++, euler and unipc."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    """Where the steps lie; by default as the model's scheduler_config.json says, or as the sampler prefers."""
    zero_snr: bool = False
    """Rescale the noise schedule so that the first step starts from pure noise, for models trained so; the spacing is
    then trailing unless another is given."""
    eta: float = 0.0
    """Fresh noise in every step, from 0 (none) to 1 (as DDPM)."""
    height: int | None = None
    """Height in pixels, a multiple of 8; by default the model's own size."""
    width: int | None = None
    """Width in pixels."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and networks; bfloat16 halves the memory and is the fast one on accelerators."""
    variant: str | None = None
    """Which weight files of the base model to prefer, such as fp16."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the Hub."""


def generate(args: Generate) -> int:
    """Checks what is cheap to check, loads, samples, writes. Raises InputError."""
    if args.base == embedded.NAME and args.image and args.adapter is None:
        args = dataclasses.replace(args, adapter=embedded.NAME)
    _check(args)
    pictures = [load_image(path) for path in args.image]
    pipe = _load(args)
    found, digests = _sample(pipe, args, pictures)
    _write(found, args, _metadata(args, pipe, digests))
    return 0


def _load(args: Generate) -> StableDiffusion:
    """Opens all that is needed, so that what does not fit is said at once, then reads it."""
    base = open_base(
        args.base,
        variant=args.variant,
        revision=args.revision,
        config=args.config,
        vae=args.vae,
        text_encoder=args.text_encoder,
        extract_ema=args.extract_ema,
    )
    unet = base.config("unet")
    check_text_to_image(args.base, unet)
    sample_table(args.scheduler, base.schedule.changed(_scheduler_config(args)), args.steps, args.eta)
    adapter = None if args.adapter is None else open_adapter(args.adapter, args.image_encoder, unet)
    if sys.stderr.isatty():
        print("loading the weights", file=sys.stderr)
    pipe = StableDiffusion.from_opened(base, args.dtype)
    return pipe if adapter is None else pipe.with_opened(adapter)


def _check(args: Generate) -> None:
    if args.out.suffix.lower() != ".png":
        raise InputError(f"--out {args.out}: give a name that ends in .png, which can carry the settings")
    if args.adapter is None and (args.image or args.image_encoder):
        raise InputError("--image and --image-encoder need --adapter, the IP-Adapter file that reads the picture")
    if args.adapter is not None and not args.image:
        raise InputError("--adapter needs --image, the picture to use as prompt")
    if args.num_images < 1:
        raise InputError(f"--num-images {args.num_images} must be at least 1")
    if args.steps < 1:
        raise InputError(f"--steps {args.steps} must be at least 1")
    if (args.num_images > 1 and not 0 <= args.seed <= 2**32 - args.num_images) or not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: seeds of all pictures must lie between 0 and 2^32 - 1")
    if args.karras and args.scheduler not in ("dpmsolver++", "euler", "unipc"):
        raise InputError(
            f"--karras has no meaning for --scheduler {args.scheduler}; it is for dpmsolver++, euler, unipc"
        )
    if not 0 <= args.eta <= 1:
        raise InputError(f"--eta {args.eta} must lie between 0 and 1")
    for path in _targets(args):
        check_writable(path)
    for name, value in (("scale", args.scale), ("guidance-scale", args.guidance_scale)):
        if value is not None and not math.isfinite(value):
            raise InputError(f"--{name} {value} is not a finite number")


def _sample(
    pipe: StableDiffusion, args: Generate, pictures: list[Image.Image]
) -> tuple[list[Image.Image], dict[str, dict[str, str]]]:
    """The pictures, one step per call so that the bar moves with the work, and the digests of the weights, made
    meanwhile. There is no bar where nobody watches."""
    digests: concurrent.futures.Future = concurrent.futures.Future()
    calls = args.steps + (args.scheduler == "pndm" and args.steps > 1)  # which makes its first step twice
    with tqdm.tqdm(total=calls, desc="compiling, then sampling", unit="step", disable=None) as bar:

        def on_step(number: int, timestep: float, latents: Any) -> None:
            if number == 0:  # now all arguments are good; a daemon, so that an interruption does not wait for it
                threading.Thread(target=_fulfil, args=(digests, pipe), daemon=True).start()
            latents.block_until_ready()
            bar.set_description("sampling")
            bar.update()

        found = pipe(
            args.prompt,
            ip_adapter_image=pictures or None,
            ip_adapter_scale=args.scale,
            fit=args.fit,
            negative_prompt=args.negative_prompt,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            scheduler=args.scheduler,
            scheduler_config=_scheduler_config(args),
            eta=args.eta,
            num_images_per_prompt=args.num_images,
            height=args.height,
            width=args.width,
            seed=args.seed,
            callback=on_step,
        )
    return found, digests.result()


def _scheduler_config(args: Generate) -> dict[str, Any]:
    """What the options change of the model's own settings."""
    options = {
        "use_karras_sigmas": args.karras,
        "timestep_spacing": args.timestep_spacing or ("trailing" if args.zero_snr else None),
        "rescale_betas_zero_snr": args.zero_snr,
    }
    return {name: value for name, value in options.items() if value}


def _fulfil(digests: concurrent.futures.Future, pipe: StableDiffusion) -> None:
    try:
        digests.set_result(_digests(pipe))
    except Exception as error:  # whoever waits for it must hear of it
        digests.set_exception(InputError(f"the weights cannot be read again ({error}); did somebody remove them?"))


def _digests(pipe: StableDiffusion) -> dict[str, dict[str, str]]:
    """Per part of the pipeline the sha256 of its weight files."""
    sources = dict(pipe.sources)
    for adapter in pipe.adapters:
        sources |= {"ip_adapter": adapter.source, "image_encoder": adapter.encoder.source}
    once = functools.cache(sha256)  # a single file has all parts
    return {part: {file.name: once(file) for file in files_of(source)} for part, source in sources.items()}


def _metadata(args: Generate, pipe: StableDiffusion, digests: dict[str, dict[str, str]]) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("out", "num_images")}
    if args.guidance_scale is None:
        settings["guidance_scale"] = pipe.guidance_scale
    versions = {name: importlib.metadata.version(name) for name in ("ipadapter-jax", "jax", "jaxlib", "flax")}
    return {**settings, "image": list(args.image), "sha256": digests, "versions": versions}


def _targets(args: Generate) -> list[Path]:
    """The single pictures in order; with several, their grid last: where the named file exists, all is done."""
    if args.num_images == 1:
        return [args.out]
    digits = len(str(args.num_images - 1))
    singles = [args.out.with_name(f"{args.out.stem}-{i:0{digits}d}.png") for i in range(args.num_images)]
    return [*singles, args.out]


def _write(pictures: Sequence[Image.Image], args: Generate, metadata: dict[str, Any]) -> None:
    contents = [_png(picture, metadata | {"seed": args.seed + i}) for i, picture in enumerate(pictures)]
    if len(pictures) > 1:
        contents.append(_png(image_grid(pictures), metadata | {"num_images": len(pictures)}))
    for path, content in zip(_targets(args), contents, strict=True):
        write_whole(path, content)
    print(args.out)


def _png(picture: Image.Image, metadata: dict[str, Any]) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("ipadapter_jax", json.dumps(metadata, ensure_ascii=False))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()
