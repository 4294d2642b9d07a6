"""The rows of a job: what is asked for, checked one by one, so that a bad row costs that row alone."""

import math
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ipadapter_jax.batch.readers import open_records, spelling
from ipadapter_jax.data.unused_files import INVALID_ROW, UnusedFiles
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.strings import is_utf8
from ipadapter_jax.storage.paths import expand_home

MAX_NAME_BYTES = 150  # of the 255 that file systems allow: numbers, endings and temporary names come on top
_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes in the name of a file that are not UTF-8
_UNSAFE = frozenset('/\\:*?"<>|')


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, image prompts or both. `index` counts the source's records from 0, bad ones too; `line` is where it
    stands. `name` is the stem of its images' files and differs from all others by more than case. None: the
    command's value."""

    index: int
    line: int
    name: str
    prompt: str
    negative_prompt: str
    images: tuple[Path, ...]
    seed: int | None
    scale: float | None


class BadRow(NamedTuple):
    """A row that cannot be used: the number of its line (of the image, in a folder) and why."""

    line: int
    reason: str


class Rows(NamedTuple):
    """The rows of a source, those that cannot be used, and all that is in no row."""

    rows: list[Row]
    bad: list[BadRow]
    unused: UnusedFiles


def read_rows(source: Path) -> Rows:
    """The rows of a folder of images, a CSV or a JSONL file (see `sources.open_records`).

    Columns: prompt, image (relative to the source, or to the current folder where that is a pipe; only looked for, not
    decoded), negative_prompt, seed, scale, name; one of the first two is needed. Without a name a row is called by its
    index: 000017.
    Raises InputError when the source as a whole cannot be used, or no row of it.
    """
    source = expand_home(source)
    rows: list[Row] = []
    bad: list[BadRow] = []
    first = ""  # of what is wrong
    known: dict[str, Row] = {}  # by the spelling of their names
    folder = os.path.abspath(source if source.is_dir() else "." if source.is_fifo() else source.parent)
    records, unused = open_records(source)
    for index, (line, found, place) in enumerate(records):
        try:
            if isinstance(found, InputError):
                raise found
            row = _row(index, line, found, folder)
            if (other := known.setdefault(spelling(row.name), row)) is not row:
                raise InputError(f"name {row.name!r} is that of line {other.line} too{_but(row, other)}; rename one")
            rows.append(row)
        except InputError as error:
            bad.append(BadRow(line, str(error)))
            unused.add(INVALID_ROW, place)
            first = first or (str(error) if source.is_dir() else f"{place}: {error}")  # those of images name them
    if not rows:
        reason = first or "it is empty; give images, or rows below a header"
        raise InputError(f"{source} holds no row that can be used; {reason}")
    return Rows(rows, bad, unused)


def _but(row: Row, other: Row) -> str:
    """In what names differ that are one to some file systems."""
    if row.name == other.name:
        return ""
    is_case = unicodedata.normalize("NFC", row.name) != unicodedata.normalize("NFC", other.name)
    return ", but for case" if is_case else ", but for how accents are written"


def _row(index: int, line: int, fields: dict[str, Any], folder: str) -> Row:
    prompt, images = _string(fields, "prompt"), _images(fields.get("image"), folder)
    if not prompt and not images:
        raise InputError("neither prompt nor image; give one of them or both")
    return Row(
        index=index,
        line=line,
        name=_name(_string(fields, "name", _is_path) or f"{index:06d}"),
        prompt=prompt,
        negative_prompt=_string(fields, "negative_prompt"),
        images=images,
        seed=_seed(fields.get("seed")),
        scale=_scale(fields.get("scale")),
    )


def _is_path(value: str) -> bool:
    """Names of files are bytes, and need not be text."""
    return is_utf8(_UNDECODED.sub("", value))


def _string(fields: dict[str, Any], column: str, is_good: Callable[[str], bool] = is_utf8) -> str:
    """The text of a column, "" where there is none."""
    value = fields.get(column)
    return "" if value is None else _checked_text(value, column, is_good).strip()


def _checked_text(value: Any, column: str, is_good: Callable[[str], bool] = is_utf8) -> str:
    if not isinstance(value, str):
        raise InputError(f"{column} {_shown(value)} is not a text; put it into quotes")
    if "\0" in value and column != "image":
        raise InputError(f"{column} {_shown(value)} holds NUL characters, as UTF-16 does; save the text as UTF-8")
    if not is_good(value):
        raise InputError(f"{column} {_shown(value)} is not UTF-8; save the text as UTF-8")
    return value


def _images(value: Any, folder: str) -> tuple[Path, ...]:
    names = value if isinstance(value, list) else [value] if value not in (None, "") else []
    return tuple(_image(_checked_text(name, "image", _is_path), folder) for name in names)


def _image(name: str, folder: str) -> Path:
    path = os.path.join(folder, expand_home(name))
    if not os.path.isfile(path):
        what = "is a folder, not an image" if os.path.isdir(path) else "does not exist"
        raise InputError(f"image {_shown(name)} {what}; paths are relative to {folder}")
    return Path(path)


def _name(name: str) -> str:
    if not _UNDECODED.sub("", name).isprintable() or name.startswith(".") or _UNSAFE & set(name):
        raise InputError(f'name {_shown(name)} is no good file name; leave out / \\ : * ? " < > | and a first dot')
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise InputError(f"name {_shown(name)} is too long; at most {MAX_NAME_BYTES} bytes")
    return name


def _seed(value: Any) -> int | None:
    if value in (None, ""):
        return None
    number = _number(value)
    if not number.is_integer() or not 0 <= number < 2**32:  # spreadsheets turn 3 into 3.0
        raise InputError(f"seed {_shown(value)} must be a whole number between 0 and 2^32 - 1")
    return int(number)


def _scale(value: Any) -> float | None:
    if value in (None, ""):
        return None
    number = _number(value)
    if not abs(number) < 1e38:  # not NaN: that compares as false
        raise InputError(f"scale {_shown(value)} is not a finite number; 0 is the base model, 1 the full image")
    return number


def _number(value: Any) -> float:
    """NaN for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _shown(value: Any) -> str:
    return repr(value)[:200]
