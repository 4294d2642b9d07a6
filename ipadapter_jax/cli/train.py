"""`ipadapter-jax train RECIPE`: a recipe with the changes of the command line."""

from collections.abc import Sequence

from ipadapter_jax.cli.help import help_of
from ipadapter_jax.cli.parsing import parse_words
from ipadapter_jax.cli.recipes import load_recipe, recipes
from ipadapter_jax.errors import InputError
from ipadapter_jax.train.config import Train


def parse(words: Sequence[str]) -> Train:
    """Parses the arguments of `train`: ["sd15", "--optim.learning-rate", "2e-4"] gives the recipe sd15 with that
    learning rate. Raises InputError."""
    if not words or words[0].startswith("-"):
        raise InputError(
            f"train: name a recipe first, one of {', '.join(recipes())} or a .py file: ipadapter-jax train sd15 ..."
        )
    return parse_words("train", Train, words[1:], load_recipe(words[0]).config)


def help_of_train(words: Sequence[str]) -> str:
    """The help of `train`. If the words name a recipe, its values are shown as defaults."""
    if words and not words[0].startswith("-"):
        recipe = load_recipe(words[0])
        return help_of(f"train {words[0]}", Train, recipe.about, recipe.config)
    known = f"RECIPE is one of {', '.join(recipes())} or a .py file, whose values are the defaults."
    return help_of("train", Train, f"{Train.__doc__}\n\n{known}", before="RECIPE")
