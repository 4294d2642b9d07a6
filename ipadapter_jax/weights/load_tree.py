"""From the tensors of a file to a parameter tree: each key is used once, each shape is checked, none is left unset."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.runtime.prefetch import ordered_map
from ipadapter_jax.runtime.trees import Params
from ipadapter_jax.weights.dtype_cast import cast_for_device
from ipadapter_jax.weights.key_mapping import Path, StateDictLayout
from ipadapter_jax.weights.lazy import Tensor

Tree = dict[str, Any]


def leaves(tree: Params, prefix: Path = ()) -> dict[Path, Any]:
    """Nested dictionaries -> {path: leaf}."""
    flat: dict[Path, Any] = {}
    for name, value in tree.items():
        flat |= leaves(value, (*prefix, name)) if isinstance(value, Mapping) else {(*prefix, name): value}
    return flat


def nest(flat: Mapping[Path, object]) -> Tree:
    """{path: leaf} -> nested dictionaries."""
    tree: Tree = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


@dataclasses.dataclass(frozen=True, eq=False)
class CheckedTensors:
    """Tensors of a file that fit a parameter tree, as `check_tree` found: every parameter has one, of its shape, and
    none is left over. Nothing is read yet."""

    tensors: Mapping[str, Tensor]
    layout: StateDictLayout
    paths: Mapping[str, Path]  # key in the file -> place in the tree
    source: str

    def load(self, dtype: np.dtype, put: Callable[[np.ndarray], Array] = jax.device_put) -> Tree:
        """Reads a few tensors at a time and returns the parameter tree with arrays of `dtype`, each given to `put`.

        Raises WeightFileError naming a tensor that is not finite in `dtype`.
        """

        def load(key: str) -> Array:
            array = self.layout.read(self.paths[key], self.tensors[key].read())
            return put(cast_for_device(array, dtype, f"{self.source}: {key}"))

        # The largest first: the memory that its cast needs is then taken while the others are still in the file.
        keys = sorted(self.paths, key=lambda key: -math.prod(self.tensors[key].shape))
        with contextlib.closing(ordered_map(load, keys, threads=_THREADS, ahead=len(keys))) as loaded:
            arrays = dict(zip(keys, loaded, strict=True))
        return nest({path: arrays[key] for key, path in self.paths.items()})


def check_tree(
    tensors: Mapping[str, Tensor], template: Tree, layout: StateDictLayout, *, source: str
) -> CheckedTensors:
    """Checks that these tensors are the parameters of `template`, a tree whose leaves have a shape, in this layout.

    Raises WeightFileError naming `source` and the tensors that are missing, left over, of another shape or not floats.
    """
    leaf_of = {layout.key(path): (path, leaf) for path, leaf in leaves(template).items()}
    _refuse(source, "lacks", [key for key in leaf_of if key not in tensors])
    _refuse(source, "has tensors without a place in the model:", [key for key in tensors if key not in leaf_of])
    for key, (path, leaf) in leaf_of.items():
        shape, expected = tuple(tensors[key].shape), layout.shape(path, tuple(leaf.shape))
        if shape != expected:
            raise WeightFileError(f"{source}: {key} has shape {shape}, not {expected}; is this file for another model?")
        if not jnp.issubdtype(tensors[key].dtype, np.floating):
            raise WeightFileError(f"{source}: {key} holds {tensors[key].dtype} numbers, not weights")
    return CheckedTensors(tensors, layout, {key: path for key, (path, _) in leaf_of.items()}, source)


_THREADS = 4  # numpy casts on one core each, and a file that is not cached is read faster by several


def _refuse(source: str, fault: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise WeightFileError(f"{source}: {fault} {shown}; is this file for another model?")
