"""`ipadapter-jax train RECIPE`: a recipe with what the command line changes in it."""

import functools
from collections.abc import Sequence

import tyro

from ipadapter_jax.cli.recipes import load_recipe, recipes
from ipadapter_jax.errors import InputError
from ipadapter_jax.train.config import Train


def parse(arguments: Sequence[str]) -> Train:
    """["sd15", "--optim.learning-rate", "2e-4"] -> the recipe with that change. Raises InputError for the recipe,
    SystemExit, as tyro does, for options."""
    known = ", ".join(recipes())
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise InputError(f"train: name a recipe first, one of {known} or a .py file: ipadapter-jax train sd15 ...")
    cli = functools.partial(tyro.cli, Train, prog="ipadapter-jax train RECIPE")
    if arguments[0].startswith("-"):
        about = f"Trains an IP-Adapter. RECIPE is one of {known} or a .py file; its values are shown as the defaults."
        return cli(default=Train(), description=about, args=["--help"])
    recipe, about = load_recipe(arguments[0])
    return cli(default=recipe, description=about, args=list(arguments[1:]))
