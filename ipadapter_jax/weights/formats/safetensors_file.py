"""Reads safetensors files without reading their tensors, more strictly than the safetensors library."""

import math
import mmap
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors import SafetensorError, safe_open

from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.storage.text_files import parse_json
from ipadapter_jax.weights.lazy import MappedTensor, Tensor, map_file, unsupported_form

_MAX_HEADER = 1 << 25  # bytes; trainers put pages of text into the metadata
_MAX_TENSORS = 20_000  # ten times those of any Stable Diffusion


class SafetensorsFile(NamedTuple):
    """The tensors of a file, not read yet, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


def read_safetensors_file(path: Path) -> SafetensorsFile:
    """The tensors and metadata of a file. Raises WeightFileError naming it when it is damaged or of another format.

    The format is a length (8 bytes), a JSON header, then the tensors. https://huggingface.co/docs/safetensors
    """
    buffer = map_file(path)
    start = 8 + int.from_bytes(buffer[:8], "little")
    if start > _MAX_HEADER:
        raise WeightFileError(f"{path}: its header has {start:,} bytes, far more than weights need")
    try:
        with safe_open(path, framework="numpy"):  # checks header, sizes and offsets; its own reading copies each tensor
            pass
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightFileError(f"{path}: not a whole safetensors file ({reason}); download it again") from None
    try:
        header = parse_json(bytes(buffer[8:start]), f"{path}: its header", "download it again", _once)
    except InputError as error:
        raise WeightFileError(str(error)) from None
    if not isinstance(header, dict):
        raise WeightFileError(f"{path}: its header is not a JSON object; download it again")
    metadata = header.pop("__metadata__", None) or {}
    if len(header) > _MAX_TENSORS:
        raise WeightFileError(f"{path}: it has {len(header):,} tensors, far more than weights need")
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        tensors[name] = _tensor(path, buffer, start, name, entry)
    return SafetensorsFile(tensors, metadata)


def _tensor(path: Path, buffer: mmap.mmap, start: int, name: str, entry: object) -> MappedTensor:
    """The tensor that an entry of the header describes. The library lets malformed entries pass, and shapes with a zero
    in them that numpy cannot hold."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(offset), int()]}:
            pass
        case _:
            raise WeightFileError(f"{path}: {name[:60]!r} has a malformed entry in the header; download the file again")
    if dtype not in _DTYPES:
        raise unsupported_form(path, name, dtype)
    if len(shape) > 32 or math.prod(size or 1 for size in shape) >= 1 << 48:
        raise WeightFileError(f"{path}: {name[:60]!r} has a shape that no weights have; download the file again")
    return MappedTensor(buffer, start + offset, tuple(shape), np.dtype(_DTYPES[dtype]))


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object without repeated names, of which the library would take the last and hide the other tensors."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("two entries of one name")
    return found
