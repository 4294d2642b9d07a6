"""CSV with a header, row by row: a row that does not fit the header is an error of that row, never truncated or
padded."""

import csv
import io
from collections.abc import Iterator
from typing import NamedTuple

from ipadapter_jax.errors import InputError


class CsvRow(NamedTuple):
    """The number of the first line of a row, from 1, and its values by column, or the error in it."""

    line: int
    values: dict[str, str] | InputError


class CsvTable(NamedTuple):
    """The columns that the header in `line` names, and an iterator that reads the rows below it."""

    line: int
    columns: list[str]
    rows: Iterator[CsvRow]


def read_csv(text: str, place: object) -> CsvTable:
    """A table without spaces around values and without empty rows. Raises InputError naming the place for a header that
    is not CSV or has a column twice."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        columns = [cell.strip() for cell in next((cells for cells in reader if cells), [])]
    except csv.Error as error:
        raise InputError(f"{place}, line {reader.line_num}: {error}; close every quote of the header") from None
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{place}, line {reader.line_num}: two columns are named {twice[:100]!r}; remove one of them")
    return CsvTable(reader.line_num, columns, _rows(reader, columns))


def _rows(reader, columns: list[str]) -> Iterator[CsvRow]:
    while True:
        first = reader.line_num + 1
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:  # an open quote may extend over many lines
            place = f"lines {first} to {reader.line_num}: " if reader.line_num > first else ""
            message = f'{place}not CSV ({error}); close every quote, and double those inside ("")'
            yield CsvRow(first, InputError(message))
            continue
        if len(cells) == len(columns):
            if any(cells):
                yield CsvRow(first, dict(zip(columns, cells, strict=True)))
        elif any(cells):
            message = f"{len(cells)} values for {len(columns)} columns; put text that has commas into quotes"
            yield CsvRow(first, InputError(message))
