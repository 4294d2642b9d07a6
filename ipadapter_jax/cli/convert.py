"""Options of `ipadapter-jax convert`."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from ipadapter_jax.cli.model_options import ModelOptions
from ipadapter_jax.cli.option_types import Positional
from ipadapter_jax.storage.paths import PathOrHubId


@dataclasses.dataclass(kw_only=True)
class Convert(ModelOptions):
    """Writes weights in another format, which depends on the contents of SOURCE and the name of OUT. Nothing is lost or
    rounded unless --dtype is given.

    An IP-Adapter (released file, raw checkpoint of accelerate, folder of a training run) becomes OUT.safetensors or
    OUT.bin; a base model (diffusers or Flax folder, single file) becomes OUT.safetensors, one file, or the folder OUT;
    a CLIP image encoder (OpenCLIP or transformers) becomes the folder OUT.
    """

    help_groups: ClassVar = {
        "options": (
            *("source", "out", "dtype", "flax"),
            *("config", "vae", "text_encoder", "extract_ema", "variant"),
        )
    }

    source: Positional[PathOrHubId]
    """File, folder, or path on the Hub."""
    out: Positional[Path]
    """File or folder to write, which must not exist."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type to convert to; by default every tensor keeps its own."""
    flax: bool = False
    """Write a folder of Flax msgpack files instead of PyTorch's safetensors."""
