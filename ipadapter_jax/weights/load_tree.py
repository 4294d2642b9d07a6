"""From a file's tensors to a parameter tree: every key used once, every shape checked, nothing left unset."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.runtime.prefetch import ordered_map
from ipadapter_jax.weights.dtype_cast import cast_for_device
from ipadapter_jax.weights.key_mapping import Path, StateDictLayout
from ipadapter_jax.weights.lazy import Tensor

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


def check_tree(
    tensors: Mapping[str, Tensor], template: Mapping[str, Any], spelling: StateDictLayout, *, source: str
) -> dict[str, tuple[Path, Any]]:
    """{key in the file: (path, leaf) of the template}.

    Raises WeightFileError naming `source` and the tensors that are missing, left over, mis-shaped or no floats.
    """
    wanted = {spelling.key(path): (path, leaf) for path, leaf in leaves(template).items()}
    _refuse(source, "lacks", [key for key in wanted if key not in tensors])
    _refuse(source, "has tensors without a place in the model:", [key for key in tensors if key not in wanted])
    for key, (path, leaf) in wanted.items():
        shape, expected = tuple(tensors[key].shape), spelling.shape(path, tuple(leaf.shape))
        if shape != expected:
            raise WeightFileError(f"{source}: {key} has shape {shape}, not {expected}; is this file for another model?")
        if not jnp.issubdtype(tensors[key].dtype, np.floating):
            raise WeightFileError(f"{source}: {key} holds {tensors[key].dtype} numbers, not weights")
    return wanted


def load_tree(
    tensors: Mapping[str, Tensor],
    template: Mapping[str, Any],
    spelling: StateDictLayout,
    *,
    source: str,
    dtype: np.dtype,
    put: Callable[[np.ndarray], Array] = jax.device_put,
) -> Tree:
    """Tensors of a file -> a tree like `template` (leaves with a shape) of `dtype` arrays, a few tensors at a time.

    Raises WeightFileError as `check_tree`, before any bytes are read, and naming a tensor not finite in `dtype`.
    """
    wanted = check_tree(tensors, template, spelling, source=source)

    def load(key: str) -> Array:
        return put(cast_for_device(spelling.read(wanted[key][0], tensors[key].read()), dtype, f"{source}: {key}"))

    # The largest first: what a tensor needs besides its own place is then taken while the others are still in the file.
    keys = sorted(wanted, key=lambda key: -math.prod(tensors[key].shape))
    with contextlib.closing(ordered_map(load, keys, threads=_THREADS, ahead=len(keys))) as loaded:
        arrays = dict(zip(keys, loaded, strict=True))
    return nest({path: arrays[key] for key, (path, _) in wanted.items()})


_THREADS = 4  # numpy casts on one core, and a file that is not in memory comes faster over several


def _refuse(source: str, fault: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise WeightFileError(f"{source}: {fault} {shown}; is this file for another model?")
