"""Runs `ipadapter-jax generate`: images from an image and a prompt."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tqdm
from jax import Array
from PIL import Image

from ipadapter_jax.cli.generate import Generate, targets
from ipadapter_jax.cli.run import grid
from ipadapter_jax.cli.run.sampling import OpenedModels, digests, png, shared_request, versions
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.contact_sheet import contact_sheet, overlay_heatmap
from ipadapter_jax.images.preprocess import image_grid, load_image, load_upright
from ipadapter_jax.pipelines.attention_maps import AttentionMaps
from ipadapter_jax.pipelines.image_prompt_settings import GivenScales
from ipadapter_jax.pipelines.ip_adapter import encoders_of
from ipadapter_jax.pipelines.outputs import SamplingResult
from ipadapter_jax.pipelines.request import ModelConfigs, SamplingPlan, SamplingRequest
from ipadapter_jax.pipelines.scales import Scale
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion
from ipadapter_jax.storage.atomic_files import write_atomically
from ipadapter_jax.weights.image_embeds import save_image_embeds


@dataclasses.dataclass(frozen=True)
class Given:
    """The images of a command line, each read once, before any weights."""

    references: list[Image.Image]
    negative: Image.Image | None
    init: Image.Image | None
    mask: Image.Image | None
    masks: list[Image.Image]

    @classmethod
    def load(cls, args: Generate) -> "Given":
        """Raises InputError naming what cannot be read."""
        return cls(
            references=[load_image(path) for path in args.image],
            negative=None if args.negative_image is None else load_image(args.negative_image),
            init=None if args.init_image is None else load_image(args.init_image),
            mask=None if args.mask_image is None else load_upright(args.mask_image),
            masks=[load_upright(path) for path in args.masks],
        )


def generate(args: Generate) -> int:
    """Checks all that was given, then loads, samples, writes. Raises InputError."""
    given = Given.load(args)
    with_encoder = args.image_embeds is None or args.image_encoder is not None
    opened = OpenedModels.open(args, with_encoder=with_encoder, inpainting=args.mask_image is not None)
    if args.grid is not None:
        figure = grid.plan_figure(opened.configs, args, args.grid, given.references, given.negative)
        pipe = opened.load()
        drawn = figure.draw(pipe)
        write_atomically(args.out, png(drawn, {**_metadata(args, pipe), "grid": args.grid}))
        print(args.out)
        return 0
    plan = _request(args, given).resolve(opened.configs)
    if args.image_embeds is not None and args.image_encoder is not None and not _needs_encoder(opened.configs, args):
        warnings.warn(
            "--image-encoder has no effect on these --image-embeds, whose negative branch is zeros", stacklevel=1
        )
    pipe = opened.load()
    made = _sample(pipe, plan)
    assert isinstance(made.images, list)  # of PIL: the request names no other type
    metadata = _metadata(args, pipe)
    _write(made.images, args, metadata)
    if args.save_image_embeds is not None:
        _save_embeds(args.save_image_embeds, pipe, args, given)
    if made.maps is not None and args.attention_maps is not None:
        write_atomically(args.attention_maps, png(_heat_figure(made.images[0], made.maps), metadata))
    return 0


def _request(args: Generate, given: Given) -> SamplingRequest:
    """What the options ask for."""
    return dataclasses.replace(
        shared_request(args, given.negative),
        prompt=args.prompt,
        negative_prompt=args.negative_prompt or None,
        ip_adapter_image=given.references or None,
        ip_adapter_image_embeds=None if args.image_embeds is None else [args.image_embeds],
        ip_adapter_scale=_scales(args),
        ip_adapter_masks=given.masks or None,
        image=given.init,
        mask_image=given.mask,
        strength=args.strength,
        exact_outside_mask=args.preserve_unmasked,
        num_images_per_prompt=args.num_images,
        seed=args.seed,
        return_attention_maps=args.attention_maps is not None,
    )


def _needs_encoder(configs: ModelConfigs, args: Generate) -> bool:
    """Whether the encoder makes the negative branch of embeddings."""
    return args.uncond not in ("default", "zeros") or configs.adapters[0].projection.feature_kind.has_positions


def _sample(pipe: StableDiffusion, plan: SamplingPlan) -> SamplingResult:
    """Samples one step per call, so that the progress bar moves; it is shown in a terminal only."""
    with tqdm.tqdm(total=plan.num_steps, desc="compiling, then sampling", unit="step", disable=None) as bar:

        def on_step(number: int, timestep: float, latents: Array) -> None:
            latents.block_until_ready()
            bar.set_description("sampling")
            bar.update()

        return pipe.sample(plan, callback=on_step, progress_bar=False)


def _scales(args: Generate) -> GivenScales:
    """One scale, or with weights for the references one for each."""
    if not args.image_weights:
        return args.scale_of()
    if args.masks:
        return [[args.scale_of(args.scale * weight) for weight in args.image_weights]]
    if args.scale_of() != Scale(args.scale):
        raise InputError(
            "--image-weights with --layer-scales or a schedule needs --masks: without, references share a softmax"
        )
    return [[args.scale * weight for weight in args.image_weights]]


def _save_embeds(path: Path, pipe: StableDiffusion, args: Generate, given: Given) -> None:
    [adapter] = pipe.adapters
    negative = None if given.negative is None else [given.negative]
    planned = adapter.inputs.from_images([given.references], args.reference_resize, True, negative, args.uncond)
    [encoder] = encoders_of([adapter])
    about = {"variant": adapter.projection.config.variant, "image_encoder": encoder.source.name}
    save_image_embeds(path, np.asarray(adapter.encode(planned)[0]), about)


_MOST_TOKENS = 16  # of a figure


def _heat_figure(image: Image.Image, maps: AttentionMaps) -> Image.Image:
    """For every entry the image and the heat of its tokens, those that differ most over the image first."""
    rows = {}
    for entry in range(len(maps.maps)):
        heat = maps.heat((image.height, image.width), branch=entry)
        chosen = sorted(np.argsort(-heat.std(axis=(1, 2)))[:_MOST_TOKENS].tolist())
        cells = [(f"token {token}", overlay_heatmap(image, heat[token])) for token in chosen]
        rows[f"image prompt {entry + 1}: attention to its tokens, the mean of all steps and layers"] = [
            ("image", image),
            *cells,
        ]
    return contact_sheet(rows, side=max(192, image.width))


def _metadata(args: Generate, pipe: StableDiffusion) -> dict[str, object]:
    outputs = ("out", "num_images", "attention_maps", "save_image_embeds", "grid")
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in outputs}
    if args.guidance_scale is None:
        settings["guidance_scale"] = pipe.guidance_scale
    return {**settings, "image": list(args.image), "sha256": digests(pipe), "versions": versions()}


def _write(images: Sequence[Image.Image], args: Generate, metadata: dict[str, object]) -> None:
    contents = [png(image, metadata | {"seed": args.seed + i}) for i, image in enumerate(images)]
    if len(images) > 1:
        contents.append(png(image_grid(images), metadata | {"num_images": len(images)}))
    for path, content in zip(targets(args), contents, strict=True):
        write_atomically(path, content)
    print(args.out)
