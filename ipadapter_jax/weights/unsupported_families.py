"""Names the family of a folder in diffusers' layout that is not supported, from its settings, for messages."""

from collections.abc import Mapping
from pathlib import Path

from ipadapter_jax.errors import InputError
from ipadapter_jax.models import families
from ipadapter_jax.models.families import Family
from ipadapter_jax.storage.text_files import read_json_object

# The first letters of the pipeline classes of families that are not supported.
_PIPELINES = {
    "StableDiffusionXLInstructPix2Pix": "an SDXL instruct-pix2pix base model",
    "StableUnCLIP": "an unCLIP base model",
    "StableDiffusion3": "an SD 3 base model",
    "StableDiffusionInstructPix2Pix": "an instruct-pix2pix base model",
    "StableDiffusionUpscale": "an upscaler",
    "StableDiffusionLatentUpscale": "an upscaler",
    "StableDiffusionDepth2Img": "a depth-to-image base model",
    "Flux": "a Flux base model",
    "StableCascade": "a Stable Cascade base model",
    "PixArt": "a PixArt base model",
    "Kandinsky": "a Kandinsky base model",
}
# Classes of networks that people give in place of others.
_NETWORKS = {
    "AutoencoderTiny": "a TAESD (AutoencoderTiny)",
    "ControlNetModel": "a ControlNet (ControlNetModel)",
    "T2IAdapter": "a T2I-Adapter (T2IAdapter)",
    "MotionAdapter": "an AnimateDiff motion module (MotionAdapter)",
}


def unsupported(folder: Path) -> str | None:
    """ "an SDXL base model" for such a folder, and so on for others that are known and not supported; else None."""
    pipeline = str(_settings(folder / "model_index.json").get("_class_name", "")).removeprefix("Flax")
    settings = _settings(folder / "unet" / "config.json")
    if any(pipeline in family.pipelines for family in families.FAMILIES):
        return _of_unet(settings)
    for start, family in _PIPELINES.items():
        if pipeline.startswith(start):
            return family
    if pipeline and not pipeline.startswith("StableDiffusion") and not (folder / "unet").is_dir():
        return f"a base model of {pipeline[:60]}"
    return _of_unet(settings)


def family_in(folder: Path) -> Family | None:
    """The family of the UNet in such a folder, or None when there is none that is supported."""
    return families.family_of(_settings(folder / "unet" / "config.json"))


def _of_unet(settings: Mapping[str, object]) -> str | None:
    if families.family_of(settings) is not None:
        return None
    if settings.get("addition_embed_type") == "text_time":
        refiner = settings.get("cross_attention_dim") == families.REFINER_WIDTH
        return "an SDXL refiner" if refiner else "an SDXL model of another kind"
    if settings.get("class_embed_type") is not None:
        return "an unCLIP base model"
    if settings.get("num_class_embeds") is not None:
        return "an upscaler"
    if settings.get("in_channels") == 5:
        return "a depth-to-image base model"
    return "an instruct-pix2pix base model" if settings.get("in_channels") == 8 else None


def of_class(name: str) -> str:
    """What a network of this class is, with its article."""
    name = name.removeprefix("Flax")
    return _NETWORKS.get(name, f"a network of the class {name[:60]!r}")


def _settings(path: Path) -> Mapping[str, object]:
    try:
        return read_json_object(path)
    except InputError:  # missing or damaged: whoever reads it for use raises
        return {}
