"""Opens a weight file of any format: the names, shapes and dtypes of its tensors now, their bytes on demand."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.weights.formats.container import ARRAY, INDEX, MSGPACK, PICKLE, SAFETENSORS, container
from ipadapter_jax.weights.formats.msgpack_file import read_msgpack_file
from ipadapter_jax.weights.formats.numpy_file import read_numpy_file
from ipadapter_jax.weights.formats.safetensors_file import read_safetensors_file
from ipadapter_jax.weights.formats.shard_index import read_shards
from ipadapter_jax.weights.formats.torch_pickle import read_tensors
from ipadapter_jax.weights.lazy import MappedTensor, Tensor, map_file


class WeightFile(NamedTuple):
    """An opened file: `container` is one of the constants of container.py, and only safetensors have metadata."""

    container: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def open_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, its shard index (.json), a PyTorch pickle, a Flax msgpack or a NumPy array.

    The first bytes tell the format; the name does not count. Nothing is ever unpickled, and no tensor is read. Raises
    WeightFileError naming the file when it is none of these or damaged.
    """
    return open_file(path).tensors


def open_file(path: Path) -> WeightFile:
    """The same with the format and the metadata of the file."""
    path = expand_home(Path(path))
    try:
        kind = container(path)
        if kind == SAFETENSORS:
            found = WeightFile(kind, *read_safetensors_file(path))
        else:
            found = WeightFile(kind, dict(_READERS[kind](path)), {})
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    for name in found.tensors:
        if not name.isprintable() or len(name) > 1000:  # it may stand in a message of one line
            raise WeightFileError(f"{path}: not a weight file: it has a tensor called {name[:60]!r}")
    return found


def _read_pickle(path: Path) -> dict[str, Tensor]:
    tensors, buffer = read_tensors(path), map_file(path)
    return {
        name: MappedTensor(buffer, tensor.storage.position + tensor.offset, tensor.shape, tensor.dtype, tensor.strides)
        for name, tensor in tensors.items()
    }


_READERS: Mapping[str, Callable[[Path], Mapping[str, Tensor]]] = {
    PICKLE: _read_pickle,
    MSGPACK: read_msgpack_file,
    INDEX: read_shards,
    ARRAY: read_numpy_file,
}
