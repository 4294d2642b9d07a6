"""Weight files that are read back and compared before they get their name."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.atomic_files import atomic_replace, remove_partial_files_of, sha256
from ipadapter_jax.weights.formats.safetensors_writer import raw
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.lazy import Tensor


def write_verified(path: Path, chunks: Iterable[bytes | memoryview], tensors: Mapping[str, Tensor]) -> str:
    """Writes `chunks`, the bytes of a file that holds `tensors`, and returns the sha256 of the file.

    The file is written under a temporary name, read back and compared with `tensors`, then renamed to `path`; until
    then, and when that fails, an older file of this name stays. Raises InputError naming the file that cannot be
    written or the tensor whose bytes differ.
    """
    remove_partial_files_of(path)
    with atomic_replace(path) as unverified:
        with open(unverified, "wb") as file:
            file.writelines(chunks)
        _verify(unverified, path, tensors)
        return sha256(unverified)


def _verify(unverified: Path, path: Path, tensors: Mapping[str, Tensor]) -> None:
    found = open_tensors(unverified)
    for name in found | dict(tensors):
        here, there = tensors.get(name), found.get(name)
        same = here is not None and there is not None and (here.shape, here.dtype) == (there.shape, there.dtype)
        if not same or raw(here.read()) != raw(there.read()):  # pyright: ignore[reportOptionalMemberAccess]
            raise InputError(f"{path}: verification failed: bytes on disk differ for {name}; save to another disk")
