"""The plus adapter of the embedded model `mini`: 16 tokens from all patches of the encoder; otherwise as mini.py.

ipadapter-jax train mini_plus --data.path data/scenes/... --out runs/mini_plus
"""

import dataclasses

from ipadapter_jax.cli.recipes import load_recipe

_base = load_recipe("mini")[0]
_model = dataclasses.replace(_base.model, adapter="plus", resampler_depth=2, resampler_heads=2)
config = dataclasses.replace(_base, out="runs/mini_plus", model=_model)
