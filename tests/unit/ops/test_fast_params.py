"""Shapes of parameters, found without sampling them; and who sees the parameters."""

import flax
import jax
import numpy as np
import pytest

from ipadapter_jax.models.clip import CLIPText, CLIPVision
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.models.image_projections import example_features, image_projection
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


def test_tools_that_replace_flax_param_see_every_parameter_and_may_replace_it(monkeypatch):
    """As qwix does, which otherwise would quantize nothing."""
    unet, seen, flax_param = UNet(MICRO.unet), set(), flax.linen.Module.param
    params = abstract_params(UNET, unet)
    latents, text = (np.zeros((1, 8, 8, 4), np.float32), np.zeros((1, 3, MICRO.unet.cross_attention_dim), np.float32))

    def hooked(module, name, init, *args, **options):
        seen.add((*module.path, name))
        return flax_param(module, name, init, *args, **options).astype(np.float16)

    def halves() -> int:
        def output(params):
            return unet.apply({"params": params}, latents, np.zeros(1, np.float32), text, method=UNet.from_text)

        return str(jax.make_jaxpr(output)(params)).count("new_dtype=float16")

    assert not halves()
    monkeypatch.setattr(flax.linen.Module, "param", hooked)
    assert halves() >= len(jax.tree.leaves(params))
    assert seen == set(flax.traverse_util.flatten_dict(params))


def test_flax_checks_no_shape_of_a_given_parameter():
    """Which takes a quarter of the time of tracing; weights/load_tree.py checks them when they are read."""
    layer = Dense(2, kernel_init=lambda *_: pytest.fail("traced"), bias_init=lambda *_: pytest.fail("traced"))
    params = {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}
    np.testing.assert_array_equal(layer.apply({"params": params}, np.ones((1, 3), np.float32)), [[4, 4]])
