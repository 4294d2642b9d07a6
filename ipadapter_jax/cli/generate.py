"""Options of `ipadapter-jax generate`."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from ipadapter_jax.cli.options import IMAGE_PROMPT_OPTIONS, MODEL_OPTIONS, SAMPLING_OPTIONS, Sampling, refuse
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.former_names import FormerName
from ipadapter_jax.runtime.memory_limits import check_memory
from ipadapter_jax.storage.atomic_files import check_writable
from ipadapter_jax.storage.paths import PathOrHubId
from ipadapter_jax.weights import bundled


@dataclasses.dataclass(kw_only=True)
class Generate(Sampling):
    """Generates images with a base model, and with an image prompt when --adapter and --image are given. The default
    base model is mini, a small model inside this package, which has its own adapters: it needs --image alone.

    Every PNG file records the settings, versions and weight digests in its text chunk "ipadapter_jax".
    """

    out: Path
    """PNG file to write. With several images it is their grid, and the single images are written next
    to it, numbered."""
    prompt: str = ""
    """Text prompt; may be empty when there is an image prompt."""
    image: tuple[PathOrHubId, ...] = ()
    """Reference images; several form one image prompt together."""
    image_weights: tuple[float, ...] = ()
    """Weight of each reference image, which multiplies --scale."""
    masks: tuple[PathOrHubId, ...] = ()
    """Mask of each reference image, white where it acts. Masked reference images act independently."""
    image_embeds: Annotated[PathOrHubId | None, FormerName("embeds")] = None
    """Image embeddings instead of --image: a file that --save-image-embeds, diffusers or ComfyUI wrote. Needs no image
    encoder."""
    save_image_embeds: Annotated[Path | None, FormerName("save_embeds")] = None
    """Also write the embeddings of --image to this .safetensors file."""
    init_image: PathOrHubId | None = None
    """Initial image (image-to-image)."""
    mask_image: PathOrHubId | None = None
    """Mask of --init-image, white where it is regenerated (inpainting)."""
    strength: float | None = None
    """Fraction of the denoising steps that are applied to --init-image; by default 0.8, or 1 with a mask."""
    preserve_unmasked: Annotated[bool, FormerName("exact_outside_mask")] = False
    """Keep the exact pixels of --init-image where the mask is black."""
    num_images: int = 1
    """Number of images; image i has the seed --seed + i."""
    seed: int = 0
    """Seed of the first image."""
    attention_maps: Path | None = None
    """Also write a figure with the attention to each image token, over the first image, to this PNG file."""
    grid: Annotated[Literal["scales", "presets"] | None, FormerName("explore")] = None
    """Write one labeled grid instead: scales, a row for each seed over scales from 0 to 1; presets, a row for each
    reference image over all presets of layer scales."""

    help_groups: ClassVar = {
        "images": ("prompt", "image", "out", "num_images", "seed", "height", "width", "negative_prompt"),
        "image prompt": ("image_weights", "masks", *IMAGE_PROMPT_OPTIONS, "image_embeds"),
        "image-to-image and inpainting": ("init_image", "mask_image", "strength", "preserve_unmasked"),
        "sampling": SAMPLING_OPTIONS,
        "model": MODEL_OPTIONS,
        "additional output": ("save_image_embeds", "attention_maps", "grid"),
    }

    def __post_init__(self) -> None:
        if self.model == bundled.NAME and (self.image or self.image_embeds) and self.adapter is None:
            self.adapter = bundled.NAME

    def check(self) -> None:
        """Raises InputError for options that are wrong on their own or together, and for outputs that cannot be
        written. Opens no input."""
        super().check()
        _check(self)


def _check(args: Generate) -> None:
    for option, path in (("out", args.out), ("attention-maps", args.attention_maps)):
        if path is not None and path.suffix.lower() != ".png":
            raise InputError(f"--{option} {path}: give a name that ends in .png, which can carry the settings")
    prompted = bool(args.image) or args.image_embeds is not None
    if args.image and args.image_embeds:
        raise InputError("--image and --image-embeds are both given; give one of them")
    if args.adapter is None and (prompted or args.image_encoder):
        what = "--image-embeds needs" if args.image_embeds else "--image and --image-encoder need"
        raise InputError(f"{what} --adapter, an IP-Adapter file")
    if args.save_image_embeds is not None and args.save_image_embeds.suffix != ".safetensors":
        raise InputError(f"--save-image-embeds {args.save_image_embeds}: give a name that ends in .safetensors")
    if args.adapter is not None and not prompted:
        raise InputError("--adapter needs --image, a reference image")
    if args.image_embeds is not None:
        refuse(
            args, ("reference_resize", "negative_image"), "on --image-embeds, which are encoded already", "give --image"
        )
    if not prompted:
        names = (*IMAGE_PROMPT_OPTIONS, "image_weights", "masks")
        refuse(args, names, "without an image prompt", "give --image or --image-embeds")
    for option, needs, given in _NEEDS:
        if given(args) and not getattr(args, needs):
            raise InputError(f"--{option} needs --{needs.replace('_', '-')}")
    for option, values in (("image-weights", args.image_weights), ("masks", args.masks)):
        if values and args.image and len(values) != len(args.image):
            raise InputError(f"--{option}: {len(values)} for {len(args.image)} images; give one for each")
    if args.num_images < 1:
        raise InputError(f"--num-images {args.num_images} must be at least 1")
    if (args.num_images > 1 and not 0 <= args.seed <= 2**32 - args.num_images) or not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: seeds of all images must lie between 0 and 2^32 - 1")
    fewer = "make fewer, or use ipadapter-jax batch"
    check_memory(args.num_images * _SMALL, f"{args.num_images:,} images", fewer)
    if args.grid is not None:
        ignored = [option for option, given in _NOT_EXPLORED.items() if given(args)]
        if ignored:
            raise InputError(f"--grid writes a figure instead of images; leave out --{', --'.join(ignored)}")
    places = [path for path in (*targets(args), args.attention_maps, args.save_image_embeds) if path is not None]
    if len({path.absolute() for path in places}) < len(places):
        raise InputError("--out, --attention-maps and --save-image-embeds must be different files")
    for path in places:
        check_writable(path)


_SMALL = 64 * 64 * 3 * 4  # bytes of an image that is smaller than the default size of any model

_NEEDS = [
    ("save-image-embeds", "image", lambda args: args.save_image_embeds),
    ("grid", "image", lambda args: args.grid),
    ("attention-maps", "adapter", lambda args: args.attention_maps),
    ("mask-image", "init_image", lambda args: args.mask_image),
    ("strength", "init_image", lambda args: args.strength is not None),
    ("preserve-unmasked", "mask_image", lambda args: args.preserve_unmasked),
]


_NOT_EXPLORED = {
    "masks": lambda args: args.masks,
    "image-weights": lambda args: args.image_weights,
    "init-image": lambda args: args.init_image,
    "save-image-embeds": lambda args: args.save_image_embeds,
    "attention-maps": lambda args: args.attention_maps,
    "layer-scales": lambda args: args.grid == "presets" and args.layer_scales != "linear",
    "num-images": lambda args: args.grid == "presets" and args.num_images > 1,
    "scale": lambda args: args.grid == "scales" and args.scale != 1,
}


def targets(args: Generate) -> list[Path]:
    """The files that are written: the single images in order, and the grid of several images last, so that its file
    exists only when all images do."""
    if args.num_images == 1 or args.grid is not None:
        return [args.out]
    digits = len(str(args.num_images - 1))
    singles = [args.out.with_name(f"{args.out.stem}-{i:0{digits}d}.png") for i in range(args.num_images)]
    return [*singles, args.out]
