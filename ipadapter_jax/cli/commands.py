"""The commands by name. A command's options and its function are imported when they are needed: neither jax nor the
networks are imported to report what is wrong with a command line."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ipadapter_jax.cli.option_types import OptionsOfCommand


class Command(NamedTuple):
    """One command.

    summary: what it does, in a few words. options, function: the dataclass of its options and the function that runs
    it, each as "module:name". reports_immediately: whether its reports are shown while it runs, as those of long jobs.
    """

    summary: str
    options: str
    function: str
    reports_immediately: bool = False

    def kind(self) -> type[OptionsOfCommand]:
        """Imports the dataclass of its options."""
        return _import(self.options)

    def run(self) -> Callable[[Any], int]:
        """Imports the function that runs it: it takes an instance of `kind` and returns the exit code."""
        return _import(self.function)


COMMANDS: Mapping[str, Command] = {
    "generate": Command(
        "generate images from a prompt and a reference image",
        "ipadapter_jax.cli.generate:Generate",
        "ipadapter_jax.cli.run.generate:generate",
    ),
    "batch": Command(
        "generate images for every row of a list or a folder; resumable",
        "ipadapter_jax.cli.batch:Batch",
        "ipadapter_jax.cli.run.batch:batch",
        reports_immediately=True,
    ),
    "train": Command(
        "train an IP-Adapter with a recipe",
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
        "score an adapter, or images of another program: CLIP-I, CLIP-T",
        "ipadapter_jax.cli.evaluate:Evaluate",
        "ipadapter_jax.cli.run.evaluate:evaluate",
        reports_immediately=True,
    ),
    "convert": Command(
        "convert weights from one format to another",
        "ipadapter_jax.cli.convert:Convert",
        "ipadapter_jax.cli.run.convert:convert",
    ),
    "inspect": Command(
        "show what a file or folder of weights holds",
        "ipadapter_jax.cli.inspect:Inspect",
        "ipadapter_jax.cli.run.inspect:inspect",
    ),
    "doctor": Command(
        "show devices, versions, caches, and what is missing",
        "ipadapter_jax.cli.doctor:Doctor",
        "ipadapter_jax.cli.run.doctor:doctor",
    ),
}


def _import(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
