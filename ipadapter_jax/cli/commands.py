"""The commands by name. What a command is told and what it does are imported when they are asked for: neither jax nor
the networks are needed to say what is wrong with a command line."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command: what it makes, in a few words; the dataclass of its options and the function that does it, each as
    "module:name"; whether its reports appear immediately, as those of a long job do."""

    about: str
    options: str
    function: str
    reports_immediately: bool = False

    def kind(self) -> type:
        """The dataclass of its options."""
        return _found(self.options)

    def run(self) -> Callable[[Any], int]:
        """The function that does it, of an instance of `kind`, which returns the exit code."""
        return _found(self.function)


COMMANDS: Mapping[str, Command] = {
    "generate": Command(
        "images from a prompt and a reference image",
        "ipadapter_jax.cli.generate:Generate",
        "ipadapter_jax.cli.run.generate:generate",
    ),
    "batch": Command(
        "images for every row of a list or a folder, resumable",
        "ipadapter_jax.cli.batch:Batch",
        "ipadapter_jax.cli.run.batch:batch",
        reports_immediately=True,
    ),
    "train": Command(
        "train an IP-Adapter by a recipe",
        "ipadapter_jax.train.config:Train",
        "ipadapter_jax.cli.run.train:train",
        reports_immediately=True,
    ),
    "encode": Command(
        "compute latents and image features of a data set once, for train",
        "ipadapter_jax.train.precompute_config:PrecomputeConfig",
        "ipadapter_jax.cli.run.encode:encode",
        reports_immediately=True,
    ),
    "evaluate": Command(
        "score an adapter, or the images of another program: CLIP-I, CLIP-T",
        "ipadapter_jax.cli.evaluate:Evaluate",
        "ipadapter_jax.cli.run.evaluate:evaluate",
        reports_immediately=True,
    ),
    "convert": Command(
        "weights from one format to another",
        "ipadapter_jax.cli.convert:Convert",
        "ipadapter_jax.cli.run.convert:convert",
    ),
    "inspect": Command(
        "what a file or folder of weights is",
        "ipadapter_jax.cli.inspect:Inspect",
        "ipadapter_jax.cli.run.inspect:inspect",
    ),
    "doctor": Command(
        "devices, versions, caches, and what is missing",
        "ipadapter_jax.cli.doctor:Doctor",
        "ipadapter_jax.cli.run.doctor:doctor",
    ),
}


def _found(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
