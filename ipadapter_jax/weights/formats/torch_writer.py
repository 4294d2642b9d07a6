"""Nested dicts of tensors as a file of `torch.save`, without PyTorch: the zip container, and a pickle by hand."""

import io
import struct
import zipfile
from collections.abc import Iterable, Mapping

from ipadapter_jax.weights.formats.safetensors_writer import raw
from ipadapter_jax.weights.lazy import Tensor, TensorTree

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
_ALIGNMENT = 64  # PyTorch pads its entries to it, so that storages can be mapped
_HEADER = 30  # bytes of a local zip header without its name
_PROTOCOL, _MARK, _TUPLE, _STOP, _REDUCE = b"\x80\x02", b"(", b"t", b".", b"R"
_PERSISTENT, _EMPTY_DICT, _SET_ITEMS, _FALSE = b"Q", b"}", b"u", b"\x89"


def torch_bytes(tree: TensorTree) -> bytes:
    """{"image_proj": {...}, "ip_adapter": {...}} and the like, with Tensor leaves -> the file. Equal content gives
    equal bytes. `torch.load(weights_only=True)` reads it."""
    tensors: list[Tensor] = []
    pickle = pickled(tree, tensors)
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in {"data.pkl": pickle, "byteorder": b"little"}.items():
                _add(archive, file, name, content)
            for key, tensor in enumerate(tensors):
                _add(archive, file, f"data/{key}", raw(tensor.read()))
            _add(archive, file, "version", b"3\n")
        return file.getvalue()


def _add(archive: zipfile.ZipFile, file: io.BytesIO, name: str, content: bytes | memoryview) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")  # with a fixed date
    padding = -(file.tell() + _HEADER + len(entry.filename) + 4) % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(entry, content)


def pickled(tree: TensorTree, tensors: list[Tensor]) -> bytes:
    """The pickle of a tree; its tensors are appended to `tensors`, and named there by their place in it."""
    return _PROTOCOL + _pickled(tree, tensors) + _STOP


def _pickled(value: TensorTree | Tensor, tensors: list[Tensor]) -> bytes:
    if isinstance(value, Mapping):
        items = b"".join(_text(name) + _pickled(inner, tensors) for name, inner in value.items())
        return _EMPTY_DICT + _MARK + items + _SET_ITEMS
    key = str(len(tensors))
    tensors.append(value)
    count, strides = 1, []
    for size in reversed(value.shape):
        strides.append(count)
        count *= size
    storage = [_text("storage"), _global("torch", _STORAGES[value.dtype.name]), _text(key), _text("cpu"), _int(count)]
    identity = _MARK + b"".join(storage) + _TUPLE + _PERSISTENT
    hooks = _global("collections", "OrderedDict") + b")" + _REDUCE
    arguments = [identity, _int(0), _ints(value.shape), _ints(reversed(strides)), _FALSE, hooks]
    return _global("torch._utils", "_rebuild_tensor_v2") + _MARK + b"".join(arguments) + _TUPLE + _REDUCE


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _int(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def _ints(values: Iterable[int]) -> bytes:
    return _MARK + b"".join(map(_int, values)) + _TUPLE
