"""Image prompts for Stable Diffusion in JAX: IP-Adapter (arXiv 2308.06721)."""

from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.image_prompts import PerPrompt
from ipadapter_jax.pipeline import StableDiffusion
from ipadapter_jax.scales import Scale

__version__ = "0.1.0"
__all__ = ["InputError", "PerPrompt", "Scale", "StableDiffusion", "WeightFileError"]
