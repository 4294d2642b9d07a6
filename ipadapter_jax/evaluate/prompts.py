"""Reads the image prompts of an evaluation with their captions, from COCO's annotations or any training data."""

import dataclasses
import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from ipadapter_jax.data.file_listing import read_file
from ipadapter_jax.data.open_dataset import open_dataset
from ipadapter_jax.data.types import RecordSource
from ipadapter_jax.data.unused_files import UnusedFiles, summarize
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.evaluate.coco import read_coco
from ipadapter_jax.images.preprocess import decode_image
from ipadapter_jax.storage.atomic_files import sha256

log = logging.getLogger("ipadapter_jax")

_SAFE = re.compile(r"\w[\w .+=@-]{0,149}")  # file names


@dataclasses.dataclass(frozen=True)
class Reference:
    """An image prompt.

    name: the stem of the files of its images. key: names it in messages. stamp: changes when the image changes. read:
    returns the bytes of its file.
    """

    index: int
    name: str
    key: str
    captions: tuple[str, ...]
    stamp: str
    read: Callable[[], bytes]

    def digest(self) -> str:
        """The sha256 of its present content. Safe in threads."""
        return hashlib.sha256(self.read()).hexdigest()

    def image(self) -> Image.Image:
        """The image as RGB. Raises InputError naming it if it cannot be read. Safe in threads."""
        return decode_image(self.read(), self.key)


class References(NamedTuple):
    """All image prompts. identity: describes their source, but not its path, as JSON."""

    found: Sequence[Reference]
    identity: dict[str, object]


def open_references(
    path: Path,
    *,
    image_root: Path | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    limit: int | None = None,
    report: Callable[[str], object] = log.info,
) -> References:
    """Opens the first `limit` image prompts at `path`, or all: a JSON file of COCO captions, or any data that
    `open_dataset` reads with these arguments. Images are read when they are used. report: is called with one line, the
    number of records and what is not used.

    Raises InputError for a single unusable record: the mean over fewer prompts would be another number.
    """
    coco = read_coco(path)
    if coco is None:
        root = None if image_root is None else str(image_root)
        source = open_dataset(str(path), image_root=root, image_column=image_column, text_column=text_column)
        references = _of_source(source, limit)
        report(f"{path}: {summarize(len(references.found), source.unused)}")
        return references
    for option, value in (("image-column", image_column), ("text-column", text_column)):
        if value is not None:
            raise InputError(f"--{option} {value}: {path} holds COCO's captions, which have no columns; leave it out")
    root = path.parent if image_root is None else image_root
    chosen = coco[:limit]
    missing = [entry.file for entry in chosen if not os.path.isfile(root / entry.file)]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(chosen)} images, {missing[0]} the first, are not in {root}; name their "
            f"folder with {argument('image_root')}, or download them again"
        )
    report(f"{path}: {summarize(len(chosen), UnusedFiles())}")
    names = _names([entry.file for entry in chosen])
    found = [
        Reference(i, name, entry.file, entry.captions, _stamp(root / entry.file), _file_reader(root, entry.file))
        for i, (name, entry) in enumerate(zip(names, chosen, strict=True))
    ]
    return References(
        found, {"kind": "COCO captions", "file": path.name, "sha256": sha256(path), "prompts": len(found)}
    )


def _of_source(source: RecordSource, limit: int | None) -> References:
    """Reads every record once, for its caption. The image prompt is the record's conditioning image if it has one, else
    its image."""
    count = len(source) if limit is None else min(limit, len(source))
    names, found = _names([source.key(index) for index in range(count)]), []
    for index, name in enumerate(names):
        record = source[index]
        if not record.text.strip():
            raise InputError(f"{record.key} has no caption, which CLIP-T needs; give it one")
        content = record.cond_image or record.image
        stamp = hashlib.sha256(content).hexdigest()
        found.append(Reference(index, name, record.key, (record.text,), stamp, _reader(source, index)))
    return References(found, {**source.identity(), "prompts": count})


def _reader(source: RecordSource, index: int) -> Callable[[], bytes]:
    def read() -> bytes:
        record = source[index]
        return record.cond_image or record.image

    return read


def _file_reader(root: Path, name: str) -> Callable[[], bytes]:
    return functools.partial(read_file, str(root / name), name)


def _names(keys: Sequence[str]) -> list[str]:
    """The stems of the keys if they are safe file names that differ by more than case, else numbers."""
    stems = [PurePosixPath(key).stem for key in keys]
    usable = all(_SAFE.fullmatch(stem) for stem in stems) and len({stem.casefold() for stem in stems}) == len(stems)
    return stems if usable else [f"{index:06d}" for index in range(len(keys))]


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"
