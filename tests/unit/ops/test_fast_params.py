"""Shapes of parameters, told without drawing them, are those of what is drawn."""

import flax
import jax
import numpy as np
import pytest

from ipadapter_jax.models.clip import CLIPText, CLIPVision
from ipadapter_jax.models.image_projections import ImageProjConfig, example_features, image_projection
from ipadapter_jax.models.layers import Dense
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.ops.fast_params import parameter_shapes
from ipadapter_jax.testing.sizes import MICRO
from ipadapter_jax.weights.components import (
    IMAGE_ENCODER,
    TEXT_ENCODER,
    UNET,
    VAE_COMPONENT,
    abstract_params,
    init_params,
)

PARTS = {"unet": (UNET, UNet), "vae": (VAE_COMPONENT, VAE), "text": (TEXT_ENCODER, CLIPText)}
PARTS["image"] = (IMAGE_ENCODER, CLIPVision)
CONFIGS = dict(zip(PARTS, vars(MICRO).values(), strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_shapes_are_those_of_what_is_drawn(part):
    component, module = PARTS[part]
    network = module(CONFIGS[part], np.dtype("float32"))
    drawn = init_params(component, network, jax.random.key(0))
    assert abstract_params(component, network) == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), drawn)
    assert all(np.ptp(x) > 0 for x in jax.tree.leaves(drawn) if x.ndim > 1)  # drawn, not the zeros of a shape


def test_shapes_of_a_resampler():
    config = ImageProjConfig(variant="plus", feature_dim=16, cross_attention_dim=8, num_tokens=3, hidden_dim=8, heads=2)
    module, features = image_projection(config), example_features(config)
    drawn = jax.eval_shape(module.init, jax.random.key(0), features)["params"]
    assert parameter_shapes(module, features) == drawn


def test_a_missing_parameter_is_named():
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match='"bias"'):
        Dense(2).apply({"params": {"kernel": np.zeros((3, 2))}}, np.zeros((1, 3)))
