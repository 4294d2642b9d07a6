"""`ipadapter-jax generate --grid`: one figure of what a control does."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import tqdm
from PIL import Image

from ipadapter_jax.cli.generate import Generate
from ipadapter_jax.cli.run.sampling import shared_request
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.contact_sheet import LabeledImages, contact_sheet
from ipadapter_jax.images.preprocess import clip_pixels
from ipadapter_jax.models.unet_config import cross_attention_layers
from ipadapter_jax.pipelines.request import ModelConfigs, SamplingPlan
from ipadapter_jax.pipelines.scales import Scale, preset_names, scale_table
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One image of a figure: its label, and the plan that makes it or the image itself."""

    label: str
    plan: SamplingPlan | Image.Image


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """The rows of a figure by their titles."""

    rows: dict[str, list[Cell]]

    def draw(self, pipe: StableDiffusion) -> Image.Image:
        """One image a call, so that the first compiles and all others run."""
        cells = [cell for row in self.rows.values() for cell in row]
        count = sum(isinstance(cell.plan, SamplingPlan) for cell in cells)
        with tqdm.tqdm(total=count, desc="compiling, then sampling", unit="image", disable=None) as bar:

            def draw(cell: Cell) -> Image.Image:
                if isinstance(cell.plan, Image.Image):
                    return cell.plan
                [image] = pipe.sample(cell.plan, progress_bar=False).images
                bar.update()
                return image

            rows: dict[str, LabeledImages] = {
                title: [(cell.label, draw(cell)) for cell in row] for title, row in self.rows.items()
            }
        return contact_sheet(rows, side=192)


def plan_figure(
    configs: ModelConfigs,
    args: Generate,
    what: Literal["scales", "presets"],
    images: Sequence[Image.Image],
    negative: Image.Image | None,
) -> Figure:
    """Seeds by scales, or references by presets (those that the UNet's layers allow). Raises InputError."""

    shared = dataclasses.replace(
        shared_request(args, negative), prompt=args.prompt, negative_prompt=args.negative_prompt or None
    )

    def plan(references: Sequence[Image.Image], scale: Scale, seed: int) -> SamplingPlan:
        own = dataclasses.replace(shared, ip_adapter_image=list(references), ip_adapter_scale=scale, seed=seed)
        return own.resolve(configs)

    rows: dict[str, list[Cell]] = {}
    if what == "scales":
        for seed in range(args.seed, args.seed + args.num_images):
            plans = {f"scale {value:g}": plan(images, args.scale_of(value), seed) for value in SCALES}
            rows[f"seed {seed}"] = [Cell(label, planned) for label, planned in plans.items()]
    else:
        presets = [name for name in preset_names() if _possible(configs, name)]
        for number, reference in enumerate(images):
            cells = [Cell(name, plan([reference], args.scale_of(layer_scales=name), args.seed)) for name in presets]
            title = f"{args.image[number]}, scale {args.scale:g}, seed {args.seed}"
            rows[title] = [Cell("reference", Image.fromarray(clip_pixels(reference))), *cells]
    return Figure(rows)


def _possible(configs: ModelConfigs, preset: str) -> bool:
    try:
        scale_table(preset, cross_attention_layers(configs.unet), 1)
    except InputError:
        return False
    return True
