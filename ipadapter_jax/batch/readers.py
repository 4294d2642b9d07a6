"""Reads the records of a job from a folder of images, a CSV file, or a file with one JSON object per line."""

import contextlib
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.data.formats.caption_lists import CaptionLists, is_metadata
from ipadapter_jax.data.formats.file_groups import TEXTS, caption_of, group_files
from ipadapter_jax.data.unused_files import FOLDER, UnusedFiles
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.formats import is_image_name
from ipadapter_jax.inputs.strings import replace_surrogates
from ipadapter_jax.inputs.suggestions import closest_match
from ipadapter_jax.storage.csv_files import read_csv
from ipadapter_jax.storage.jsonl import parse_json_lines
from ipadapter_jax.storage.text_files import LIST_BYTES, byte_order_mark, read_bytes

COLUMNS = ("prompt", "image", "negative_prompt", "seed", "scale", "name")
EXAMPLE = '{"prompt": "a red fox", "image": "fox.png"}'


class SourceRecord(NamedTuple):
    """One record of a source.

    line: the number of its first line, from 1; in a folder, the number of its image. values: by column, or why the
    record cannot be used; bytes that are not UTF-8 are lone surrogates. place: names the line or image in messages.
    """

    line: int
    values: dict[str, object] | InputError
    place: str


class SourceRecords(NamedTuple):
    """The records of a source in order, each read when it is reached, and the files that belong to no record."""

    records: Iterator[SourceRecord]
    unused: UnusedFiles


class _FolderRow(NamedTuple):
    """A row of a folder: the file of the image prompt, and the caption: a file with this `role`, or a text."""

    name: str
    file: str
    role: str | None
    caption: str | None


def fold_name(name: str) -> str:
    """Equal for names that are the same to file systems which ignore case and the encoding of accents."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


def open_records(source: Path) -> SourceRecords:
    """All records in the order of the file. A folder gives one record for each of its images, sorted by name; its files
    are grouped as in a data set, see `data.formats.file_groups`.

    The first character tells JSON from CSV. Raises InputError when nothing is there, when it is not text, for unknown
    columns, and for a list of captions that is needed and cannot be used.
    """
    if source.is_dir():
        return _folder(source)
    text = _text(source)
    return SourceRecords(
        _objects(text) if text.lstrip().startswith(("{", "[")) else _table(text, source), UnusedFiles()
    )


def _folder(folder: Path) -> SourceRecords:
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    folders = [name for name in names if (folder / name).is_dir()]
    files = [name for name in names if name not in {*folders} and not is_metadata(name)]
    found, listed = group_files(files), CaptionLists(folder, names)
    if not found.records:
        _check_deeper(folder, folders)
    by_image = sorted((members["image"], stem, members) for stem, members in found.records)
    row_names = _names([(stem, files[image]) for image, stem, _ in by_image])
    images = []
    for name, (_, _, members) in zip(row_names, by_image, strict=True):
        role = next((role for role in TEXTS if role in members), None)
        number = listed.take(files[members["image"]], role is not None)
        caption = files[members[role]] if role is not None else listed.texts[number] if number >= 0 else None
        images.append(_FolderRow(name, files[members.get("cond", members["image"])], role, caption))
    for name in folders:
        found.unused.add(FOLDER, name)
    listed.close(found.unused)
    return SourceRecords(_images(folder, images), found.unused)


def _check_deeper(folder: Path, names: list[str]) -> None:
    """Raises InputError naming the subfolders that hold images, as those of img2dataset do."""
    deeper = []
    for name in names:
        with contextlib.suppress(OSError):
            if any(is_image_name(file) for file in os.listdir(folder / name)):
                deeper.append(replace_surrogates(f"{name}/"))
    if deeper:
        shown = ", ".join([*deeper[:3], *(["..."] if len(deeper) > 3 else [])])
        raise InputError(
            f"{folder} holds no row that can be used; its images lie in {shown}; give one of these folders, or a .csv "
            "or .jsonl list of the images"
        )


def _names(images: list[tuple[str, str]]) -> list[str]:
    """A unique name for the row of each image, which is given as stem and file: the stem for the first image that has
    it; for others with the extension, a-png, and with a number where that name is taken too."""
    first: dict[str, str] = {}  # by spelling
    for stem, file in images:
        first.setdefault(fold_name(stem), file)
    taken, names = {*first}, []
    for stem, file in images:
        name = stem
        if first[fold_name(stem)] != file:
            whole = f"{stem.strip()}-{os.path.splitext(file)[1][1:].lower()}"
            tries = itertools.chain([whole], (f"{whole}-{number}" for number in itertools.count(2)))
            name = next(name for name in tries if fold_name(name) not in taken)
            taken.add(fold_name(name))
        names.append(name)
    return names


def _images(folder: Path, images: list[_FolderRow]) -> Iterator[SourceRecord]:
    for number, image in enumerate(images, 1):
        prompt = image.caption
        try:
            if image.role is not None and prompt is not None:
                prompt = caption_of(image.role, read_bytes(folder / prompt), image.file)
        except InputError as error:
            yield SourceRecord(number, error, replace_surrogates(image.file))
        else:
            fields: dict[str, object] = {"name": image.name, "image": image.file}
            fields |= {} if prompt is None else {"prompt": prompt}
            yield SourceRecord(number, fields, replace_surrogates(image.file))


def _text(source: Path) -> str:
    content = read_bytes(source, LIST_BYTES, "give a folder of images, a CSV or a JSONL file", pipes=True)
    if (encoding := byte_order_mark(content)) is not None:
        raise InputError(f"{source} is {encoding}: save it as UTF-8")
    if b"\0" in content[:4096]:
        raise InputError(f"{source} is not a text; give a folder of images, a CSV or a JSONL file")
    return content.decode("utf-8-sig", "surrogateescape")


def _table(text: str, source: Path) -> Iterator[SourceRecord]:
    """CSV with a header. `image` may hold several names, separated by semicolons."""
    table = read_csv(text, source)
    try:
        _check_columns(table.columns)
    except InputError as error:
        raise InputError(f"{source}, line {table.line}: {error}") from None
    for line, values in table.rows:
        if isinstance(values, InputError):
            yield SourceRecord(line, values, f"line {line}")
        else:
            names = [name.strip() for name in values.get("image", "").split(";")]
            images = [name for name in names if name]
            yield SourceRecord(line, {**values, "image": images}, f"line {line}")


def _objects(text: str) -> Iterator[SourceRecord]:
    remedy = f"a line should look like {EXAMPLE}"
    for number, value in parse_json_lines(text, remedy):
        try:
            if isinstance(value, InputError):
                raise value
            if not isinstance(value, dict):
                raise InputError(f"not an object; {remedy}")
            _check_columns(value)
        except InputError as error:
            yield SourceRecord(number, error, f"line {number}")
        else:
            yield SourceRecord(number, value, f"line {number}")


def _check_columns(names: Iterable[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            near = closest_match(name[:100], COLUMNS)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise InputError(
                f"unknown column {name[:100]!r}{hint}; the columns, separated by commas, are {', '.join(COLUMNS)}"
            )
