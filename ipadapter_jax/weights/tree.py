"""From a file's tensors to a parameter tree: every key used once, every shape checked, nothing left unset."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.names import Path, Spelling
from ipadapter_jax.weights.tensors import Tensor

Tree = dict[str, Any]


def leaves(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """Nested dictionaries -> {path: leaf}."""
    flat: dict[Path, Any] = {}
    for name, value in tree.items():
        flat |= leaves(value, (*prefix, name)) if isinstance(value, Mapping) else {(*prefix, name): value}
    return flat


def nest(flat: Mapping[Path, Any]) -> Tree:
    """{path: leaf} -> nested dictionaries."""
    tree: Tree = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def load_tree(
    tensors: Mapping[str, Tensor],
    template: Mapping[str, Any],
    spelling: Spelling,
    *,
    source: str,
    dtype: np.dtype,
    put: Callable[[np.ndarray], Array] = jax.device_put,
) -> Tree:
    """Tensors of a file -> a tree like `template` (leaves with a shape) of `dtype` arrays, one tensor in memory at a time.

    Raises WeightFileError naming `source` and the tensors that are missing, left over, mis-shaped, not floating-point
    or not finite in `dtype`; all names and shapes are checked before any bytes are read.
    """
    wanted = {spelling.key(path): (path, leaf) for path, leaf in leaves(template).items()}
    _refuse(source, "is missing", [key for key in wanted if key not in tensors])
    _refuse(source, "has no place in the model", [key for key in tensors if key not in wanted])
    for key, (path, leaf) in wanted.items():
        shape, expected = tuple(tensors[key].shape), spelling.shape(path, tuple(leaf.shape))
        if shape != expected:
            raise WeightFileError(f"{source}: {key} has shape {shape}, the model needs {expected}")
        if not jax.numpy.issubdtype(tensors[key].dtype, np.floating):
            raise WeightFileError(f"{source}: {key} holds {tensors[key].dtype} numbers, not weights")
    return nest(
        {path: _load(tensors[key], key, path, spelling, source, dtype, put) for key, (path, _) in wanted.items()}
    )


def _load(tensor: Tensor, key: str, path: Path, spelling: Spelling, source: str, dtype: np.dtype, put) -> Array:
    with np.errstate(over="ignore"):  # reported just below, with the tensor's name
        array = tensor.read().astype(dtype, copy=False)
    if not all_finite(array):
        raise WeightFileError(f"{source}: {key} is not finite in {dtype}; use a wider dtype or another file")
    return put(np.ascontiguousarray(spelling.read(path, array)))


_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}


def all_finite(array: np.ndarray) -> bool:
    """No NaN and no infinity: those are the numbers whose exponent bits are all set (numpy's own test is slow in bfloat16)."""
    mask = _EXPONENT[array.dtype.name]
    bits = array.view(f"u{array.dtype.itemsize}")
    return not ((bits & mask) == mask).any()


def _refuse(source: str, fault: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise WeightFileError(f"{source}: {shown} {fault}; is this file for another model?")
