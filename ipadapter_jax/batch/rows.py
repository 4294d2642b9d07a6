"""The rows of a job. Each is checked independently, so that an invalid row costs that row alone."""

import math
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.batch.readers import fold_name, open_records
from ipadapter_jax.data.unused_files import INVALID_ROW, UnusedFiles
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.strings import is_utf8
from ipadapter_jax.storage.paths import expand_home

MAX_NAME_BYTES = 150  # of the 255 that file systems allow: numbers, endings and temporary names come on top
_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes in the name of a file that are not UTF-8
_UNSAFE = frozenset('/\\:*?"<>|')


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A prompt, image prompts or both. A seed or scale of None means the command's value.

    index: the number of the row's record in the source, from 0; invalid ones count. line: its line there. name: the
    stem of the files of its images, which differs from the names of other rows by more than case.
    """

    index: int
    line: int
    name: str
    prompt: str
    negative_prompt: str
    images: tuple[Path, ...]
    seed: int | None
    scale: float | None


class InvalidRow(NamedTuple):
    """A row that cannot be used: the number of its line (in a folder, of the image) and the reason."""

    line: int
    reason: str


class BatchRows(NamedTuple):
    """The rows of a source, the rows that cannot be used, and the files that belong to no row."""

    rows: list[BatchRow]
    invalid: list[InvalidRow]
    unused: UnusedFiles


def read_rows(source: Path) -> BatchRows:
    """Reads the rows of a folder of images, a CSV or a JSONL file (see `readers.open_records`).

    Columns: prompt, image, negative_prompt, seed, scale, name; one of the first two is needed. An image is relative to
    the source, or to the current folder if the source is a pipe; its existence is checked, and it is not decoded. A row
    without a name is named by its index: 000017.
    Raises InputError when the source as a whole cannot be used, or none of its rows.
    """
    source = expand_home(source)
    rows: list[BatchRow] = []
    invalid: list[InvalidRow] = []
    first = ""  # reason of the first invalid row
    known: dict[str, BatchRow] = {}  # by the spelling of their names
    folder = os.path.abspath(source if source.is_dir() else "." if source.is_fifo() else source.parent)
    records, unused = open_records(source)
    for index, (line, found, place) in enumerate(records):
        try:
            if isinstance(found, InputError):
                raise found
            row = _row(index, line, found, folder)
            if (other := known.setdefault(fold_name(row.name), row)) is not row:
                raise InputError(
                    f"name {row.name!r} is that of line {other.line} too{_difference(row, other)}; rename one"
                )
            rows.append(row)
        except InputError as error:
            invalid.append(InvalidRow(line, str(error)))
            unused.add(INVALID_ROW, place)
            first = first or (str(error) if source.is_dir() else f"{place}: {error}")  # those of images name them
    if not rows:
        reason = first or "it is empty; give images, or rows below a header"
        raise InputError(f"{source} holds no row that can be used; {reason}")
    return BatchRows(rows, invalid, unused)


def _difference(row: BatchRow, other: BatchRow) -> str:
    """How names differ that some file systems take for the same."""
    if row.name == other.name:
        return ""
    is_case = unicodedata.normalize("NFC", row.name) != unicodedata.normalize("NFC", other.name)
    return ", but for case" if is_case else ", but for how accents are written"


def _row(index: int, line: int, fields: dict[str, object], folder: str) -> BatchRow:
    prompt, images = _string(fields, "prompt"), _images(fields.get("image"), folder)
    if not prompt and not images:
        raise InputError("neither prompt nor image; give one of them or both")
    return BatchRow(
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
    """Whether this is UTF-8 or holds undecoded bytes: names of files need not be text."""
    return is_utf8(_UNDECODED.sub("", value))


def _string(fields: dict[str, object], column: str, is_good: Callable[[str], bool] = is_utf8) -> str:
    """The text of a column, "" if it has none."""
    value = fields.get(column)
    return "" if value is None else _checked_text(value, column, is_good).strip()


def _checked_text(value: object, column: str, is_good: Callable[[str], bool] = is_utf8) -> str:
    if not isinstance(value, str):
        raise InputError(f"{column} {_shown(value)} is not a text; put it into quotes")
    if "\0" in value and column != "image":
        raise InputError(f"{column} {_shown(value)} holds NUL characters, as UTF-16 does; save the text as UTF-8")
    if not is_good(value):
        raise InputError(f"{column} {_shown(value)} is not UTF-8; save the text as UTF-8")
    return value


def _images(value: object, folder: str) -> tuple[Path, ...]:
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
        raise InputError(f'name {_shown(name)} is not a safe file name; leave out / \\ : * ? " < > | and a first dot')
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise InputError(f"name {_shown(name)} is too long; at most {MAX_NAME_BYTES} bytes")
    return name


def _seed(value: object) -> int | None:
    if value in (None, ""):
        return None
    number = _number(value)
    if not number.is_integer() or not 0 <= number < 2**32:  # spreadsheets turn 3 into 3.0
        raise InputError(f"seed {_shown(value)} must be a whole number between 0 and 2^32 - 1")
    return int(number)


def _scale(value: object) -> float | None:
    if value in (None, ""):
        return None
    number = _number(value)
    if not abs(number) < 1e38:  # not NaN: that compares as false
        raise InputError(f"scale {_shown(value)} is not a finite number; 0 is the base model, 1 the full image")
    return number


def _number(value: object) -> float:
    """The number, or NaN for what is not a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _shown(value: object) -> str:
    return repr(value)[:200]
