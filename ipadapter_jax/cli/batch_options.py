"""Options of the commands that make thousands of images."""

import dataclasses

from ipadapter_jax.cli.options import Sampling
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.urls import is_url

JOB_OPTIONS = ("batch_size", "process", "processes")


@dataclasses.dataclass(kw_only=True)
class BatchOptions(Sampling):
    """Options of every command that makes many images."""

    num_images: int = 1
    """Number of images for each row."""
    seed: int = 0
    """Seed of rows without a seed: this plus a number computed from the row's name."""
    batch_size: int = 8
    """Number of images in a batch, over all devices."""
    process: int = 0
    """Number of this process, from 0, when several processes, on this machine or others, share the folder and divide
    the rows."""
    processes: int = 1
    """Number of processes that share the folder."""

    def check(self) -> None:
        """Raises InputError for options that are wrong on their own or together. Opens no file."""
        super().check()
        for name, value in (("num-images", self.num_images), ("batch-size", self.batch_size)):
            if value < 1:
                raise InputError(f"--{name} {value} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} must lie between 0 and 2^32 - 1")
        if self.negative_image is not None and is_url(self.negative_image):
            raise InputError(
                f"--negative-image {self.negative_image}: a job may take days, and the content of a URL may "
                "change; download it first, then give the path of the file"
            )
        if not 0 <= self.process < self.processes:
            raise InputError(f"--process {self.process} of --processes {self.processes}: processes count from 0")

    @property
    def shard(self) -> tuple[int, int]:
        return self.process, self.processes
