"""A network as files in diffusers' folder layout, with the weights of PyTorch or of Flax."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ipadapter_jax.storage.atomic_files import write_atomically
from ipadapter_jax.weights.components import Component
from ipadapter_jax.weights.dtype_cast import cast_tensor
from ipadapter_jax.weights.formats.msgpack_writer import msgpack_chunks
from ipadapter_jax.weights.formats.safetensors_writer import safetensors_chunks
from ipadapter_jax.weights.key_mapping import FLAX, StateDictLayout, torch_layout
from ipadapter_jax.weights.key_mapping import Path as TreePath
from ipadapter_jax.weights.lazy import LazyTransform, Tensor, in_memory
from ipadapter_jax.weights.load_tree import Tree, leaves
from ipadapter_jax.weights.open_component import LazyComponent
from ipadapter_jax.weights.verified_write import write_verified

_METADATA = {"format": "pt"}


def save_component(component: Component, folder: Path, params: Tree, dtype: np.dtype, config: bytes) -> None:
    """Writes `params`, cast to `dtype`, and the text of config.json into `folder`.

    Raises InputError naming the tensor that is not finite or does not fit `dtype`, or the file that cannot be written.
    """
    ours = {path: in_memory(np.asarray(leaf)) for path, leaf in leaves(params).items()}
    _save(component, folder, ours, dtype, flax=False)
    write_atomically(folder / "config.json", config)


def convert_component(opened: LazyComponent, folder: Path, dtype: np.dtype | None, *, flax: bool) -> None:
    """Writes the weights of an opened network, tensor by tensor, under PyTorch's or Flax's names, and its config.json.
    Tensors are cast to `dtype`; None keeps theirs. Raises InputError as `save_component`."""
    _save(opened.component_config.component, folder, lazy_leaves(opened), dtype, flax)
    settings = dict(opened.component_config.settings)
    if isinstance(name := settings.get("_class_name"), str):
        settings["_class_name"] = class_name(name, flax)
    write_atomically(folder / "config.json", json.dumps(settings, indent=2).encode() + b"\n")


def class_name(name: str, flax: bool) -> str:
    """UNet2DConditionModel or FlaxUNet2DConditionModel."""
    return ("Flax" if flax else "") + name.removeprefix("Flax")


def lazy_leaves(opened: LazyComponent) -> dict[TreePath, Tensor]:
    """The leaves of the network's parameter tree as lazy tensors."""
    weights = opened.weights

    def leaf(path: TreePath, shape: tuple[int, ...]) -> LazyTransform:
        tensor = weights.tensors[weights.layout.key(path)]
        return LazyTransform(shape, tensor.dtype, lambda: weights.layout.read(path, tensor.read()))

    return {path: leaf(path, tuple(found.shape)) for path, found in leaves(opened.component_config.template).items()}


def to_state_dict(
    ours: Mapping[TreePath, Tensor], layout: StateDictLayout, dtype: np.dtype | None, title: str, prefix: str = ""
) -> dict[str, Tensor]:
    """The leaves of a tree under the keys and with the axes of `layout`, cast to `dtype`; None keeps theirs."""

    def entry(path: TreePath, key: str, tensor: Tensor) -> LazyTransform:
        tensor = cast_tensor(tensor, dtype, f"{title}: {key}")
        shape = layout.shape(path, tuple(tensor.shape))
        return LazyTransform(shape, tensor.dtype, lambda: layout.write(path, tensor.read()))

    keys = {path: prefix + layout.key(path) for path in ours}
    return {key: entry(path, key, ours[path]) for path, key in keys.items()}


def _save(
    component: Component, folder: Path, ours: Mapping[TreePath, Tensor], dtype: np.dtype | None, flax: bool
) -> None:
    layout = FLAX if flax else torch_layout(component.files.renames)
    tensors = to_state_dict(ours, layout, dtype, component.files.title)
    if flax:
        chunks, name = (
            msgpack_chunks({path: tensors[layout.key(path)] for path in ours}),
            f"{component.files.flax_stem}.msgpack",
        )
    else:
        chunks, name = safetensors_chunks(tensors, _METADATA), f"{component.files.torch_stem}.safetensors"
    write_verified(folder / name, chunks, tensors)
