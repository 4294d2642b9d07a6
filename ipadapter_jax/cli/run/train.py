"""Runs `ipadapter-jax train`: a recipe with the changes of the command line."""

import sys
from pathlib import Path

from ipadapter_jax.train.config import Train
from ipadapter_jax.train.dry_run import dry_run_report
from ipadapter_jax.train.export import ADAPTER
from ipadapter_jax.train.trainer import train as run
from ipadapter_jax.train.unused_options import warn_of_unused_options


def train(config: Train) -> int:
    """Runs it, or with --dry-run says what would be run. Returns the exit code."""
    if config.dry_run:
        warn_of_unused_options(config)
        print(dry_run_report(config, sys.argv))
        return 0
    code = run(config)
    if code == 0 and config.model.adapter != "none":
        print(Path(config.out) / ADAPTER)
    return code
