"""Embeddings on disk, from which every score is computed. A file holds a chunk of image prompts and is written
atomically, so that a killed evaluation can be resumed and ends with the same numbers."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.clip_scorer import Scorer
from ipadapter_jax.evaluate.metrics import Embeddings, group_embeddings
from ipadapter_jax.evaluate.prompts import Reference
from ipadapter_jax.images.preprocess import clip_pixels, load_image
from ipadapter_jax.runtime.prefetch import ordered_map
from ipadapter_jax.storage.store import Store
from ipadapter_jax.storage.text_files import parse_json
from ipadapter_jax.weights.formats.safetensors_writer import safetensors_chunks
from ipadapter_jax.weights.formats.tensor_files import open_file
from ipadapter_jax.weights.lazy import in_memory

CHUNK = 32  # image prompts in a file
_THREADS = 4  # that read images
_ARRAYS = ("images", "texts")
_INPUTS, _CAPTIONS, _CONTENT = "inputs", "captions", "content"  # keys of a file's metadata


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some image prompts, the images that were made for them, and where their embeddings are stored."""

    store: Store
    name: str  # of the file of their embeddings
    references: Sequence[Reference]
    images: Sequence[Sequence[Path]]
    prefix: str  # put before every caption

    @property
    def path(self) -> Path:
        return self.store.path(self.name)


def chunks(store: Store, references: Sequence[Reference], images: Sequence[Sequence[Path]], prefix: str) -> list[Chunk]:
    """All chunks of an evaluation. They do not depend on the number of processes."""
    parts = [slice(start, start + CHUNK) for start in range(0, len(references), CHUNK)]
    return [Chunk(store, f"{part.start:06d}.safetensors", references[part], images[part], prefix) for part in parts]


def is_complete(chunk: Chunk, clip: Mapping[str, object]) -> bool:
    """Whether its file holds the embeddings of these images and captions by this CLIP (`LazyScorer.identity`)."""
    try:
        _, tensors, metadata = open_file(chunk.path)
        if metadata.get(_INPUTS) != _inputs(chunk, clip):
            return False
        return metadata.get(_CONTENT) == _content(*(tensors[name].read() for name in _ARRAYS if name in tensors))
    except (FileNotFoundError, InputError):  # not made yet, or damaged since
        return False


def embed_chunk(chunk: Chunk, scorer: Scorer, clip: Mapping[str, object]) -> None:
    """Embeds a chunk and writes its file. Raises InputError naming an image that cannot be read."""
    metadata = {_INPUTS: _inputs(chunk, clip)}
    images = scorer.images(_pixels(chunk, scorer.side))
    texts = scorer.captions([chunk.prefix + text for reference in chunk.references for text in reference.captions])
    for name, rows in (("image", images), ("caption", texts)):
        if not np.isfinite(rows).all():
            raise InputError(f"the embedding of a {name} is not finite: the weights of the scoring CLIP are damaged")
    metadata[_CAPTIONS] = json.dumps([len(reference.captions) for reference in chunk.references])
    metadata[_CONTENT] = _content(images, texts)
    tensors = {name: in_memory(rows) for name, rows in zip(_ARRAYS, (images, texts), strict=True)}
    chunk.store.write(chunk.name, safetensors_chunks(tensors, metadata))


def read_embeddings(chunk: Chunk) -> Embeddings:
    """The embeddings that `embed_chunk` has written."""
    _, tensors, metadata = open_file(chunk.path)
    images, texts = (np.array(tensors[name].read()) for name in _ARRAYS)
    counts = parse_json(metadata[_CAPTIONS], chunk.path)
    if not isinstance(counts, list):
        raise InputError(f"{chunk.path}: its numbers of captions are not a list; remove it, and it is made again")
    return group_embeddings(images, texts, counts)


def _pixels(chunk: Chunk, side: int) -> Iterator[np.ndarray]:
    """Yields the scorer's input pixels of the image prompts, then of the images."""
    every: list[Reference | Path] = [*chunk.references, *(path for paths in chunk.images for path in paths)]

    def pixels(item: Reference | Path) -> np.ndarray:
        image: Image.Image = item.image() if isinstance(item, Reference) else load_image(item)
        return clip_pixels(image, side)

    return ordered_map(pixels, every, threads=_THREADS, ahead=2 * _THREADS)


def _inputs(chunk: Chunk, clip: Mapping[str, object]) -> str:
    """A digest of all that the embeddings depend on. Raises FileNotFoundError if an image does not exist yet."""
    images = [[_stamp(path) for path in paths] for paths in chunk.images]
    references = [[reference.name, reference.stamp, reference.captions] for reference in chunk.references]
    return hashlib.sha256(json.dumps([clip, chunk.prefix, references, images]).encode()).hexdigest()


def _content(*arrays: np.ndarray) -> str:
    """A digest of the embeddings: a disk may lose some of them without changing the file's length."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(rows, np.float32).tobytes() for rows in arrays)).hexdigest()


def _stamp(path: Path) -> list[str | int]:
    found = os.stat(path)
    return [path.name, found.st_size, found.st_mtime_ns]
