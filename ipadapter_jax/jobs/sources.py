"""What a job is read from, record by record: a folder of pictures, a CSV file, or JSON objects, one to a line."""

import csv
import difflib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ipadapter_jax.errors import InputError
from ipadapter_jax.image_files import SUFFIXES
from ipadapter_jax.texts import LIST_BYTES, byte_order_mark, parse_json, read_bytes

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


def _pictures(folder: Path) -> Iterator[Record]:
    files = set(os.listdir(folder))
    pictures = (name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."))
    for number, picture in enumerate(sorted(pictures), 1):
        name = os.path.splitext(picture)[0]
        fields = {"name": name, "image": picture}
        if f"{name}.txt" in files:
            try:
                prompt = (folder / f"{name}.txt").read_text(encoding="utf-8-sig", errors="surrogateescape")
            except OSError as error:
                yield number, InputError(f"{name}.txt cannot be read ({error.strerror}); check access")
                continue
            fields["prompt"] = prompt.strip()
        yield number, fields


def _text(source: Path) -> str:
    content = read_bytes(source, LIST_BYTES, "give a folder of pictures, a CSV or a JSONL file")
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
