"""Files of named tensors, opened without reading them: names, shapes and dtypes first, each tensor's bytes on demand."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.msgpack_file import read_msgpack_file
from ipadapter_jax.weights.torch_pickle import flatten, read_torch_file


class Tensor(Protocol):
    """One tensor of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray: ...


def open_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, its shard index (.json), a PyTorch pickle or a Flax msgpack, unread.

    Raises WeightFileError naming the file when it is none of these or damaged. Nothing is ever unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightFileError(f"{path}: there is no such file")
    if path.suffix == ".json":
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix == ".msgpack":
        return dict(read_msgpack_file(path))
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return dict(flatten(read_torch_file(path)))
    raise WeightFileError(f"{path}: unknown kind of weight file; give .safetensors, .bin, .ckpt or .msgpack")


_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


@dataclasses.dataclass(frozen=True)
class _SafeTensor:
    file: object
    name: str
    path: Path

    @property
    def _slice(self):
        return self.file.get_slice(self.name)  # type: ignore[attr-defined]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._slice.get_shape())

    @property
    def dtype(self) -> np.dtype:
        code = self._slice.get_dtype()
        if code not in _SAFETENSORS_DTYPES:
            raise WeightFileError(
                f"{self.path}: {self.name} is stored as {code}; only float64, float32, float16 and bfloat16 weights are "
                "read, so convert the file first"
            )
        return np.dtype(_SAFETENSORS_DTYPES[code])

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)  # type: ignore[attr-defined]


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        file = safe_open(path, framework="numpy")
        return {name: _SafeTensor(file, name, path) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightFileError(f"{path}: not a whole safetensors file ({reason}); download it again") from None


def _open_shards(path: Path) -> dict[str, Tensor]:
    try:
        names: Mapping[str, str] = json.loads(path.read_text())["weight_map"]
        shards = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WeightFileError(f"{path}: not an index of weight shards (no weight_map); download it again") from None
    inside = path.parent.resolve()
    for shard in shards:
        if (path.parent / shard).parent.resolve() != inside:
            raise WeightFileError(f"{path}: names a shard outside its folder: {shard!r}")
    found = functools.reduce(lambda a, b: a | b, (_open_safetensors_shard(path, shard) for shard in shards), {})
    for name, shard in names.items():
        if name not in found:
            raise WeightFileError(f"{path}: {name} is not in {shard}, where the index says it is; download both again")
    return {name: found[name] for name in names}


def _open_safetensors_shard(index: Path, shard: str) -> dict[str, Tensor]:
    if not (index.parent / shard).is_file():
        raise WeightFileError(f"{index}: the shard {shard} is missing; download it too")
    return open_tensors(index.parent / shard)


def files_of(path: Path) -> list[Path]:
    """The files that hold a source's tensors: its shards when it is an index, else itself."""
    if path.suffix != ".json":
        return [path]
    return [path.parent / shard for shard in sorted(set(json.loads(path.read_text())["weight_map"].values()))]
