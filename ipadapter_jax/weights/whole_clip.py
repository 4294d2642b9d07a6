"""A whole CLIP as transformers keeps it: both encoders and both projections in one file, for scoring."""

import functools

import jax.numpy as jnp

from ipadapter_jax.models.clip import CLIP, CLIPConfig
from ipadapter_jax.weights import identify
from ipadapter_jax.weights.component import Component
from ipadapter_jax.weights.components import like

WHOLE_CLIP = Component(
    title="CLIP model",
    classes=("CLIPModel",),
    kind=identify.IMAGE_ENCODER,  # its text half has no name of its own that a text encoder lacks
    torch_stem="model",
    flax_stem="flax_model",
    config=CLIPConfig.from_json,
    module=CLIP,
    example=lambda config: functools.partial(
        CLIP.__call__,
        pixel_values=like(1, config.vision.image_size, config.vision.image_size, 3),
        input_ids=like(1, 1, dtype=jnp.int32),
    ),
    ignored=r".*position_ids|logit_scale",
)
