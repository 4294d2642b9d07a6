"""Options of `ipadapter-jax batch`."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from ipadapter_jax.cli.batch_options import JOB_OPTIONS, BatchOptions
from ipadapter_jax.cli.option_types import Positional
from ipadapter_jax.cli.options import IMAGE_PROMPT_OPTIONS, MODEL_OPTIONS, SAMPLING_OPTIONS
from ipadapter_jax.errors import InputError


@dataclasses.dataclass(kw_only=True)
class Batch(BatchOptions):
    """Generates images for every row of a list, on all devices, into a folder.

    Rerun the same command to resume after any interruption, kill -9 included: no image is made twice and none is lost.
    Invalid rows are skipped and listed in bad_rows.jsonl. Every image depends on its own row and the options alone.
    """

    source: Positional[Path]
    """Folder of reference images (name.jpg with its prompt in name.txt, name.caption or a metadata.jsonl), or a .csv or
    .jsonl file with the columns prompt, image (several separated by ; or as a list), negative_prompt, seed, scale,
    name."""
    out: Path
    """Folder to write: the images, job.json (settings), job.jsonl (a line for each image) and bad_rows.jsonl."""

    help_groups: ClassVar = {
        "images": ("source", "out", "num_images", "seed", "height", "width", "negative_prompt"),
        "image prompt": IMAGE_PROMPT_OPTIONS,
        "sampling": SAMPLING_OPTIONS,
        "model": MODEL_OPTIONS,
        "the job": JOB_OPTIONS,
    }

    def check(self) -> None:
        """Raises InputError for options that are wrong on their own or together. Opens no file."""
        super().check()
        source, out = self.source.absolute(), self.out.absolute()
        if source == out or source in out.parents:
            raise InputError(f"--out {self.out} is inside {self.source}, whose images are prompts; give another folder")
