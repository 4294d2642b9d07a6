"""Files of named tensors, opened without reading them: names, shapes and dtypes first, a tensor's bytes on demand."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors import SafetensorError, safe_open

from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.storage.nearby_paths import nearby_hint
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.storage.text_files import parse_json, read_json_object
from ipadapter_jax.weights.formats.msgpack_file import read_msgpack_file
from ipadapter_jax.weights.formats.torch_pickle import UNNAMED, read_tensors
from ipadapter_jax.weights.lazy import LazyTransform, MappedTensor, Tensor, map_file, unsupported_form

SAFETENSORS, PICKLE, MSGPACK, INDEX = "safetensors", "PyTorch pickle", "Flax msgpack", "index of shards"
ARRAY = "NumPy array"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which editors on Windows put before text
_HEADER = 100_000_000  # bytes of the longest header that the safetensors library reads
_MAX_HEADER = 1 << 25  # bytes; trainers put pages of their own into the metadata
_MAX_TENSORS = 20_000  # ten times those of any Stable Diffusion


class WeightFile(NamedTuple):
    """An opened file: `container` is one of the five below, and only safetensors have metadata."""

    container: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def open_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, its shard index (.json), a PyTorch pickle or a Flax msgpack, unread.

    Which of these it is, its first bytes tell; the name does not count. Raises WeightFileError naming the file when it
    is none of these or damaged. Nothing is ever unpickled.
    """
    return open_file(path).tensors


def open_file(path: Path) -> WeightFile:
    """The same with what the file says about itself."""
    path = expand_home(Path(path))
    try:
        kind = container(path)
        found = WeightFile(kind, *_READERS[kind](path))
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    for name in found.tensors:
        if not name.isprintable() or len(name) > 1000:  # it may stand in a message of one line
            raise WeightFileError(f"{path}: not a file of weights: it has a tensor called {name[:60]!r}")
    return found


def container(path: Path) -> str:
    """SAFETENSORS, PICKLE, MSGPACK, INDEX or ARRAY. Raises WeightFileError saying what else it is."""
    try:
        if not path.is_file():
            other = "is a folder, not a file" if path.is_dir() else "is a pipe or a device; give a file"
            there = other if path.exists() else f"there is no such file{nearby_hint(path)}"
            raise WeightFileError(f"{path}: {there}")
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not head.strip():
        raise WeightFileError(f"{path}: the file is empty; download it again")
    if _is_safetensors(head):
        return SAFETENSORS
    if head.startswith(b"PK\3\4") or re.match(rb"\x80[\x02-\x05]", head):
        return PICKLE
    if head.startswith(b"\x93NUMPY"):
        return ARRAY
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip().lower()
    for start, what in _STRANGERS.items():
        if text.startswith(start):
            raise WeightFileError(f"{path}: {what}")
    if text.startswith(b"{"):
        return INDEX
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
        return MSGPACK
    raise WeightFileError(
        f"{path}: no file of weights: neither .safetensors nor .bin, .ckpt or .msgpack by its first bytes; "
        "download it again"
    )


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _HEADER


# How files begin that are found under the name of weights, in lower case.
_STRANGERS = {
    b"version https://git-lfs": "a git-lfs pointer, not the weights; fetch them with `git lfs pull`",
    **dict.fromkeys(
        (b"<!doctype", b"<html", b"<?xml", b"<head"),
        "a web page, not weights; download the file itself (/resolve/ instead of /blob/)",
    ),
    b"gguf": "a GGUF file; take the model's .safetensors",
    b"\x89hdf": "an HDF5 file of Keras; take the model's .safetensors",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"rar!": "a RAR archive; unpack it first",
    **dict.fromkeys((b"\x89png", b"\xff\xd8\xff", b"riff", b"gif8"), "an image, not weights"),
}


_Found = tuple[dict[str, Tensor], dict[str, str]]  # tensors and metadata


def _open_msgpack(path: Path) -> _Found:
    return dict(read_msgpack_file(path)), {}


def _open_pickle(path: Path) -> _Found:
    tensors, buffer = read_tensors(path), map_file(path)
    found: dict[str, Tensor] = {
        name: MappedTensor(buffer, tensor.storage.position + tensor.offset, tensor.shape, tensor.dtype, tensor.strides)
        for name, tensor in tensors.items()
    }
    return found, {}


def _open_array(path: Path) -> _Found:
    """A file of numpy.save, whose pickled objects are refused."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightFileError(
            f"{path}: no file of weights, nor a whole array of NumPy ({reason}); save it again"
        ) from None
    if array.dtype.kind not in "fiub":
        raise WeightFileError(f"{path}: an array of {array.dtype}, not of numbers; save what the encoder gives")
    dtype = array.dtype.newbyteorder("=")
    return {UNNAMED: LazyTransform(array.shape, dtype, lambda: np.ascontiguousarray(array, dtype))}, {}


_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


def _open_safetensors(path: Path) -> _Found:
    """A length (8 bytes), a JSON header, then the tensors. https://huggingface.co/docs/safetensors"""
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
    metadata = header.pop("__metadata__", None) or {}
    if len(header) > _MAX_TENSORS:
        raise WeightFileError(f"{path}: it has {len(header):,} tensors, far more than weights need")
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        dtype, shape, offset = _entry(path, name, entry)
        tensors[name] = MappedTensor(buffer, start + offset, shape, dtype)
    return tensors, metadata


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int]:
    """dtype, shape and offset of a tensor. The library lets odd forms of an entry pass, and shapes with a zero in them
    that numpy cannot hold."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(offset), int()]}:
            pass
        case _:
            raise WeightFileError(f"{path}: {name[:60]!r} is described in an odd way; download the file again")
    if dtype not in _SAFETENSORS_DTYPES:
        raise unsupported_form(path, name, dtype)
    if len(shape) > 32 or math.prod(size or 1 for size in shape) >= 1 << 48:
        raise WeightFileError(f"{path}: {name[:60]!r} has a shape that no weights have; download the file again")
    return np.dtype(_SAFETENSORS_DTYPES[dtype]), tuple(shape), offset


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. The library takes the last of two entries of one name, and so hides a tensor."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("two entries of one name")
    return found


def _open_shards(path: Path) -> _Found:
    names = _weight_map(path)
    tensors: dict[str, Tensor] = {}
    for file in sorted({path.parent / shard for shard in names.values()}):
        if not file.is_file():
            raise WeightFileError(f"{path}: the shard {file.name} is missing; download it too")
        if container(file) != SAFETENSORS:
            raise WeightFileError(f"{path}: the shard {file.name} is no safetensors file; download it again")
        found = open_tensors(file)
        listed = {name for name in names if names[name] == file.name}
        if odd := sorted(listed ^ found.keys()):
            where = "is not in" if odd[0] in listed else "is in"
            raise WeightFileError(
                f"{path}: {odd[0][:60]!r} {where} {file.name}, against the index; download both again"
            )
        tensors |= found
    return tensors, {}


def files_of(path: Path) -> list[Path]:
    """The files that hold a source's tensors: its shards when it is an index, else itself."""
    with open(path, "rb") as file:
        head = file.read(64)
    if _is_safetensors(head) or not head.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"{"):
        return [path]
    return sorted({path.parent / shard for shard in _weight_map(path).values()})


def _weight_map(index: Path) -> dict[str, str]:
    """Which shard, a file beside the index, holds a tensor."""
    try:
        names = read_json_object(index)["weight_map"]
        outside = [shard for shard in names.values() if not re.fullmatch(r"[\w.-]+\.safetensors", shard)]
    except (InputError, KeyError, TypeError, AttributeError):
        raise WeightFileError(f"{index}: not an index of weight shards (no weight_map); download it again") from None
    if outside:
        raise WeightFileError(f"{index}: names a shard that is no .safetensors file beside it: {outside[0][:60]!r}")
    return names


_READERS: dict[str, Callable[[Path], _Found]] = {
    SAFETENSORS: _open_safetensors,
    PICKLE: _open_pickle,
    MSGPACK: _open_msgpack,
    INDEX: _open_shards,
    ARRAY: _open_array,
}
