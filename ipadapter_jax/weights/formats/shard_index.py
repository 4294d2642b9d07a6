"""Weights in several safetensors files (shards), with a JSON index that says which file holds a tensor."""

import re
from pathlib import Path

from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.storage.text_files import read_json_object
from ipadapter_jax.weights.formats.container import SAFETENSORS, container, is_index
from ipadapter_jax.weights.formats.safetensors_file import read_safetensors_file
from ipadapter_jax.weights.lazy import Tensor


def read_shards(path: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index lists.

    Raises WeightFileError naming the index when a shard is missing, is not a safetensors file, or holds other tensors
    than the index says.
    """
    names = _weight_map(path)
    tensors: dict[str, Tensor] = {}
    for file in sorted({path.parent / shard for shard in names.values()}):
        if not file.is_file():
            raise WeightFileError(f"{path}: the shard {file.name} is missing; download it too")
        if container(file) != SAFETENSORS:
            raise WeightFileError(f"{path}: the shard {file.name} is not a safetensors file; download it again")
        found = read_safetensors_file(file).tensors
        listed = {name for name in names if names[name] == file.name}
        if odd := sorted(listed ^ found.keys()):
            where = "is not in" if odd[0] in listed else "is in"
            raise WeightFileError(
                f"{path}: {odd[0][:60]!r} {where} {file.name}, contrary to the index; download both again"
            )
        tensors |= found
    return tensors


def files_of(path: Path) -> list[Path]:
    """The files that hold the tensors of `path`: its shards if it is an index, else itself."""
    if not is_index(path):
        return [path]
    return sorted({path.parent / shard for shard in _weight_map(path).values()})


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> the name of its shard, a file next to the index."""
    try:
        names = read_json_object(index)["weight_map"]
        if not isinstance(names, dict):
            raise TypeError
        outside = [shard for shard in names.values() if not re.fullmatch(r"[\w.-]+\.safetensors", shard)]
    except (InputError, KeyError, TypeError, AttributeError):
        raise WeightFileError(f"{index}: not an index of weight shards (no weight_map); download it again") from None
    if outside:
        raise WeightFileError(f"{index}: names a shard that is not a .safetensors file next to it: {outside[0][:60]!r}")
    return names
