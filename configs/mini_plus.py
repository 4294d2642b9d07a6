"""The plus adapter of the bundled model `mini`: 16 tokens from all patches of the encoder; otherwise like mini.py.

ipadapter-jax train mini_plus --data.path data/scenes/... --out runs/mini_plus

diffusers reads plus files with exactly 4 layers; with one head per layer mini stays below 16 MB.
"""

import dataclasses

from ipadapter_jax.cli.recipes import load_recipe

_base = load_recipe("mini").config
_model = dataclasses.replace(_base.model, adapter="plus", resampler_heads=1)
config = dataclasses.replace(_base, out="runs/mini_plus", model=_model)
