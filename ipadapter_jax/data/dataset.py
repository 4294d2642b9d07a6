"""A record as the networks take it: pixels for the VAE, pixels for the image encoder, token ids of the caption."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ipadapter_jax.data.types import Record, RecordSource
from ipadapter_jax.data.unused_files import summarize
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.preprocess import clip_pixels, decode_image, square_pixels
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.weights.tokenizer import Tokenizer, load_tokenizer
from ipadapter_jax.weights.tokenizer_files import vocabulary_files

_CAPTIONS = 256  # that are looked at before a run


@functools.cache
def _tokenizer(folder: Path) -> Tokenizer:
    """One per process: samples that travel to worker processes take only its place along."""
    return load_tokenizer(folder)


@dataclass(frozen=True)
class LiveSamples:
    """Random access to samples made from records when they are asked for. For threads, and to pickle into other
    processes. Without a `clip_size` there is no image prompt: no "clip_pixels".

    Raises InputError when `tokenizer_folder` holds no tokenizer.
    """

    source: RecordSource
    tokenizer_folder: Path
    resolution: int
    clip_size: int | None
    text_length: int = 77

    def __post_init__(self) -> None:
        _tokenizer(self.tokenizer_folder)  # here, or every record would seem bad

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Of record `index` "pixels" (resolution, resolution, 3) and "clip_pixels" (clip_size, clip_size, 3) uint8,
        and "input_ids" (text_length,) int32, where a longer caption loses its end.

        Raises InputError naming the record's key when it cannot be read, or is not what it should be.
        """
        record = self.source[index]
        image = decode_image(record.image, record.key)
        sample = {
            "pixels": square_pixels(image, self.resolution),
            "input_ids": self._ids(record.text, record.key),
        }
        if self.clip_size is not None:
            if record.cond_image is not None:
                image = decode_image(record.cond_image, f"{record.key} (its image prompt)")
            sample["clip_pixels"] = clip_pixels(image, self.clip_size)
        return sample

    def identity(self) -> dict[str, Any]:
        """What decides about the samples, as JSON, without the place of anything."""
        files = vocabulary_files(self.tokenizer_folder)
        return {
            "source": self.source.identity(),
            "tokenizer": {name: sha256(path) for name, path in files.items()},
            "resolution": self.resolution,
            "clip_size": self.clip_size,
            "text_length": self.text_length,
        }

    def account(self) -> str:
        """How many records there are, what is not used, and how many of the first captions are too long, in one line.

        Reads the first records for that: to count all captions would be to read all data.
        """
        line, first = summarize(len(self), self.source.unused), min(_CAPTIONS, len(self))
        long = [record.key for record in map(self._readable, range(first)) if record and self._is_long(record)]
        if long:
            line += (
                f"; {len(long)} of the first {first} captions are longer than {self.text_length} tokens and lose their "
                f"ends, that of {long[0][:80]} for one"
            )
        return line

    def _readable(self, index: int) -> Record | None:
        try:
            return self.source[index]
        except MemoryError:
            raise
        except Exception:  # whatever a damaged record brings a reader to raise is said when it is its turn
            return None

    def _is_long(self, record: Record) -> bool:
        try:
            return len(self._tokens(record.text, record.key)) > self.text_length
        except InputError:
            return False

    def _ids(self, text: str, key: str) -> np.ndarray:
        return _tokenizer(self.tokenizer_folder).fitted(self._tokens(text, key), self.text_length)

    def _tokens(self, text: str, key: str) -> list[int]:
        try:
            return _tokenizer(self.tokenizer_folder).encode(text)
        except InputError:
            raise InputError(f"{key!r}: its caption is not text: write it in UTF-8") from None
