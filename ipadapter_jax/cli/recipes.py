"""Recipes: Python files that define `config`, found by path, or by name if they come with the package."""

import importlib.util
import traceback
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.suggestions import did_you_mean
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.train.config import Train

_PACKAGE = Path(__file__).parents[1]
_IS_CLONE = (_PACKAGE.parent / "pyproject.toml").is_file()  # else they are installed below the package
_FOLDER = (_PACKAGE.parent if _IS_CLONE else _PACKAGE) / "configs"


class Recipe(NamedTuple):
    """A training configuration, and the docstring of its file."""

    config: Train
    about: str


def load_recipe(name: str) -> Recipe:
    """Executes a recipe and returns its config. name: a path of a Python file, or the name of a recipe that comes with
    the package, such as sd15. Raises InputError naming the recipe."""
    path = _find(name)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of any kind: a recipe is arbitrary code
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(f"recipe {path}, line {last.lineno}: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Train):
        raise InputError(f"recipe {path}: it must define config = Train(...), see configs/sd15.py")
    return Recipe(config, module.__doc__ or "")


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.py"))}


def _find(name: str) -> Path:
    path = expand_home(Path(name))
    if path.is_file() and path.suffix == ".py":
        return path
    known = recipes()
    if name in known:
        return known[name]
    what = f"recipe {name}: neither a .py file here nor one of {', '.join(known)}"
    raise InputError(what + did_you_mean(path.stem, known))
