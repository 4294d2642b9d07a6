"""Reads the unpacked sizes of the pages of a Parquet column from their headers alone.

The metadata at the end of a file hold sizes too, but the reader allocates what the pages declare. A page header is a
struct in Thrift's compact protocol; its first three fields are the type and both sizes
(github.com/apache/parquet-format, parquet.thrift, and thrift-compact-protocol.md).
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

_FIRST_READ, _MAX_READ = 1 << 9, 1 << 24  # bytes of a header: it may hold statistics
_MAX_DEPTH = 8  # of nested structs
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_FIXED: Mapping[int, int] = {_TRUE: 0, _FALSE: 0, _BYTE: 1, _DOUBLE: 8}
_UNPACKED, _PACKED = 2, 3  # fields of a page header


class DamagedPage(ValueError):
    """The header of a page is invalid."""


def unpacked_bytes(file: int, start: int, size: int) -> int:
    """The unpacked bytes of all pages of a column, whose `size` bytes start at `start` in an open file. Raises
    DamagedPage."""
    total, place = 0, start
    while place < start + size:
        fields, length = _header(file, place)
        unpacked, packed = fields.get(_UNPACKED, -1), fields.get(_PACKED, -1)
        if unpacked < 0 or packed < 0:
            raise DamagedPage("a page without a size")
        total += unpacked
        place += length + packed
    return total


class _Header(NamedTuple):
    """The integer fields of a page header by their ids, and its length in bytes."""

    fields: dict[int, int]
    length: int


def _header(file: int, place: int) -> _Header:
    size = _FIRST_READ
    while True:
        content = os.pread(file, size, place)
        struct = _Compact(content)
        try:
            return _Header(struct.fields(), struct.place)
        except IndexError:
            if len(content) < size or size >= _MAX_READ:
                raise DamagedPage("a page header that does not end") from None
            size *= 32


class _Compact:
    """Reads structs. Raises IndexError at the end of the content, DamagedPage for what is not a struct."""

    def __init__(self, content: bytes):
        self._content, self.place = content, 0

    def fields(self, depth: int = 0) -> dict[int, int]:
        """Reads a struct. Returns its integer fields by their ids."""
        if depth > _MAX_DEPTH:
            raise DamagedPage("a page header that is too deep")
        found, field = {}, 0
        while (head := self._byte()) != 0:
            field = field + (head >> 4) if head >> 4 else self._number()
            kind = head & 15
            if kind in (_I16, _I32, _I64):
                found[field] = self._number()
            else:
                self._skip(kind, depth)
        return found

    def _skip(self, kind: int, depth: int) -> None:
        if kind in _FIXED:
            self._forward(_FIXED[kind])
        elif kind in (_I16, _I32, _I64):
            self._number()
        elif kind == _BINARY:
            self._forward(self._varint())
        elif kind == _STRUCT:
            self.fields(depth + 1)
        elif kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            for _ in range(count):
                self._skip(_BYTE if head & 15 in (_TRUE, _FALSE) else head & 15, depth + 1)
        else:
            raise DamagedPage(f"a page header with a field of kind {kind}")

    def _number(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise DamagedPage("a page header with an endless number")

    def _byte(self) -> int:
        self.place += 1
        return self._content[self.place - 1]

    def _forward(self, count: int) -> None:
        self.place += count
        if self.place > len(self._content):
            raise IndexError
