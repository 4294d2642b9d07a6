"""Tensors that are still in their files, and tensors computed from those when they are read."""

import dataclasses
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ipadapter_jax.errors import WeightFileError


class Tensor(Protocol):
    """One tensor of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray:
        """Its elements; the array may be a read-only view of the file."""
        ...


TensorTree = Mapping[str, "TensorTree | Tensor"]  # nested names


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """An array in a memory-mapped file; its pages are read on `read`."""

    buffer: mmap.mmap
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None  # in bytes; C order without them

    def read(self) -> np.ndarray:
        """A read-only view of the file, which may not be aligned. Copy it if it must survive a change of the file."""
        return np.ndarray(self.shape, self.dtype, self.buffer, self.offset, self.strides)


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, memory-mapped. The file must not be empty."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclasses.dataclass(frozen=True)
class LazyTransform:
    """A tensor of known shape and dtype whose elements `compute` returns when it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        return self.compute()


def in_memory(array: np.ndarray) -> LazyTransform:
    """An array in memory as a tensor."""
    return LazyTransform(array.shape, array.dtype, lambda: array)


def sliced(tensor: Tensor, start: int, stop: int) -> LazyTransform:
    """Elements `start` to `stop` of the first axis."""
    return LazyTransform((stop - start, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[start:stop])


def transposed(tensor: Tensor) -> LazyTransform:
    """The axes in reverse order."""
    return LazyTransform(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)


def concatenated(tensors: Sequence[Tensor]) -> LazyTransform:
    """The tensors along the first axis; the other axes must agree."""
    first = tensors[0]
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    return LazyTransform(shape, first.dtype, lambda: np.concatenate([tensor.read() for tensor in tensors]))


def unsupported_form(path: str | os.PathLike[str], name: str, form: str) -> WeightFileError:
    """The error for a tensor that is stored in a form or data type that is not supported."""
    return WeightFileError(
        f"{path}: {name[:60]!r} is stored as {form[:60]}; only float64, float32, float16 and bfloat16 weights are "
        "read, so convert the file first"
    )
