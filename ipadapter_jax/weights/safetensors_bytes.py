"""Named arrays as the bytes of a safetensors file: equal content gives equal bytes."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what is written, and its name in a header


def safetensors_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A length (8 bytes), a JSON header, then the tensors by name. https://huggingface.co/docs/safetensors

    Not by the library's writer: it puts metadata in a random order, so that no digest could be compared, and up to
    0.8.0 it writes arrays that are not contiguous as they lie in memory.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, array in sorted(tensors.items()):
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for _, array in sorted(tensors.items()))])
