"""Samples from records: pixels for the VAE, pixels for the image encoder, token ids of the caption."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ipadapter_jax.data.types import Record, RecordSource
from ipadapter_jax.data.unused_files import summarize
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.preprocess import clip_pixels, decode_image, square_pixels
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.weights.tokenizer import Tokenizer, load_tokenizer
from ipadapter_jax.weights.tokenizer_files import vocabulary_files

_CAPTIONS = 256  # whose lengths are checked before a run


@functools.cache
def _tokenizer(folder: Path) -> Tokenizer:
    """One tokenizer per process: pickled samples hold only the path of its folder."""
    return load_tokenizer(folder)


@dataclass(frozen=True)
class LiveSamples:
    """Random access to samples that are made from records on demand. Several threads may read; it can be pickled.
    Without a `clip_size` there is no image prompt and no "clip_pixels".

    Raises InputError when `tokenizer_folder` holds no tokenizer.
    """

    source: RecordSource
    tokenizer_folder: Path
    resolution: int
    clip_size: int | None
    text_length: int = 77

    def __post_init__(self) -> None:
        _tokenizer(self.tokenizer_folder)  # here, else every record would seem unreadable

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`: "pixels" (resolution, resolution, 3) and "clip_pixels" (clip_size, clip_size, 3) uint8, and
        "input_ids" (text_length,) int32; longer captions are truncated.

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

    def identity(self) -> dict[str, object]:
        """All that the samples depend on, as JSON, without paths."""
        files = vocabulary_files(self.tokenizer_folder)
        return {
            "source": self.source.identity(),
            "tokenizer": {name: sha256(path) for name, path in files.items()},
            "resolution": self.resolution,
            "clip_size": self.clip_size,
            "text_length": self.text_length,
        }

    def account(self) -> str:
        """In one line: the number of records, what is not used, and how many of the first captions are too long.

        Reads the first records only: checking all captions would mean reading all data.
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
        except Exception:  # any error of a damaged record is reported when the record is loaded
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
