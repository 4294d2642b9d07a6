"""Named arrays as the bytes of a safetensors file: equal content gives equal bytes."""

import hashlib
import json
from collections.abc import Iterator, Mapping

import numpy as np

from ipadapter_jax.storage.text_files import encode_utf8
from ipadapter_jax.weights.lazy import Tensor

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what is written, and its name in a header
DIGEST = "tensors_sha256"  # a key in the metadata of our files: over names, dtypes, shapes and bytes


def safetensors_chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """A length (8 bytes), a JSON header, then the tensors, one at a time.
    https://huggingface.co/docs/safetensors

    Not by the library's writer: it puts metadata in a random order, so that no digest could be compared, needs all
    arrays in memory, and up to 0.8.0 it writes non-contiguous arrays in their memory order.
    """
    header: dict[str, object] = {
        "__metadata__": {name: encode_utf8(value).decode() for name, value in sorted(metadata.items())}
    }
    position, ordered = 0, sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, tensor in ordered:  # by width first, so that all of them are aligned
        end = position + int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        yield raw(tensor.read())


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order; copied only if it has another order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors by name; the container does not count."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, tensor.dtype.name, list(tensor.shape)]).encode())
        found.update(raw(tensor.read()))
    return found.hexdigest()
