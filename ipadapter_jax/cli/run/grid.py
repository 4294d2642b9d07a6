"""`ipadapter-jax generate --grid`: one figure of what a control does."""

from collections.abc import Sequence
from typing import Literal

import tqdm
from PIL import Image

from ipadapter_jax.cli.generate import Generate
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.contact_sheet import LabeledImages, contact_sheet
from ipadapter_jax.images.preprocess import clip_pixels
from ipadapter_jax.models.unet_config import cross_attention_layers
from ipadapter_jax.pipelines.scales import Scale, preset_names, scale_table
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


def figure(
    pipe: StableDiffusion,
    args: Generate,
    what: Literal["scales", "presets"],
    images: Sequence[Image.Image],
    negative: Image.Image | None,
) -> Image.Image:
    """Seeds by scales, or references by presets (those that the UNet's layers allow). One image a call, so
    that the first compiles and all others run."""
    presets = [name for name in preset_names() if _possible(pipe, name)]
    count = args.num_images * len(SCALES) if what == "scales" else len(images) * len(presets)
    with tqdm.tqdm(total=count, desc="compiling, then sampling", unit="image", disable=None) as bar:

        def generate(references: Sequence[Image.Image], scale: Scale, seed: int) -> Image.Image:
            [image] = pipe(
                args.prompt,
                negative_prompt=args.negative_prompt,
                ip_adapter_image=list(references),
                ip_adapter_scale=scale,
                seed=seed,
                **args.arguments(negative),
            )
            bar.update()
            return image

        rows: dict[str, LabeledImages] = {}
        if what == "scales":
            for seed in range(args.seed, args.seed + args.num_images):
                cells = [(f"scale {value:g}", generate(images, args.scale_of(value), seed)) for value in SCALES]
                rows[f"seed {seed}"] = cells
        else:
            for number, reference in enumerate(images):
                cells = [(name, generate([reference], args.scale_of(layer_scales=name), args.seed)) for name in presets]
                title = f"{args.image[number]}, scale {args.scale:g}, seed {args.seed}"
                rows[title] = [("reference", Image.fromarray(clip_pixels(reference))), *cells]
    return contact_sheet(rows, side=192)


def _possible(pipe: StableDiffusion, preset: str) -> bool:
    try:
        scale_table(preset, cross_attention_layers(pipe.unet.config), 1)
    except InputError:
        return False
    return True
