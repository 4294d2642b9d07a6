"""CLIP vision models for image prompts, opened from any of their layouts."""

import os
from collections.abc import Sequence

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.components import IMAGE_ENCODER
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.hub import local_path
from ipadapter_jax.weights.identify import OPENCLIP, identify
from ipadapter_jax.weights.layouts.openclip import to_transformers, vision_settings
from ipadapter_jax.weights.open_component import LazyComponent, build_component_config, open_component, open_weights
from ipadapter_jax.weights.weight_files import choose_files, choose_weights


def open_image_encoder(image_encoder: str | os.PathLike, revision: str | None = None) -> LazyComponent:
    """Opens a CLIP vision model: a folder (config.json next to the weights), one file in transformers' or OpenCLIP's
    layout, or a path on the Hub to either. Raises InputError naming what is wrong."""

    def choose(names: Sequence[str]) -> Sequence[str]:
        return choose_files(names, {"": IMAGE_ENCODER.files}, ("open_clip_config.json",), None)

    place = local_path(image_encoder, choose, what="image encoder", revision=revision)
    if place.is_dir() and (place / "config.json").is_file():
        return open_component(IMAGE_ENCODER, place)
    if place.is_dir():
        place = place / choose_weights(IMAGE_ENCODER.files, [file.name for file in place.iterdir()], str(place), None)
    tensors = open_tensors(place)
    kind = identify(tensors)
    if kind.name not in (OPENCLIP, IMAGE_ENCODER.files.kind):
        raise WeightFileError(f"image encoder {place}: this is {kind}, not a CLIP image encoder; {kind.advice}")
    settings = vision_settings(place, to_transformers(tensors))
    return open_weights(build_component_config(IMAGE_ENCODER, settings, place), tensors, place)
