"""The samples of a run: images that are encoded at every step, or what `ipadapter-jax encode` made of them."""

import logging
from pathlib import Path

import jax
import numpy as np

from ipadapter_jax.data.dataset import LiveSamples
from ipadapter_jax.data.feature_cache import CachedSamples, is_cache
from ipadapter_jax.data.loader import MAX_CONSECUTIVE_UNREADABLE, SkippedRecord, load_or_skip
from ipadapter_jax.data.open_dataset import open_dataset
from ipadapter_jax.data.unused_files import write_report
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.config_fields import build_config
from ipadapter_jax.models.clip_config import CLIPVisionConfig
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.storage.store import LocalStore, Store
from ipadapter_jax.train.config import Data, Model
from ipadapter_jax.train.networks import LoadedNetworks, PrecomputedEncoder
from ipadapter_jax.train.precompute import check_cache
from ipadapter_jax.weights.components import IMAGE_ENCODER
from ipadapter_jax.weights.image_encoder import open_image_encoder
from ipadapter_jax.weights.open_base_model import open_base_folder
from ipadapter_jax.weights.weight_files import choose_weights

log = logging.getLogger("ipadapter_jax")

Samples = LiveSamples | CachedSamples


def open_samples(path: str, data: Data, model: Model) -> Samples:
    """Opens data in any known format. Raises InputError naming the path and what is wrong with it."""
    place = Path(expand_home(path))
    names = ("image_root", "image_column", "text_column", "cond_image_column")
    named = {name: getattr(data, name) for name in names if path == data.path}  # validation data may be others
    if is_cache(LocalStore(place)):
        for name, value in named.items():
            if value is not None:
                raise InputError(f"{argument(name, value)} has no effect: {path} is encoded already; leave it out")
        return CachedSamples(LocalStore(place))
    source, base = open_dataset(path, **named), open_base_folder(model.base, model.variant)
    clip_size = None
    if model.adapter != "none":
        clip_size = open_image_encoder(model.image_encoder).config.image_size
    length = base.config("text_encoder").max_position_embeddings
    return LiveSamples(source, base.folder / "tokenizer", data.resolution, clip_size, length)


def log_record_count(path: str, samples: Samples) -> None:
    """Says in process 0 how many records there are at a path, and what is not used."""
    if jax.process_index() == 0:
        log.info("%s: %s", path, samples.account())


def write_unused_report(store: Store, samples: Samples) -> None:
    """Leaves the list of what is not used in the store of a run, in process 0."""
    if jax.process_index() == 0 and isinstance(samples, LiveSamples):
        write_report(store, samples.source.unused)


def precomputed_encoder(samples: Samples) -> PrecomputedEncoder | None:
    """What a run needs to know of the encoder behind precomputed features; None where it encodes images itself."""
    if isinstance(samples, LiveSamples):
        return None
    config: CLIPVisionConfig = build_config(
        CLIPVisionConfig, samples.plan.made_from["image_encoder"]["config"], f"{samples.store}: image encoder"
    )
    return PrecomputedEncoder(config, samples.zero_features())


def check_precomputed(samples: Samples, loaded: LoadedNetworks, resolution: int, image_encoder: str) -> None:
    """Raises InputError, listing the differences, for precomputed features that were made for another run, and for
    validation data that need an image encoder where the training data do without."""
    if isinstance(samples, LiveSamples):
        if loaded.networks.projection is not None and "image_encoder" not in loaded.frozen.params:
            raise InputError(
                "the training data are precomputed, the validation data are images: encode those as well "
                "(ipadapter-jax encode)"
            )
        return
    projection = loaded.networks.projection
    features = (
        None if projection is None else "penultimate" if projection.config.feature_kind.has_positions else "pooled"
    )
    check_cache(
        samples,
        vae=loaded.sources["vae"],
        tokenizer=loaded.base.folder / "tokenizer",
        resolution=resolution,
        features=features,
        image_encoder=_encoder_here(image_encoder) if features else None,
    )


def _encoder_here(place: str) -> Path | None:
    """The weight file of an image encoder on this machine; None for one on the Hub: it is not downloaded for this."""
    folder = Path(expand_home(place))
    if not folder.is_dir():
        return folder if folder.is_file() else None
    return folder / choose_weights(IMAGE_ENCODER.files, [path.name for path in folder.iterdir()], str(folder), None)


def first_readable_sample(samples: Samples, first: int, step: int = 1) -> dict[str, np.ndarray]:
    """The first usable one of the samples `first`, `first` + `step`, ... Raises InputError after 64 that are not."""
    for index in range(first, first + MAX_CONSECUTIVE_UNREADABLE * step, step):
        found = load_or_skip(samples, index % len(samples))
        if not isinstance(found, SkippedRecord):
            return found
    raise InputError(f"{MAX_CONSECUTIVE_UNREADABLE} records cannot be read, {found.key} for one: {found.reason}")
