"""Weight files by hand, and what the tests of their readers share."""

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

from ipadapter_jax.errors import InputError

_STORAGES = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long", "int32": "Int"}


def write_bin(path: Path, tree: Mapping) -> Path:
    """What torch.save writes for nested dicts of arrays, without PyTorch: a zip of one pickle and the arrays' bytes."""
    arrays: list[np.ndarray] = []

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def numbers(values) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    def pickled(value) -> bytes:
        if isinstance(value, Mapping):
            return b"}(" + b"".join(text(key) + pickled(inner) for key, inner in value.items()) + b"u"
        kind, key = _STORAGES[value.dtype.name], str(len(arrays))
        arrays.append(np.asarray(value, order="C"))
        strides = [stride // value.itemsize for stride in arrays[-1].strides]
        storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu")
        storage += numbers([value.size])[1:-1] + b"tQ"
        rest = numbers([0])[1:-1] + numbers(value.shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"

    body = b"\x80\x02" + pickled(tree) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/version", "3\n")
        for key, array in enumerate(arrays):
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


def refused(call: Callable, *words: str, error: type[Exception] = InputError) -> str:
    """The message of the refusal: one line of readable length in which all of `words` stand."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600, message
    for word in words:
        assert str(word) in message, message
    return message


def assert_same_tree(found, expected) -> None:
    """The same names, shapes, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
