"""Parquet with the bytes of images in a column, as Hugging Face's datasets and img2dataset write it.

Parquet is read by row groups: random access to a record costs its whole group. With images of 60 kB in groups of 10,
100 and 1000 rows, 3400, 530 and 29 records per second were read at random on one core. Hugging Face writes groups of
100 rows; larger groups should be rewritten: `pyarrow.parquet.write_table(table, file, row_group_size=100)`.

A few bytes of Parquet can unpack to gigabytes: a repeated value, or compressed zeros. So the declared size of a group
is compared with limits before it is read, and repeated values stay in their dictionary.
"""

import functools
import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ipadapter_jax.data.file_listing import FileListing
from ipadapter_jax.data.formats.column_names import IMAGE, TEXT, ColumnNames, choose_columns
from ipadapter_jax.data.formats.parquet_pages import DamagedPage, unpacked_bytes
from ipadapter_jax.data.types import DataIdentity, Record
from ipadapter_jax.data.unused_files import NO_BYTES, UnusedFiles
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.strings import replace_surrogates
from ipadapter_jax.storage.paths import check_utf8

LARGE_GROUP = 64 << 20  # bytes
MAX_GROUP = 1 << 30  # bytes
MAX_GROUP_ROWS = 1 << 20  # pyarrow's default
MAX_RATIO = 100  # of unpacked to packed bytes in large groups: images and captions compress less
CACHED_GROUPS = 4  # so that a few threads that read in order read each group about once


class ParquetSource:
    """Rows in the order of their files' names. An image is binary, or a struct with a binary field `bytes`.

    columns: their names, if they are not the usual ones.
    Raises InputError: damaged, not Parquet, or no such column, with a list of the existing ones.
    """

    def __init__(self, files: FileListing, columns: ColumnNames):
        self._files, self.unused = files, UnusedFiles()
        self._metadata = [_metadata(files.path(i)) for i in range(len(files))]
        schema = self._metadata[0].schema.to_arrow_schema()
        for i, metadata in enumerate(self._metadata):  # all files must have the columns chosen in the first one
            columns = choose_columns(
                columns, _kinds(metadata.schema.to_arrow_schema()), replace_surrogates(files.path(i))
            )
        self._columns = columns
        # Of a struct, only the bytes are read.
        self._read = [f"{n}.bytes" if pa.types.is_struct(schema.field(n).type) else n for n in columns if n]
        groups = [(i, g, m.row_group(g)) for i, m in enumerate(self._metadata) for g in range(m.num_row_groups)]
        self._groups = [(i, g) for i, g, _ in groups]
        self._group_starts = np.cumsum([0, *(group.num_rows for _, _, group in groups)])  # and the end of the last
        self._file_starts = np.cumsum([0, *(metadata.num_rows for metadata in self._metadata)])
        self._cached = functools.lru_cache(CACHED_GROUPS)(self._read_group)
        for file, number, group in groups:
            if empty := _without_bytes(group, self._read[0]):
                place = f"{files.names[file]}: row group {number}"
                self.unused.add(NO_BYTES, place, is_record=True, count=empty)
            _check_group(group, self._read, f"{replace_surrogates(files.path(file))}: row group {number}")
        _warn_of_large_groups([group for _, _, group in groups], replace_surrogates(files.path(0)))

    def __len__(self) -> int:
        return int(self._file_starts[-1])

    def __getitem__(self, index: int) -> Record:
        key = self.key(index)
        group = int(np.searchsorted(self._group_starts, index, "right")) - 1
        try:
            table = self._cached(group)
            row = int(index - self._group_starts[group])
            image, text, cond_image = (_value(table, name, row) for name in self._columns)
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:  # ValueError: a text that is not UTF-8
            raise InputError(f"{key}: the file is damaged ({_short(error)}); download it again") from None
        if image is None:
            raise InputError(f"{key}: no bytes under {self._columns.image!r}; store images in the file, not paths")
        return Record(key, image, text or "", cond_image)

    def key(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self._file_starts, index, "right")) - 1
        return replace_surrogates(f"{self._files.names[file]}:{index - self._file_starts[file]}")

    def identity(self) -> DataIdentity:
        return self._files.identity("parquet", len(self))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_cached"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._cached = functools.lru_cache(CACHED_GROUPS)(self._read_group)

    def _read_group(self, group: int) -> pa.Table:
        file, number = self._groups[group]
        # A reader must not be shared by threads; with known metadata a new one costs 0.03 ms.
        path, metadata = self._files.path(file), self._metadata[file]
        _check_pages(path, _chosen(metadata.row_group(number), self._read))
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=self._read) as parquet:
            return parquet.read_row_group(number, columns=self._read, use_threads=False)


def _metadata(path: str) -> pq.FileMetaData:
    check_utf8(path, "the reader of Parquet")
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{replace_surrogates(path)}: not a whole Parquet file ({_short(error)}); download it again"
        ) from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def _kinds(schema: pa.Schema) -> dict[str, str]:
    def kind(of: pa.DataType) -> str:
        return IMAGE if _is_image(of) else TEXT if _is_text(of) else str(of)

    return {field.name: kind(field.type) for field in schema}


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    if pa.types.is_dictionary(kind):
        return _is_image(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _value(table: pa.Table, column: str | None, row: int) -> Any:
    value = table.column(column)[row].as_py() if column else None
    return value["bytes"] if isinstance(value, dict) else value


def _chosen(group: pq.RowGroupMetaData, read: list[str]) -> list[pq.ColumnChunkMetaData]:
    columns = (group.column(i) for i in range(group.num_columns))
    return [column for column in columns if column.path_in_schema in read]


def _without_bytes(group: pq.RowGroupMetaData, image: str) -> int:
    """The number of rows without an image, if the file records it; else 0."""
    (column,) = _chosen(group, [image])
    statistics = column.statistics
    return statistics.null_count if statistics is not None and statistics.has_null_count else 0


def _check_pages(path: str, columns: list[pq.ColumnChunkMetaData]) -> None:
    """Raises DamagedPage for columns whose pages unpack to more than declared and to more than LARGE_GROUP."""
    with open(path, "rb", buffering=0) as file:
        for column in columns:
            start = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            found = unpacked_bytes(file.fileno(), start, column.total_compressed_size)
            if found > max(column.total_uncompressed_size, LARGE_GROUP):
                raise DamagedPage(f"{column.path_in_schema} unpacks to {found:,} bytes, against its own list")


def _check_group(group: pq.RowGroupMetaData, read: list[str], where: str) -> None:
    """Raises InputError for a group that would need far more memory than images of its size."""
    chosen = _chosen(group, read)
    unpacked = sum(column.total_uncompressed_size for column in chosen)
    packed = sum(column.total_compressed_size for column in chosen)
    bomb = unpacked > max(LARGE_GROUP, MAX_RATIO * packed)
    if bomb or unpacked > MAX_GROUP or group.num_rows > MAX_GROUP_ROWS:
        raise InputError(
            f"{where} of {packed >> 10} KiB declares {group.num_rows:,} rows of {unpacked >> 20} MiB together, more "
            "than is read at once; rewrite it with pyarrow.parquet.write_table(table, file, row_group_size=100)"
        )


def _warn_of_large_groups(groups: list[pq.RowGroupMetaData], where: str) -> None:
    if not sum(group.num_rows for group in groups):
        raise InputError(f"{where}: no rows; give Parquet files with one row per image")
    if (size := max(group.total_byte_size for group in groups)) > LARGE_GROUP:
        warnings.warn(
            f"{where}: row groups of up to {size >> 20} MiB make reading at random slow; rewrite it with "
            "pyarrow.parquet.write_table(table, file, row_group_size=100)",
            stacklevel=3,
        )
