"""A run of `ipadapter-jax encode` as data."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from ipadapter_jax.inputs.former_names import FormerName
from ipadapter_jax.storage.paths import PathOrHubId
from ipadapter_jax.train.config import Dtype


@dataclasses.dataclass(frozen=True)
class PrecomputeConfig:
    """Computes the VAE's latents and the image encoder's features of a data set once, for `train --data.path OUT`.

    A run that was stopped resumes with the same command. Several processes (SLURM, a TPU pod) share the work.
    """

    model: Annotated[PathOrHubId, FormerName("base")]
    """Base model, whose VAE and tokenizer are used: a folder in diffusers' layout or a Hub id."""
    image_encoder: PathOrHubId
    """Folder or Hub place of the CLIP vision model that reads the image prompts."""
    data: PathOrHubId
    """JSON list, folder, tar shards, Parquet, ArrayRecord, or a tfds directory."""
    out: Path
    """Folder to write to."""
    features: Literal["pooled", "penultimate"] = "pooled"
    """Of the image encoder: pooled for base adapters, penultimate (all patches, 320 times larger) for plus and full."""
    resolution: int = 512
    """Side of the square training images, in pixels."""
    dtype: Dtype = "bfloat16"
    """Of the computation, and of what is stored."""
    batch_size: int = 8
    """Images that a device encodes at a time."""
    image_root: PathOrHubId | None = None
    """Folder that the file names of a JSON list are relative to; by default the list's own."""
    image_column: str | None = None
    """Column of the images, where its name is not a usual one."""
    text_column: str | None = None
    """Column of the captions."""
    cond_image_column: str | None = None
    """Column of the image prompts, where these differ from the images."""
    variant: str | None = None
    """Which weight files of the base model to prefer, such as fp16."""
    threads: int = 16
    """Threads that read and decode images."""
    shard_records: int = 4096
    """Records in a file; a run that is stopped loses the one it is at."""
    max_unreadable_fraction: Annotated[float, FormerName("max_bad_share")] = 0.1
    """Stop when more than this fraction of the records cannot be read."""
