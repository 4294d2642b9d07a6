"""Maps the path of a parameter in our trees to its key in a file, and its array between both, in both directions.

Trees have the names of the published Flax trees. A PyTorch key is that path joined by dots, with `name_<int>`
written `name.<int>`, `kernel`, `scale` and `embedding` written `weight`, and linear and convolution kernels transposed.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

Path = tuple[str, ...]

# The VAE's attention has the names of the first Flax release in our trees; PyTorch files use these.
VAE_RENAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def torch_key(path: Path, renames: Mapping[str, str] = {}) -> str:
    """('down_blocks_0', 'resnets_1', 'conv1', 'kernel') -> 'down_blocks.0.resnets.1.conv1.weight'."""
    *parts, leaf = path
    renamed = [
        renames.get(part, part if part.startswith("linear_") else re.sub(r"_(?=\d)", ".", part)) for part in parts
    ]
    return ".".join([*renamed, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a parameter of our tree has in a PyTorch file."""
    return shape if path[-1] != "kernel" else tuple(shape[axis] for axis in _TO_TORCH[len(shape)])


def to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """Kernel HWIO -> OIHW or (in, out) -> (out, in), C-contiguous: safetensors writes other arrays wrongly."""
    return np.ascontiguousarray(array.transpose(_TO_TORCH[array.ndim]) if path[-1] == "kernel" else array)


def from_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`, as a view."""
    return array.transpose(_FROM_TORCH[array.ndim]) if path[-1] == "kernel" else array


_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}


@dataclasses.dataclass(frozen=True)
class StateDictLayout:
    """How a file stores a parameter tree: the key and shape of each parameter there, and functions that turn its array
    into ours and back."""

    key: Callable[[Path], str]
    shape: Callable[[Path, tuple[int, ...]], tuple[int, ...]]
    read: Callable[[Path, np.ndarray], np.ndarray]
    write: Callable[[Path, np.ndarray], np.ndarray]


def torch_layout(renames: Mapping[str, str] = {}) -> StateDictLayout:
    return StateDictLayout(lambda path: torch_key(path, renames), torch_shape, from_torch, to_torch)


FLAX = StateDictLayout(".".join, lambda path, shape: shape, lambda path, array: array, lambda path, array: array)
