"""Options of `ipadapter-jax convert`."""

import dataclasses
from pathlib import Path
from typing import Literal

from ipadapter_jax.cli.option_types import Positional
from ipadapter_jax.storage.paths import PathOrHubId


@dataclasses.dataclass
class Convert:
    """Writes weights in another format, which depends on the contents of SOURCE and the name of OUT. Nothing is lost or
    rounded unless --dtype is given.

    An IP-Adapter (released file, raw checkpoint of accelerate, folder of a training run) becomes OUT.safetensors or
    OUT.bin; a base model (diffusers or Flax folder, single file) becomes OUT.safetensors, one file, or the folder OUT;
    a CLIP image encoder (OpenCLIP or transformers) becomes the folder OUT.
    """

    source: Positional[PathOrHubId]
    """File, folder, or path on the Hub."""
    out: Positional[Path]
    """File or folder to write, which must not exist."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type to convert to; by default every tensor keeps its own."""
    flax: bool = False
    """Write a folder of Flax msgpack files instead of PyTorch's safetensors."""
    config: PathOrHubId | None = None
    """For a single file: a folder or Hub id with the settings and tokenizer of its model family; by default Stable
    Diffusion 1.5."""
    vae: PathOrHubId | None = None
    """VAE to use instead of the base model's: a folder, a Hub id or a file."""
    text_encoder: PathOrHubId | None = None
    """Text encoder to use instead of the base model's: a folder, a Hub id or a file."""
    extract_ema: bool = False
    """For a single file: convert the moving average (EMA) of its UNet."""
    variant: str | None = None
    """Variant of the base model's weight files to read, such as fp16 or non_ema; components without such files are read
    from their plain ones."""
