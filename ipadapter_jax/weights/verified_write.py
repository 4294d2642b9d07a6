"""A file of weights gets its name only when our own reader has given back every bit of it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.atomic_files import atomic_replace, remove_partial_files_of, sha256
from ipadapter_jax.weights.formats.safetensors_writer import raw
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.lazy import LazyTransform, Tensor


def write_verified(path: Path, chunks: Iterable[bytes | memoryview], tensors: Mapping[str, Tensor]) -> str:
    """Writes `chunks`, the bytes of a file of `tensors`, and returns its sha256.

    Until the file has been read back and compared with `tensors`, and when that fails, an older file of this name
    stays. Raises InputError naming the file that cannot be written or the tensor that comes back otherwise.
    """
    remove_partial_files_of(path)
    with atomic_replace(path) as unproven:
        with open(unproven, "wb") as file:
            file.writelines(chunks)
        _verify(unproven, path, tensors)
        return sha256(unproven)


def _verify(unproven: Path, path: Path, tensors: Mapping[str, Tensor]) -> None:
    found = open_tensors(unproven)
    for name in found | dict(tensors):
        here, there = tensors.get(name), found.get(name)
        same = here is not None and there is not None and (here.shape, here.dtype) == (there.shape, there.dtype)
        if not same or raw(here.read()) != raw(there.read()):  # pyright: ignore[reportOptionalMemberAccess]
            raise InputError(
                f"{path}: {name} comes back from the disk with other bits than were written; save to another disk"
            )


def cast(what: str, tensor: Tensor, dtype: np.dtype | None) -> LazyTransform:
    """The tensor rounded to `dtype`; without one as it is stored, float64 as float32. Reading it raises InputError
    naming `what` when it is not finite or does not fit."""
    stored = np.dtype(np.float32) if tensor.dtype == np.float64 else tensor.dtype
    target = stored if dtype is None else dtype
    return LazyTransform(tensor.shape, target, lambda: rounded(what, tensor.read(), target))


def rounded(what: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in `dtype`, finite. Raises InputError naming `what` and the remedy."""
    if not np.isfinite(array).all():
        raise InputError(
            f"{what} holds NaN or infinity: the file is damaged or training has diverged; take an earlier checkpoint"
        )
    with np.errstate(over="ignore"):  # reported just below, with the tensor's name
        found = array.astype(dtype, copy=False)
    if not np.isfinite(found).all():
        largest = float(np.abs(array).max())
        raise InputError(f"{what} reaches {largest:.3g}, too much for {dtype}; save it as float32")
    return found
