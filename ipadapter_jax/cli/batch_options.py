"""What all commands that make thousands of images are told."""

import dataclasses

from ipadapter_jax.cli.options import Sampling
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.urls import is_url

HELP_JOB = ("batch_size", "process", "processes")


@dataclasses.dataclass(kw_only=True)
class BatchOptions(Sampling):
    """Options of every command that makes many images."""

    num_images: int = 1
    """Images of each row."""
    seed: int = 0
    """Of rows that have none: this + a number made of the row's name."""
    batch_size: int = 8
    """Images made at once, on all devices together."""
    process: int = 0
    """Which of several processes this is, on this machine or others that share the folder; each takes its rows."""
    processes: int = 1
    """How many there are."""

    def check(self) -> None:
        """Raises InputError for what can be told before any file is opened."""
        super().check()
        for name, value in (("num-images", self.num_images), ("batch-size", self.batch_size)):
            if value < 1:
                raise InputError(f"--{name} {value} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} must lie between 0 and 2^32 - 1")
        if self.negative_image is not None and is_url(self.negative_image):
            raise InputError(
                f"--negative-image {self.negative_image}: a job may go on for days, and what lies behind a URL may "
                "change; download it first, then give the path of the file"
            )
        if not 0 <= self.process < self.processes:
            raise InputError(f"--process {self.process} of --processes {self.processes}: they count from 0")

    @property
    def shard(self) -> tuple[int, int]:
        return self.process, self.processes
