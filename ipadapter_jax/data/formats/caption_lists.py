"""Captions in a list next to their images, as in Hugging Face's imagefolder: metadata.jsonl or metadata.csv.

    {"file_name": "dogs/1.jpg", "text": "a red fox"}

Names are relative to the folder of the list, which may be at any depth.
"""

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.data.formats.column_names import ROLES
from ipadapter_jax.data.unused_files import (
    LIST_WITHOUT_CAPTIONS,
    MISSING_IMAGE,
    SECOND_CAPTION,
    UNUSABLE_LIST,
    UnusedFiles,
)
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.strings import replace_surrogates
from ipadapter_jax.storage.csv_files import read_csv
from ipadapter_jax.storage.jsonl import parse_json_lines
from ipadapter_jax.storage.text_files import LIST_BYTES, decode_text, read_bytes

NAMES = ("metadata.jsonl", "metadata.csv")
EXAMPLE = '{"file_name": "1.jpg", "text": "a red fox"}'


class ListedCaption(NamedTuple):
    """A caption for the file `name`, relative to the data set's folder; None if the list has no captions."""

    name: str
    text: str | None


def is_metadata(name: str) -> bool:
    return posixpath.basename(name) in NAMES


class CaptionLists:
    """The captions in all lists below a folder, and which of them are needed. For an image in several lists, the list
    in the deepest folder counts.

    names: all files below the folder. text_column: the column of captions, if it has no usual name.
    Raises InputError if no list has the given column.
    """

    def __init__(self, root: Path, names: Iterable[str], text_column: str | None = None):
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}  # of the texts, by image
        self._owners: dict[str, str] = {}
        self._seen: dict[str, bool] = {}  # images with captions: whether one is needed
        self._again: list[str] = []
        self._without: dict[str, InputError] = {}  # lists without captions
        self._unusable: dict[str, InputError] = {}
        lists = sorted(filter(is_metadata, names), key=lambda name: (name.count("/"), name))
        for file in lists:
            try:
                found = _read(root / file, posixpath.dirname(file), text_column)
            except InputError as error:
                self._unusable[file] = error
            else:
                self._add(file, found.entries)
                if all(entry.text is None for entry in found.entries):
                    self._without[file] = _no_captions(root / file, found.columns, text_column)
        if text_column and len(self._unusable) + len(self._without) == len(lists):
            self.check_columns()

    def take(self, image: str, has_file: bool) -> int:
        """The number of an image's text in `texts`; -1 if it has none or, with a caption file, does not need it.

        Raises InputError if it needs one and a list that might have it cannot be used. The message names the list and
        the line (no file_name, one outside of the folder, a caption that is not text, ...).
        """
        number = self._numbers.get(image, -1)
        if number >= 0:
            self._seen[image] = not has_file
        elif not has_file:
            for file, error in self._unusable.items():
                if image.startswith(file.removesuffix(posixpath.basename(file))):
                    raise error
        return -1 if has_file else number

    def check_columns(self) -> None:
        """Raises InputError naming a list without captions and its columns, or a list that cannot be used, if there is
        one. Called when no image has a caption."""
        if error := next(iter([*self._without.values(), *self._unusable.values()]), None):
            raise error

    def close(self, unused: UnusedFiles) -> list[str]:
        """Adds the captions and lists that no image needs to `unused`. Returns the names of the lists that are used."""
        for name, file in self._owners.items():
            if name not in self._seen:
                unused.add(MISSING_IMAGE, f"{file}: {name}")
            elif not self._seen[name]:
                unused.add(SECOND_CAPTION, f"{file}: {name}")
        for name in self._again:
            unused.add(SECOND_CAPTION, name)
        for name in self._unusable:
            unused.add(UNUSABLE_LIST, name)
        for name in self._without:
            unused.add(LIST_WITHOUT_CAPTIONS, name)
        return sorted({self._owners[name] for name, needed in self._seen.items() if needed})

    def _add(self, file: str, entries: list[ListedCaption]) -> None:
        own: set[str] = set()
        for name, text in entries:
            if text is None:
                continue
            if name in own:
                self._again.append(f"{file}: {name}")
                continue
            own.add(name)
            self._numbers[name], self._owners[name] = len(self.texts), file
            self.texts.append(text)


class _Line(NamedTuple):
    number: int
    fields: Mapping[str, object]


class _List(NamedTuple):
    entries: list[ListedCaption]
    columns: list[str]


def _read(path: Path, folder: str, text_column: str | None) -> _List:
    """Reads a list whose names are relative to `folder`. Raises InputError naming the invalid line."""
    text = decode_text(read_bytes(path, LIST_BYTES), path)
    usual = (text_column,) if text_column else ROLES["text"].names
    columns: dict[str, None] = {}  # in their order
    entries = []
    for number, fields in _objects(text, path) if path.suffix == ".jsonl" else _rows(text, path):
        entries.append(_entry(fields, f"{path}, line {number}", folder, usual))
        columns.update(dict.fromkeys(fields))
    return _List(entries, [*columns])


def _entry(fields: Mapping[str, object], place: str, folder: str, usual: Iterable[str]) -> ListedCaption:
    file = fields.get("file_name")
    if not isinstance(file, str) or not file:
        raise InputError(f"{place}: no file_name; a line should look like {EXAMPLE}, or remove the file")
    name = posixpath.normpath(posixpath.join(folder, file))
    if name.startswith(("../", "/")) or posixpath.isabs(file) or "\0" in name:
        raise InputError(f"{place}: {file!r:.200} is not below the data set's folder; move the image there")
    column = next((column for column in usual if column in fields), None)
    caption = fields[column] if column is not None else None
    if not isinstance(caption, str | None):
        raise InputError(f"{place}: {column} is not a text; a line should look like {EXAMPLE}")
    return ListedCaption(name, None if column is None else replace_surrogates((caption or "").strip()))


def _no_captions(path: Path, columns: list[str], text_column: str | None) -> InputError:
    if not columns:
        return InputError(f"{path} is an empty list; a line should look like {EXAMPLE}")
    has = replace_surrogates(", ".join(columns))[:500]
    if text_column:
        return InputError(f"{argument('text_column', text_column)}: {path} has no column {text_column}; it has {has}")
    usual = ", ".join(ROLES["text"].names)
    return InputError(
        f"{path} has no column of captions ({usual}); it has {has}; name the one that is meant by "
        f"{argument('text_column')}"
    )


def _objects(text: str, path: Path) -> Iterator[_Line]:
    for number, value in parse_json_lines(text, f"a line should look like {EXAMPLE}", path):
        if isinstance(value, InputError):
            raise value
        yield _Line(number, value if isinstance(value, dict) else {})  # which has no file_name


def _rows(text: str, path: Path) -> Iterator[_Line]:
    for number, row in read_csv(text, path).rows:
        if isinstance(row, InputError):
            raise InputError(f"{path}, line {number}: {row}")
        yield _Line(number, row)
