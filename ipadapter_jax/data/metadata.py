"""Captions in a list beside their images, as Hugging Face's imagefolder has it: metadata.jsonl or metadata.csv.

    {"file_name": "dogs/1.jpg", "text": "a red fox"}

Names are relative to the folder of the list, which may lie at any depth.
"""

import csv
import io
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ipadapter_jax.data.columns import ROLES
from ipadapter_jax.data.strings import printable
from ipadapter_jax.errors import InputError
from ipadapter_jax.texts import LIST_BYTES, decode_text, parse_json, read_bytes

NAMES = ("metadata.jsonl", "metadata.csv")
EXAMPLE = '{"file_name": "1.jpg", "text": "a red fox"}'


class Entry(NamedTuple):
    """A caption for the file `name`, relative to the data set's folder; None where the list has no captions."""

    name: str
    text: str | None


def is_metadata(name: str) -> bool:
    return posixpath.basename(name) in NAMES


def read_metadata(root: Path, names: Iterable[str], text_column: str | None = None) -> dict[str, list[Entry]]:
    """The entries of every list among the names of files below a folder, those of outer folders first.

    text_column: the column of captions, where it has no usual name.
    Raises InputError naming the list and the line at fault: no file_name, one outside of the folder, a caption that is
    not text.
    """
    found = sorted(filter(is_metadata, names), key=lambda name: (name.count("/"), name))
    return {name: [*_entries(root / name, posixpath.dirname(name), text_column)] for name in found}


def _entries(path: Path, folder: str, text_column: str | None) -> Iterator[Entry]:
    text = decode_text(read_bytes(path, LIST_BYTES), path)
    usual = (text_column,) if text_column else ROLES["text"][1]
    for number, fields in _objects(text, path) if path.suffix == ".jsonl" else _rows(text, path):
        place = f"{path}, line {number}"
        file = fields.get("file_name") if isinstance(fields, dict) else None
        if not isinstance(file, str) or not file:
            raise InputError(f"{place}: no file_name; a line should look like {EXAMPLE}, or remove the file")
        name = posixpath.normpath(posixpath.join(folder, file))
        if name.startswith(("../", "/")) or posixpath.isabs(file) or "\0" in name:
            raise InputError(f"{place}: {file!r:.200} is not below the data set's folder; move the image there")
        column = next((column for column in usual if column in fields), None)
        caption = fields[column] if column is not None else None
        if not isinstance(caption, str | None):
            raise InputError(f"{place}: {column} is not a text; a line should look like {EXAMPLE}")
        yield Entry(name, None if column is None else printable((caption or "").strip()))


def _objects(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}", f"a line should look like {EXAMPLE}")


def _rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        for row in reader:
            yield reader.reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.reader.line_num}: not CSV ({error}); close every quote") from None
