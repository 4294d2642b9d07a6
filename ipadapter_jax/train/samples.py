"""The samples of a run: pictures that are encoded at every step, or what `ipadapter-jax encode` made of them."""

from pathlib import Path

from ipadapter_jax.adapters import encoder_folder
from ipadapter_jax.data.cache import CachedSamples, is_cache
from ipadapter_jax.data.open_source import open_source
from ipadapter_jax.data.samples import LiveSamples
from ipadapter_jax.pipeline import base_folder
from ipadapter_jax.train.config import Train
from ipadapter_jax.weights.components import IMAGE_ENCODER, read_config

Samples = LiveSamples | CachedSamples


def open_samples(config: Train, path: str) -> Samples:
    """Opens data in any known format. Raises InputError naming the path and what is wrong with it."""
    data, model = config.data, config.model
    if is_cache(Path(path).expanduser()):
        return CachedSamples(Path(path).expanduser())
    source = open_source(
        path,
        image_root=data.image_root,
        image_column=data.image_column,
        text_column=data.text_column,
        cond_image_column=data.cond_image_column,
    )
    clip_size = None
    if model.adapter != "none":
        clip_size = read_config(IMAGE_ENCODER, encoder_folder(model.image_encoder) / "config.json").image_size
    return LiveSamples(source, base_folder(model.base, model.variant) / "tokenizer", data.resolution, clip_size)
