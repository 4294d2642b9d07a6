"""The scoring CLIP: embeds images and captions on all devices of the process."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.protocol import SCORER
from ipadapter_jax.images.preprocess import CLIP_MEAN, CLIP_STD, CLIP_TABLE
from ipadapter_jax.models.clip import CLIP
from ipadapter_jax.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.runtime.compilation_cache import enable_compilation_cache
from ipadapter_jax.runtime.mesh import batch_sharding, local_mesh, replicated
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.weights.components import WHOLE_CLIP
from ipadapter_jax.weights.formats.shard_index import files_of
from ipadapter_jax.weights.hub import local_path
from ipadapter_jax.weights.load_tree import Tree
from ipadapter_jax.weights.open_component import LazyComponent, open_component, read_json
from ipadapter_jax.weights.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, tokenize
from ipadapter_jax.weights.tokenizer_files import TOKENIZER_FILES, vocabulary_files
from ipadapter_jax.weights.weight_files import choose_files

_REFERENCE_CONFIG = CLIPConfig(
    CLIPTextConfig(eos_token_id=None), CLIPVisionConfig(1024, 4096, 768, 24, 16, hidden_act="quick_gelu")
)
_PREPROCESSOR = "preprocessor_config.json"
_BATCH = 64  # images or captions that the networks read at once, on all devices together


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LazyScorer:
    """A scoring CLIP that was checked; its weights are not read yet."""

    opened: LazyComponent
    tokenizer: Tokenizer

    @property
    def is_reference(self) -> bool:
        """Whether its config.json describes OpenAI's ViT-L/14."""
        config = self.opened.config
        text = dataclasses.replace(config.text, eos_token_id=None)  # published with a wrong and with the right value
        return CLIPConfig(text, config.vision) == _REFERENCE_CONFIG

    @functools.cached_property
    def identity(self) -> dict[str, object]:
        """What the embeddings depend on, as JSON: the config, and the sha256 of weights and tokenizer."""
        files = [*files_of(self.opened.source), *vocabulary_files(self.opened.source.parent).values()]
        digests = {file.name: sha256(file) for file in files if file.is_file()}
        return {"config": dataclasses.asdict(self.opened.config), "sha256": digests}

    def load(self) -> "Scorer":
        """Reads the weights in float32: scores need the precision."""
        enable_compilation_cache()
        mesh = local_mesh()
        put = functools.partial(jax.device_put, device=replicated(mesh))
        loaded = self.opened.load(np.dtype(np.float32), put)
        return Scorer(loaded.module, loaded.params, self.tokenizer, mesh)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Scorer:
    """A scoring CLIP with its weights on the devices."""

    clip: CLIP
    params: Tree
    tokenizer: Tokenizer
    mesh: Mesh

    @property
    def side(self) -> int:
        """The side of its square input images, in pixels."""
        return self.clip.config.vision.image_size

    def images(self, squares: Iterable[np.ndarray]) -> np.ndarray:
        """B images from `preprocess.clip_pixels`, (side, side, 3) uint8 each -> embeddings (B, D) float32. Reads the
        iterable batch by batch."""
        return self._in_batches(embed_images, squares)

    def captions(self, texts: Sequence[str]) -> np.ndarray:
        """B captions -> embeddings (B, D) float32. Captions that are too long are truncated, with a warning."""
        return self._in_batches(embed_captions, tokenize(self.tokenizer, texts, self._text_length))

    @property
    def _text_length(self) -> int:
        return min(self.tokenizer.model_max_length, self.clip.config.text.max_position_embeddings)

    def _in_batches(self, embed: Callable[..., Array], samples: Iterable[np.ndarray]) -> np.ndarray:
        """Embeds samples in batches of one size, so that one compiled program serves all: the last batch is padded with
        its last sample."""
        size, found, count = -(-_BATCH // self.mesh.size) * self.mesh.size, [], 0
        with jax.default_matmul_precision("highest"):  # accelerators would round to 8 or 11 bits
            for batch in _batches(samples, size):
                count += len(batch)
                filled = np.stack(batch + batch[-1:] * (size - len(batch)))
                sharded = jax.device_put(filled, batch_sharding(self.mesh))
                found.append(embed(self.clip, self.mesh, self.params, sharded))
        return np.concatenate([np.asarray(part) for part in found])[:count]


@functools.partial(jax.jit, static_argnums=(0, 1))
def embed_images(clip: CLIP, mesh: Mesh, params: Tree, pixels: Array) -> Array:
    """Pixels (B, S, S, 3) uint8 -> embeddings (B, D)."""
    values = jnp.asarray(CLIP_TABLE)[pixels, jnp.arange(3)]
    return _apply_sharded(functools.partial(clip.apply, method=CLIP.images), mesh, params, values)


@functools.partial(jax.jit, static_argnums=(0, 1))
def embed_captions(clip: CLIP, mesh: Mesh, params: Tree, input_ids: Array) -> Array:
    """Token ids (B, S) -> embeddings (B, D)."""
    return _apply_sharded(functools.partial(clip.apply, method=CLIP.texts), mesh, params, input_ids)


def _apply_sharded(apply: Callable, mesh: Mesh, params: Tree, samples: Array) -> Array:
    """Applies a network to samples that are sharded over all devices. Weights are replicated; devices do not
    communicate."""

    def run(samples: Array, params: Tree) -> Array:
        return apply({"params": params}, samples)

    over_devices = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
    return over_devices(samples, params)


def _batches(samples: Iterable[np.ndarray], size: int) -> Iterable[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def open_scorer(place: str | os.PathLike, revision: str | None = None) -> LazyScorer:
    """Opens a complete CLIP model of transformers with its tokenizer, from a folder or a Hub id. Raises InputError or
    WeightFileError naming what is wrong, also for a text or vision model alone."""

    def choose(names: Sequence[str]) -> Sequence[str]:
        return choose_files(names, {"": WHOLE_CLIP.files}, (*TOKENIZER_FILES, _PREPROCESSOR), None)

    folder = local_path(place, choose, what="scoring CLIP", revision=revision)
    if not folder.is_dir():
        raise InputError(f"scoring CLIP {place}: give its folder, which holds config.json and the tokenizer too")
    opened = open_component(WHOLE_CLIP, folder)
    _check_preprocessing(folder, opened.config.vision.image_size)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(f"scoring CLIP {place}", tokenizer, opened.config.text.vocab_size)
    return LazyScorer(opened, tokenizer)


def _check_preprocessing(folder: Path, side: int) -> None:
    """Raises InputError if the model expects other preprocessing than CLIP's, with which its scores would be wrong."""
    if not (folder / _PREPROCESSOR).is_file():
        return
    found = read_json(folder / _PREPROCESSOR)
    sizes = ({"height": side, "width": side}, {"shortest_edge": side}, side)
    known = {
        "image_mean": (list(CLIP_MEAN),),
        "image_std": (list(CLIP_STD),),
        "resample": (3,),
        "size": sizes,
        "crop_size": sizes,
    }
    for name, values in known.items():
        if name in found and found[name] not in values:
            raise InputError(
                f"{folder / _PREPROCESSOR}: {name}={found[name]!r} is not CLIP's at {side} pixels; score with a model "
                f"that is prepared as CLIP is, such as {SCORER}"
            )
