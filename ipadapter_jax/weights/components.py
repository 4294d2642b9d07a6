"""The networks of a Stable Diffusion 1.x model and its adapters, as data: how each is stored and built."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ipadapter_jax.models.clip import CLIP, CLIPText, CLIPVision
from ipadapter_jax.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.models.unet import AddedConditioning, UNet
from ipadapter_jax.models.unet_config import TIME_IDS, UNetConfig
from ipadapter_jax.models.vae import VAE, VAEConfig
from ipadapter_jax.ops.fast_params import parameter_shapes
from ipadapter_jax.weights.component_files import (
    IMAGE_ENCODER_FILES,
    TEXT_ENCODER_FILES,
    TEXT_ENCODER_WITH_PROJECTION_FILES,
    UNET_FILES,
    VAE_FILES,
    WHOLE_CLIP_FILES,
    ComponentFiles,
)
from ipadapter_jax.weights.load_tree import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """How one network is stored and built."""

    files: ComponentFiles
    config: Callable[[Mapping[str, Any]], Any]
    module: Callable[..., Any]
    example: Callable[[Any], Callable]  # config -> a method of the module, with inputs, that uses every parameter


def abstract_array(*shape: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
    """The shape and dtype of an array, in place of one."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _unet_example(config: UNetConfig) -> functools.partial:
    pooled = config.pooled_dim
    return functools.partial(
        UNet.from_text,
        latents=abstract_array(1, 2**config.levels, 2**config.levels, config.in_channels),
        timesteps=abstract_array(1),
        text=abstract_array(1, 1, config.cross_attention_dim),
        added=None if pooled is None else AddedConditioning(abstract_array(1, pooled), abstract_array(1, TIME_IDS)),
    )


UNET = Component(
    files=UNET_FILES,
    config=UNetConfig.from_json,
    module=UNet,
    example=_unet_example,
)
VAE_COMPONENT = Component(
    files=VAE_FILES,
    config=VAEConfig.from_json,
    module=VAE,
    example=lambda config: functools.partial(
        VAE.__call__, images=abstract_array(1, config.downscale, config.downscale, config.in_channels)
    ),
)
TEXT_ENCODER = Component(
    files=TEXT_ENCODER_FILES,
    config=CLIPTextConfig.from_json,
    module=CLIPText,
    example=lambda config: functools.partial(CLIPText.__call__, input_ids=abstract_array(1, 1, dtype=jnp.int32)),
)
TEXT_ENCODER_WITH_PROJECTION = dataclasses.replace(
    TEXT_ENCODER, files=TEXT_ENCODER_WITH_PROJECTION_FILES, config=CLIPTextConfig.with_projection
)
IMAGE_ENCODER = Component(
    files=IMAGE_ENCODER_FILES,
    config=CLIPVisionConfig.from_json,
    module=CLIPVision,
    example=lambda config: functools.partial(
        CLIPVision.__call__, pixel_values=abstract_array(1, config.image_size, config.image_size, 3)
    ),
)
WHOLE_CLIP = Component(
    files=WHOLE_CLIP_FILES,
    config=CLIPConfig.from_json,
    module=CLIP,
    example=lambda config: functools.partial(
        CLIP.__call__,
        pixel_values=abstract_array(1, config.vision.image_size, config.vision.image_size, 3),
        input_ids=abstract_array(1, 1, dtype=jnp.int32),
    ),
)


def abstract_params(component: Component, module: Any) -> Tree:
    """The module's parameter tree with a shape and dtype for each leaf; nothing is computed."""
    example = component.example(module.config)
    return parameter_shapes(module, method=example.func, **example.keywords)


def init_params(component: Component, module: Any, key: jax.Array) -> Tree:
    """Initial weights of the module, from flax's initializers."""
    example = component.example(module.config)
    inputs = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), example.keywords)
    return jax.jit(lambda key: module.init(key, method=example.func, **inputs))(key)["params"]
