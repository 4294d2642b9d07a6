"""Image prompts for Stable Diffusion in JAX: IP-Adapter (arXiv 2308.06721)."""

import importlib
from typing import TYPE_CHECKING, Any

from ipadapter_jax.errors import InputError, WeightFileError

if TYPE_CHECKING:
    from ipadapter_jax.pipelines.image_prompt_settings import PerPrompt
    from ipadapter_jax.pipelines.scales import Scale
    from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion

__version__ = "0.1.0"
__all__ = ["InputError", "PerPrompt", "Scale", "StableDiffusion", "WeightFileError"]

_HOMES = {"PerPrompt": "image_prompt_settings", "Scale": "scales", "StableDiffusion": "stable_diffusion"}


def __getattr__(name: str) -> Any:
    """Imports jax and the networks when they are first asked for: `ipadapter-jax --help` needs neither."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.pipelines.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
