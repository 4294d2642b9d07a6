"""One network in diffusers' folder layout: config.json, and safetensors under PyTorch's names."""

from pathlib import Path

import numpy as np

from ipadapter_jax.errors import InputError
from ipadapter_jax.files import write_whole
from ipadapter_jax.weights.components import Component
from ipadapter_jax.weights.names import to_torch, torch_key
from ipadapter_jax.weights.safetensors_bytes import safetensors_bytes
from ipadapter_jax.weights.tree import Tree, leaves


def save_component(component: Component, folder: Path, params: Tree, dtype: np.dtype, config: bytes) -> None:
    """Writes `params`, rounded to `dtype`, and the text of config.json into `folder`.

    Raises InputError naming the tensor that is not finite or does not fit `dtype`, or the file that cannot be written.
    """
    tensors = {}
    for path, leaf in leaves(params).items():
        name = torch_key(path, component.renames)
        with np.errstate(over="ignore"):  # reported just below, with the tensor's name
            array = np.asarray(leaf).astype(dtype)
        if not np.isfinite(array).all():
            raise InputError(f"{component.title}: {name} is not finite in {dtype}; save as float32, or it has diverged")
        tensors[name] = to_torch(path, array)
    write_whole(folder / f"{component.torch_stem}.safetensors", safetensors_bytes(tensors, {"format": "pt"}))
    write_whole(folder / "config.json", config)
