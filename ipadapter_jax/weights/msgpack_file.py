"""Flax msgpack weight files, indexed without reading the arrays (flax.serialization holds whole files in memory).

The file is one nested map from names to arrays. An array is extension type 1, whose payload is the msgpack array
[shape, dtype name, bytes in C order] (flax.serialization). https://github.com/msgpack/msgpack/blob/master/spec.md
"""

import dataclasses
import mmap
import struct
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np

from ipadapter_jax.errors import WeightFileError

_NDARRAY = 1
_MAX_DEPTH = 32
_DTYPES = {"float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}


@dataclasses.dataclass(frozen=True)
class MsgpackTensor:
    """An array inside a mapped file; only `read` touches its pages."""

    buffer: mmap.mmap
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        count = int(np.prod(self.shape, dtype=np.int64))
        view = np.frombuffer(self.buffer, self.dtype, count, self.offset)
        return view.reshape(self.shape).copy()  # never alias a file that somebody may overwrite


def read_msgpack_file(path: Path) -> dict[str, MsgpackTensor]:
    """Dotted names ('conv_in.kernel') -> tensors. Raises WeightFileError for anything that is not a map of arrays."""
    with open(path, "rb") as file:
        try:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise WeightFileError(f"{path}: the file is empty; download it again") from None
    reader = _Reader(buffer)
    try:
        tensors = dict(_walk(reader, (), 0))
        if reader.position != len(buffer):
            raise _Malformed(f"{len(buffer) - reader.position} bytes after the end")
    except (_Malformed, struct.error, IndexError, UnicodeDecodeError, TypeError, OverflowError) as error:
        raise WeightFileError(f"{path}: not a whole Flax msgpack file ({error}); download it again") from None
    return tensors


class _Malformed(Exception):
    pass


class _Reader:
    """Reads msgpack headers at a position that moves forward."""

    def __init__(self, buffer: mmap.mmap, position: int = 0):
        self.buffer, self.position = buffer, position

    def number(self, layout: str) -> int:
        (value,) = struct.unpack_from(">" + layout, self.buffer, self.position)
        self.position += struct.calcsize(layout)
        return value

    def length(self, what: str, fixed: tuple[int, int] | None, sized: dict[int, str]) -> int | None:
        """The length in a header whose first byte is in the `fixed` range or starts a `sized` one; None for another kind."""
        code = self.buffer[self.position]
        if fixed and fixed[0] <= code <= fixed[1]:
            self.position += 1
            return code - fixed[0]
        if code not in sized:
            return None
        self.position += 1
        return self.number(sized[code])

    def map(self) -> int | None:
        return self.length("map", (0x80, 0x8F), {0xDE: "H", 0xDF: "I"})

    def skip(self, count: int) -> int:
        """Steps over `count` bytes and returns where they begin."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.buffer):
            raise _Malformed("it ends inside an array")
        return start

    def text(self) -> str:
        count = self.length("string", (0xA0, 0xBF), {0xD9: "B", 0xDA: "H", 0xDB: "I"})
        if count is None:
            raise _Malformed("a name is not text")
        start = self.skip(count)
        return self.buffer[start : start + count].decode()

    def integer(self) -> int:
        code = self.number("B")
        if code <= 0x7F:
            return code
        if code not in (0xCC, 0xCD, 0xCE, 0xCF):
            raise _Malformed("a size is not a whole number")
        return self.number({0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q"}[code])


def _walk(reader: _Reader, path: tuple[str, ...], depth: int):
    """Yields (dotted name, tensor) below a map, depth first."""
    entries = reader.map()
    if entries is None or depth > _MAX_DEPTH:
        raise _Malformed("not nested maps of arrays")
    for _ in range(entries):
        name = reader.text()
        if 0x80 <= reader.buffer[reader.position] <= 0x8F or reader.buffer[reader.position] in (0xDE, 0xDF):
            yield from _walk(reader, (*path, name), depth + 1)
        else:
            yield ".".join((*path, name)), _array(reader, name)


def _array(reader: _Reader, name: str) -> MsgpackTensor:
    sized = {0xC7: "B", 0xC8: "H", 0xC9: "I"}
    fixed = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
    code = reader.buffer[reader.position]
    if code in fixed:
        reader.position += 1
        count = fixed[code]
    elif (found := reader.length("array", None, sized)) is not None:
        count = found
    else:
        raise _Malformed(f"{name} is neither a map nor an array")
    if reader.number("B") != _NDARRAY:
        raise _Malformed(f"{name} is not an array")
    start = reader.skip(count)
    inner = _Reader(reader.buffer, start)
    if inner.length("tuple", (0x90, 0x9F), {}) != 3:
        raise _Malformed(f"{name} is not an array")
    rank = inner.length("shape", (0x90, 0x9F), {})
    shape = tuple(inner.integer() for _ in range(rank or 0))
    dtype = inner.text()
    if dtype not in _DTYPES:
        raise _Malformed(f"{name} has dtype {dtype}")
    size = inner.length("bytes", None, {0xC4: "B", 0xC5: "H", 0xC6: "I"})
    expected = int(np.prod([int(n) for n in shape], dtype=object)) * np.dtype(dtype).itemsize
    if rank is None or size != expected or inner.position + expected != start + count:
        raise _Malformed(f"{name} has {size} bytes and needs {expected}")
    return MsgpackTensor(reader.buffer, inner.position, shape, np.dtype(dtype))
