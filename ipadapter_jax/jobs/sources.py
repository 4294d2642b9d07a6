"""What a job is read from, record by record: a folder of pictures, a CSV file, or JSON objects, one to a line."""

import csv
import difflib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ipadapter_jax.data.metadata import is_metadata, read_metadata
from ipadapter_jax.data.unused import BAD_ROW, FOLDER, NO_IMAGE, NOT_THERE, OTHER, SECOND, Unused, not_read
from ipadapter_jax.errors import InputError
from ipadapter_jax.image_files import is_image_name, unread_format
from ipadapter_jax.texts import LIST_BYTES, byte_order_mark, parse_json, read_bytes

_PROMPTS = (".txt", ".caption")  # endings of the files beside images, by preference
COLUMNS = ("prompt", "image", "negative_prompt", "seed", "scale", "name")
EXAMPLE = '{"prompt": "a red fox", "image": "fox.png"}'

Record = tuple[int, dict[str, Any] | InputError]
"""The number of its first line, from 1, and its values by column, or why it cannot be used. Bytes that are not UTF-8
are lone surrogates in the values."""


def records(source: Path) -> Iterator[Record]:
    """All records in the order of the file; those of a folder by name, one for every picture that lies in it, numbered.

    CSV is told from JSON by its first character. Raises InputError: nothing there, not a text, unknown columns.
    """
    if source.is_dir():
        return _pictures(source)
    text = _text(source)
    return _objects(text) if text.lstrip().startswith(("{", "[")) else _table(text, source)


def unused(source: Path, bad_lines: Iterable[int] = ()) -> Unused:
    """What is in no row: rows that cannot be used, by their lines, and what else lies in a folder of images."""
    found = Unused()
    for line in bad_lines:
        found.add(BAD_ROW, f"line {line}")
    if not source.is_dir():
        return found
    names = _names(source)
    images = {os.path.splitext(name)[0] for name in names if is_image_name(name)}
    prompts, listed = _prompt_files(names), _listed(source, names)
    for name in names:
        stem, ending = os.path.splitext(name)
        ending = ending.lower()
        if is_image_name(name) or (is_metadata(name) and listed):
            continue
        if ending in _PROMPTS:
            if stem not in images:
                found.add(NO_IMAGE, name)
            elif prompts[stem] != name:
                found.add(SECOND, name)
        elif (kind := unread_format(name)) is not None:
            found.add(not_read(kind), name)
        else:
            found.add(FOLDER if (source / name).is_dir() else OTHER, name)
    for name in sorted(listed.keys() - set(names)):
        found.add(NOT_THERE, name)
    return found


def _pictures(folder: Path) -> Iterator[Record]:
    names = _names(folder)
    files, listed = _prompt_files(names), _listed(folder, names)
    for number, picture in enumerate(filter(is_image_name, names), 1):
        name = os.path.splitext(picture)[0]
        fields = {"name": name, "image": picture}
        try:
            if name in files:
                content = read_bytes(folder / files[name])
                fields["prompt"] = content.decode("utf-8-sig", "surrogateescape").strip()
            elif picture in listed:
                fields["prompt"] = listed[picture]
        except InputError as error:
            yield number, error
        else:
            yield number, fields


def _names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _prompt_files(names: list[str]) -> dict[str, str]:
    """The file of a prompt by its stem."""
    found: dict[str, str] = {}
    for ending in reversed(_PROMPTS):
        for name in reversed(names):
            if os.path.splitext(name)[1].lower() == ending:
                found[os.path.splitext(name)[0]] = name
    return found


def _listed(folder: Path, names: list[str]) -> dict[str, str]:
    """The captions of a metadata.jsonl or .csv, by image."""
    lists = read_metadata(folder, names).values()
    return {name: text for entries in lists for name, text in entries if text is not None}


def _text(source: Path) -> str:
    content = read_bytes(source, LIST_BYTES, "give a folder of pictures, a CSV or a JSONL file", pipes=True)
    if (encoding := byte_order_mark(content)) is not None:
        raise InputError(f"{source} is {encoding}: save it as UTF-8")
    if b"\0" in content[:4096]:
        raise InputError(f"{source} is not a text; give a folder of pictures, a CSV or a JSONL file")
    return content.decode("utf-8-sig", "surrogateescape")


def _table(text: str, source: Path) -> Iterator[Record]:
    """CSV with a header. `image` may hold several names, separated by semicolons."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        header = [cell.strip() for cell in next((cells for cells in reader if cells), [])]
        _check_columns(header)
    except (csv.Error, InputError) as error:
        raise InputError(f"{source}, line {reader.line_num}: {error}") from None
    while True:
        first = reader.line_num + 1
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:  # an open quote may have taken many lines with it
            place = f"lines {first} to {reader.line_num}: " if reader.line_num > first else ""
            yield first, InputError(f'{place}not CSV ({error}); close every quote, and double those inside ("")')
            continue
        if not any(cells):
            continue
        if len(cells) != len(header):
            yield (
                first,
                InputError(f"{len(cells)} values for {len(header)} columns; put text that has commas into quotes"),
            )
            continue
        fields: dict[str, Any] = dict(zip(header, cells, strict=True))
        fields["image"] = [name.strip() for name in fields.get("image", "").split(";") if name.strip()]
        yield first, fields


def _objects(text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, "the line", f"a line should look like {EXAMPLE}")
            if not isinstance(value, dict):
                raise InputError(f"not an object; a line should look like {EXAMPLE}")
            _check_columns(value)
        except InputError as error:
            yield number, error
        else:
            yield number, value


def _check_columns(names: Iterable[str]) -> None:
    seen = set()
    for name in names:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name[:100].lower(), COLUMNS, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(
                f"unknown column {name[:100]!r}{hint}; the columns, separated by commas, are {', '.join(COLUMNS)}"
            )
        if name in seen:
            raise InputError(f"two columns are named {name!r}; remove one of them")
        seen.add(name)
