"""Flax msgpack weight files, indexed without reading the arrays (flax.serialization holds whole files in memory).

The file is one nested map from names to arrays. An array is extension type 1, whose payload is the msgpack array
[shape, dtype name, bytes in C order] (flax.serialization). https://github.com/msgpack/msgpack/blob/master/spec.md
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.lazy import MappedTensor, map_file, unsupported_form

_NDARRAY = 1
_MAX_DEPTH, _MAX_NAME = 32, 1000
_MAX_NAMES = 1 << 24  # characters of all dotted names, and 64 for each entry: a long name may stand before many others
_DTYPES = {"float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}


def read_msgpack_file(path: Path) -> dict[str, MappedTensor]:
    """Dotted names ('conv_in.kernel') -> tensors. Raises WeightFileError for anything that is not a map of arrays."""
    tensors: dict[str, MappedTensor] = {}
    try:
        reader = _Reader(map_file(path))
        for name, tensor in _tensors_of(reader, (), 0):
            reader.require(name not in tensors, f"two tensors are called {name[:60]!r}")
            tensors[name] = tensor
        reader.require(reader.position == len(reader.buffer), "bytes follow after its end")
    except _NotRead as error:
        raise unsupported_form(path, error.name, error.dtype) from None
    except (struct.error, IndexError, ValueError) as error:  # a header beyond the end, or text that is not UTF-8
        reason = str(error) if isinstance(error, _Malformed) else "it is cut short or damaged"
        raise WeightFileError(f"{path}: not a whole Flax msgpack file ({reason}); download it again") from None
    return tensors


class _Malformed(ValueError):
    pass


class _NotRead(Exception):
    """An array of a data type that is not supported, such as float8."""

    def __init__(self, name: str, dtype: str):
        self.name, self.dtype = name, dtype


class _Reader:
    """Reads msgpack headers at a position that moves forward."""

    def __init__(self, buffer: mmap.mmap, position: int = 0):
        self.buffer, self.position, self.cost = buffer, position, 0

    @staticmethod
    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise _Malformed(problem)

    def number(self, layout: str) -> int:
        (value,) = struct.unpack_from(">" + layout, self.buffer, self.position)
        self.position += struct.calcsize(layout)
        return value

    def length(self, fixed: range, sized: dict[int, str]) -> int | None:
        """The length in a header whose first byte is in `fixed` or a key of `sized`; None for another kind."""
        code = self.buffer[self.position]
        if code not in fixed and code not in sized:
            return None
        self.position += 1
        return code - fixed[0] if code in fixed else self.number(sized[code])

    def skip(self, count: int) -> int:
        """Steps over `count` bytes and returns where they begin."""
        start, self.position = self.position, self.position + count
        self.require(self.position <= len(self.buffer), "it ends inside an array")
        return start

    def text(self) -> str:
        count = self.length(range(0xA0, 0xC0), {0xD9: "B", 0xDA: "H", 0xDB: "I"})
        if count is None:
            raise _Malformed("a name is not text")
        self.require(count <= _MAX_NAME, "a name is too long")
        start = self.skip(count)
        return self.buffer[start : start + count].decode()

    def integer(self) -> int:
        code = self.number("B")
        if code <= 0x7F:
            return code
        self.require(0xCC <= code <= 0xCF, "a size is not a whole number")
        return self.number("BHIQ"[code - 0xCC])


_MAP = (range(0x80, 0x90), {0xDE: "H", 0xDF: "I"})
_SHORT_LIST = (range(0x90, 0xA0), {})
_BYTES = (range(0), {0xC4: "B", 0xC5: "H", 0xC6: "I"})
_EXTENSION = (range(0), {0xC7: "B", 0xC8: "H", 0xC9: "I"})
_POWER_OF_TWO_EXTENSION = (range(0xD4, 0xD9), {})  # of 1, 2, 4, 8 or 16 bytes


def _tensors_of(reader: _Reader, path: tuple[str, ...], depth: int) -> Iterator[tuple[str, MappedTensor]]:
    """The dotted names and tensors of the map at the reader's position, depth first."""
    entries = reader.length(*_MAP)
    if entries is None or depth > _MAX_DEPTH:
        raise _Malformed("not nested maps of arrays")
    for _ in range(entries):
        inner = (*path, reader.text())
        name = ".".join(inner)
        reader.cost += 64 + len(name)
        reader.require(reader.cost <= _MAX_NAMES, "too many names")
        code = reader.buffer[reader.position]
        if code in _MAP[0] or code in _MAP[1]:
            yield from _tensors_of(reader, inner, depth + 1)
        else:
            yield name, _array(reader, name[:60])


def _array(reader: _Reader, name: str) -> MappedTensor:
    power = reader.length(*_POWER_OF_TWO_EXTENSION)
    count = reader.length(*_EXTENSION) if power is None else 1 << power
    if count is None or reader.number("B") != _NDARRAY:
        raise _Malformed(f"{name!r} is neither a map nor an array")
    start = reader.skip(count)
    inner = _Reader(reader.buffer, start)
    reader.require(inner.length(*_SHORT_LIST) == 3, f"{name!r} is not an array")
    rank = inner.length(*_SHORT_LIST)
    if rank is None:
        raise _Malformed(f"{name!r} has no shape")
    shape = tuple(inner.integer() for _ in range(rank))
    dtype = inner.text()
    if re.fullmatch(r"(float|complex|u?int)\d+(_\w+)?", dtype) and dtype not in _DTYPES:
        raise _NotRead(name, dtype)
    reader.require(dtype in _DTYPES, f"{name!r} has dtype {dtype[:20]!r}")
    size, expected = inner.length(*_BYTES), math.prod(shape) * np.dtype(dtype).itemsize
    whole = size == expected and inner.position + expected == start + count
    reader.require(whole and max(shape, default=0) <= len(reader.buffer), f"{name!r} has another size than its shape")
    return MappedTensor(reader.buffer, inner.position, shape, np.dtype(dtype))
