"""Files of named tensors, opened without reading them: names, shapes and dtypes first, a tensor's bytes on demand."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors import SafetensorError, safe_open

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.msgpack_file import MappedTensor, map_file, read_msgpack_file
from ipadapter_jax.weights.torch_pickle import flatten, read_torch_file


class Tensor(Protocol):
    """One tensor of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray:
        """Its elements, perhaps a read-only view of the file."""
        ...


def open_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, its shard index (.json), a PyTorch pickle or a Flax msgpack, unread.

    Raises WeightFileError naming the file when it is none of these or damaged. Nothing is ever unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightFileError(f"{path}: there is no such file")
    readers = {".json": _open_shards, ".safetensors": _open_safetensors, ".msgpack": read_msgpack_file}
    reader = (readers | dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), _open_pickle)).get(path.suffix)
    if reader is None:
        raise WeightFileError(f"{path}: unknown kind of weight file; give .safetensors, .bin, .ckpt or .msgpack")
    try:
        _refuse_other_kinds(path)
        tensors = dict(reader(path))
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    for name in tensors:
        if not name.isprintable() or len(name) > 1000:  # it may stand in a message of one line
            raise WeightFileError(f"{path}: not a file of weights: it has a tensor called {name[:60]!r}")
    return tensors


def _refuse_other_kinds(path: Path) -> None:
    """What a failed download leaves under the name of a weight file."""
    with open(path, "rb") as file:
        head = file.read(512).lstrip().lower()
    if not head:
        raise WeightFileError(f"{path}: the file is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightFileError(f"{path}: a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise WeightFileError(
            f"{path}: a web page, not weights; download the file itself (/resolve/ instead of /blob/)"
        )


def _open_pickle(path: Path) -> Mapping[str, Tensor]:
    tensors, buffer = flatten(read_torch_file(path)), map_file(path)
    return {
        name: MappedTensor(buffer, tensor.storage.position + tensor.offset, tensor.shape, tensor.dtype, tensor.strides)
        for name, tensor in tensors.items()
    }


_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


def _open_safetensors(path: Path) -> dict[str, MappedTensor]:
    """A length (8 bytes), a JSON header, then the tensors. https://huggingface.co/docs/safetensors"""
    try:
        with safe_open(path, framework="numpy"):  # checks header, sizes and offsets; its own reading copies each tensor
            pass
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightFileError(f"{path}: not a whole safetensors file ({reason}); download it again") from None
    buffer = map_file(path)
    start = 8 + int.from_bytes(buffer[:8], "little")
    tensors = {}
    for name, entry in json.loads(buffer[8:start]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise WeightFileError(
                f"{path}: {name[:60]!r} is stored as {entry['dtype']}; only float64, float32, float16 and bfloat16 "
                "weights are read, so convert the file first"
            )
        dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = MappedTensor(buffer, start + entry["data_offsets"][0], tuple(entry["shape"]), dtype)
    return tensors


def _open_shards(path: Path) -> dict[str, Tensor]:
    names = _weight_map(path)
    tensors: dict[str, Tensor] = {}
    for file in files_of(path):
        if not file.is_file():
            raise WeightFileError(f"{path}: the shard {file.name} is missing; download it too")
        found = open_tensors(file)
        listed = {name for name in names if names[name] == file.name}
        if odd := sorted(listed ^ found.keys()):
            where = "is not in" if odd[0] in listed else "is in"
            raise WeightFileError(
                f"{path}: {odd[0][:60]!r} {where} {file.name}, against the index; download both again"
            )
        tensors |= found
    return tensors


def files_of(path: Path) -> list[Path]:
    """The files that hold a source's tensors: its shards when it is an index, else itself."""
    return sorted({path.parent / shard for shard in _weight_map(path).values()}) if path.suffix == ".json" else [path]


def _weight_map(index: Path) -> dict[str, str]:
    """Which shard, a file beside the index, holds a tensor."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [shard for shard in names.values() if not re.fullmatch(r"[\w.-]+\.safetensors", shard)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightFileError(f"{index}: not an index of weight shards (no weight_map); download it again") from None
    if outside:
        raise WeightFileError(f"{index}: names a shard that is no .safetensors file beside it: {outside[0][:60]!r}")
    return names
