"""Finds which image was made for which image prompt, if another program has made them."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.batch.job_settings import read_settings
from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.prompts import Reference
from ipadapter_jax.images.formats import SUFFIXES, unread_format
from ipadapter_jax.storage.csv_files import read_csv
from ipadapter_jax.storage.nearby_paths import nearby_hint
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.storage.text_files import LIST_BYTES, decode_text, read_bytes


class FoundImage(NamedTuple):
    """An image, the name of its image prompt, and its number among the images of that prompt."""

    number: int
    name: str
    path: Path


def find_images(place: Path, references: Sequence[Reference]) -> list[list[Path]]:
    """The images of every image prompt, from a folder (name.png, or name-0.png, name-1.png and so on, in any format) or
    a CSV file with the columns name and image (relative to the file).

    Other images are left out with a warning. Raises InputError naming a prompt without images, or with another number
    of images than the first prompt.
    """
    if place.is_dir() and (unread := [name for name in sorted(os.listdir(place)) if unread_format(name)]):
        warnings.warn(
            f"{place}: {len(unread)} images, {unread[0]} the first, are of a kind that is not read; convert them to "
            "JPEG or PNG",
            stacklevel=2,
        )
    numbered: dict[str, list[tuple[int, Path]]] = {reference.name: [] for reference in references}
    unmatched = []
    for number, name, path in _listed(place) if place.is_file() else _in_folder(place, set(numbered)):
        numbered[name].append((number, path)) if name in numbered else unmatched.append(path.name)
    found = [[path for _, path in sorted(numbered[reference.name])] for reference in references]
    _check(place, references, [len(paths) for paths in found])
    if unmatched:
        first = sorted(unmatched)[0]
        warnings.warn(f"{place}: {len(unmatched)} images, {first} the first, belong to no image prompt", stacklevel=2)
    return found


def _in_folder(folder: Path, names: set[str]) -> Iterator[FoundImage]:
    """Yields the images whose names begin with the name of an image prompt, and all others under their stem."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder or CSV file of images; check the spelling{nearby_hint(folder)}")
    for file in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(file)
        if suffix.lower() not in SUFFIXES or file.startswith("."):
            continue
        parts = re.fullmatch(r"(.+)-(\d+)", stem)
        if stem in names or parts is None:
            yield FoundImage(0, stem, folder / file)
        else:
            yield FoundImage(int(parts[2]), parts[1], folder / file)


def _listed(path: Path) -> Iterator[FoundImage]:
    """Yields the images of a CSV file, numbered by its lines. Names may have the extension of the prompt's file."""
    table = read_csv(decode_text(read_bytes(path, LIST_BYTES), path), path)
    for number, row in table.rows:
        if isinstance(row, InputError):
            raise InputError(f"{path}, line {number}: {row}")
        name, image = row.get("name", ""), row.get("image") or row.get("picture", "")  # picture: in older lists
        if not name or not image:
            raise InputError(f"{path}, line {number}: no name or image; the first line has to name both columns")
        place = path.parent / expand_home(image)
        if not os.path.isfile(place):
            raise InputError(f"{path}, line {number}: there is no image {place}; correct its name")
        stem, suffix = os.path.splitext(name)
        yield FoundImage(number, stem if suffix.lower() in SUFFIXES else name, place)


def _check(place: Path, references: Sequence[Reference], counts: Sequence[int]) -> None:
    empty = [reference.name for reference, count in zip(references, counts, strict=True) if not count]
    if empty:
        raise InputError(
            f"{place}: {len(empty)} of {len(references)} image prompts, {empty[0]} the first, have no image there; "
            f"call theirs {empty[0]}.png, or {empty[0]}-0.png and so on, or list them in a CSV file"
        )
    for reference, count in zip(references, counts, strict=True):
        if count != counts[0]:
            raise InputError(
                f"{place}: {count} images of {reference.name} and {counts[0]} of {references[0].name}; all image "
                "prompts need equally many"
            )


def recorded_settings(folder: Path) -> dict[str, object] | None:
    """The settings that images were made with, where a job of `ipadapter-jax` made the images of this folder."""
    try:
        return read_settings(LocalStore(folder))
    except InputError:
        return None
