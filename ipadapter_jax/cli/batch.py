"""`ipadapter-jax batch`: what it is told."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from ipadapter_jax.cli.batch_options import HELP_JOB, BatchOptions
from ipadapter_jax.cli.option_types import Positional
from ipadapter_jax.cli.options import HELP_IMAGE_PROMPT, HELP_MODEL, HELP_SAMPLING
from ipadapter_jax.errors import InputError


@dataclasses.dataclass(kw_only=True)
class Batch(BatchOptions):
    """Makes images for every row of a list, on all devices, into a folder.

    The same command goes on after any stop, kill -9 included, without making an image twice or losing one. Rows that
    cannot be used are skipped and listed in bad_rows.jsonl. Every image depends on its own row and the options alone.
    """

    source: Positional[Path]
    """A folder of reference images (name.jpg, its prompt in name.txt, name.caption or a metadata.jsonl), or a .csv or
    .jsonl with the columns prompt, image (several separated by ; or as a list), negative_prompt, seed, scale, name."""
    out: Path
    """The folder for the images, with job.json, job.jsonl (a line for each image) and bad_rows.jsonl."""

    help_groups: ClassVar = {
        "what to make": ("source", "out", "num_images", "seed", "height", "width", "negative_prompt"),
        "image prompt": HELP_IMAGE_PROMPT,
        "sampling": HELP_SAMPLING,
        "model": HELP_MODEL,
        "the job": HELP_JOB,
    }

    def check(self) -> None:
        """Raises InputError for what can be told from the words alone."""
        super().check()
        source, out = self.source.absolute(), self.out.absolute()
        if source == out or source in out.parents:
            raise InputError(f"--out {self.out} lies in {self.source}, whose images are prompts; give another folder")
