"""Tools for the tests of this package, and for those of code that uses it: recorded noise instead of random draws, and
small models of random weights. Nothing here needs a network or files."""

import importlib
from typing import TYPE_CHECKING

from ipadapter_jax.testing.noise import given_noise

if TYPE_CHECKING:
    from ipadapter_jax.testing.tiny_models import tiny_pipeline

__all__ = ["given_noise", "tiny_pipeline"]


def __getattr__(name: str) -> object:
    """`python -m ipadapter_jax.testing.random_weights` would run that module twice if it were imported here."""
    if name == "tiny_pipeline":
        return importlib.import_module(f"{__name__}.tiny_models").tiny_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
