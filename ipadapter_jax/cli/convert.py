"""`ipadapter-jax convert`: what it is told."""

import dataclasses
from pathlib import Path
from typing import Literal

from ipadapter_jax.cli.option_types import Positional
from ipadapter_jax.storage.paths import PathOrHubId


@dataclasses.dataclass
class Convert:
    """Writes weights in another format, by what SOURCE holds and what OUT is called; nothing is lost or rounded unless
    --dtype asks for it.

    An IP-Adapter (released file, raw checkpoint of accelerate, folder of one of our runs) becomes OUT.safetensors or
    OUT.bin; a base model (diffusers or Flax folder, single file) becomes OUT.safetensors, one file, or the folder OUT;
    a CLIP image encoder (OpenCLIP or transformers) becomes the folder OUT.
    """

    source: Positional[PathOrHubId]
    """File, folder or Hub place."""
    out: Positional[Path]
    """Name of the new file or folder, which must not exist."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Round to this; by default every tensor stays as it is stored."""
    flax: bool = False
    """Write a folder of Flax msgpack files rather than PyTorch's safetensors."""
    config: PathOrHubId | None = None
    """For a single file: folder or Hub id of its family, for settings and tokenizer; by default Stable Diffusion
    1.5."""
    vae: PathOrHubId | None = None
    """Another VAE than the base model's: a folder, a Hub id or a file."""
    text_encoder: PathOrHubId | None = None
    """Another text encoder than the base model's: a folder, a Hub id or a file."""
    extract_ema: bool = False
    """For a single file: take the moving average of its UNet."""
    variant: str | None = None
    """Which weight files of a base model's folder to take, such as fp16 or non_ema; parts without such files are taken
    from their plain ones."""
