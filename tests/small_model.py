"""A model that compiles in a third of the time: the recorded one with a UNet of two levels of one layer.

For what holds of every model; what was recorded of PyTorch needs the recorded one.
"""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

from helpers import ADAPTERS, IMAGE_ENCODER, TORCH_MODEL
from safetensors.numpy import load_file, save_file

from ipadapter_jax.models.unet import UNet, cross_attention_layers
from ipadapter_jax.testing.random_weights import write_component
from ipadapter_jax.testing.sizes import MICRO

CONFIG = dataclasses.replace(MICRO.unet, sample_size=8)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="small-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def small_model() -> Path:
    """A folder in diffusers' layout, made once per session."""
    base = _folder() / "base"
    shutil.copytree(TORCH_MODEL, base, ignore=shutil.ignore_patterns("unet"))
    write_component(base / "unet", UNet(CONFIG))
    return base


@functools.cache
def small_adapter(name: str) -> Path:
    """A recorded adapter for it, with its image encoder beside it: the first layers, which have its width."""
    layers = {2 * i + 1 for i in range(len(cross_attention_layers(CONFIG)))}
    found = {
        key: array
        for key, array in load_file(ADAPTERS / f"{name}.safetensors").items()
        if not key.startswith("ip_adapter.") or int(key.split(".")[1]) in layers
    }
    save_file(found, _folder() / f"{name}.safetensors")
    shutil.copytree(IMAGE_ENCODER, _folder() / IMAGE_ENCODER.name, dirs_exist_ok=True)
    return _folder() / f"{name}.safetensors"
