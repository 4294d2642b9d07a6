"""The networks of a Stable Diffusion 1.x model and its adapters, as data: how each is stored and built."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ipadapter_jax.models.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.models.vae import VAE, VAEConfig
from ipadapter_jax.ops.fast_params import parameter_shapes
from ipadapter_jax.weights import identify
from ipadapter_jax.weights.key_mapping import VAE_RENAMES
from ipadapter_jax.weights.layouts.openclip import to_transformers
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.load_tree import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """How one network is stored and built.

    `kind` is the name that `identify` gives to a file of such weights. `translate` maps the tensors of another layout
    to PyTorch's, and `modern_key` maps an old PyTorch key to the one used today. Keys that match `ignored` are not
    weights of this network (buffers, or the other half of a whole CLIP); they are left out and reported.
    """

    title: str
    kind: str
    classes: tuple[str, ...]  # of diffusers or transformers, as config.json names them
    torch_stem: str
    flax_stem: str
    config: Callable[[Mapping[str, Any]], Any]
    module: Callable[..., Any]
    example: Callable[[Any], Callable]  # config -> a method of the module, with inputs, that uses every parameter
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    other_files: tuple[str, ...] = ()  # other names under which its weights are found
    translate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    modern_key: Callable[[str], str] = lambda key: key
    ignored: str = r"(?!)"


def _old_vae_key(key: str) -> str:
    return re.sub(
        r"(mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda found: f"{found[1]}.{VAE_RENAMES[found[2]]}.",
        key,
    )


def _old_text_key(key: str) -> str:
    return (
        key
        if key.startswith(("text_model.", "vision_", "visual_", "text_projection", "logit"))
        else f"text_model.{key}"
    )


def abstract_array(*shape: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
    """The shape and dtype of an array, in place of one."""
    return jax.ShapeDtypeStruct(shape, dtype)


UNET = Component(
    title="UNet",
    kind=identify.UNET,
    classes=("UNet2DConditionModel",),
    torch_stem="diffusion_pytorch_model",
    flax_stem="diffusion_flax_model",
    config=UNetConfig.from_json,
    module=UNet,
    example=lambda config: functools.partial(
        UNet.from_text,
        latents=abstract_array(1, 2**config.levels, 2**config.levels, config.in_channels),
        timesteps=abstract_array(1),
        text=abstract_array(1, 1, config.cross_attention_dim),
    ),
)
VAE_COMPONENT = Component(
    title="VAE",
    kind=identify.VAE,
    classes=("AutoencoderKL",),
    torch_stem="diffusion_pytorch_model",
    flax_stem="diffusion_flax_model",
    config=VAEConfig.from_json,
    module=VAE,
    example=lambda config: functools.partial(
        VAE.__call__, images=abstract_array(1, config.downscale, config.downscale, config.in_channels)
    ),
    renames=VAE_RENAMES,
    modern_key=_old_vae_key,
)
TEXT_ENCODER = Component(
    title="text encoder",
    kind=identify.TEXT_ENCODER,
    classes=("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"),
    torch_stem="model",
    flax_stem="flax_model",
    config=CLIPTextConfig.from_json,
    module=CLIPText,
    example=lambda config: functools.partial(CLIPText.__call__, input_ids=abstract_array(1, 1, dtype=jnp.int32)),
    modern_key=_old_text_key,
    ignored=r".*position_ids|text_projection\..*|logit_scale|vision_model\..*|visual_projection\..*",
)
IMAGE_ENCODER = Component(
    title="image encoder",
    kind=identify.IMAGE_ENCODER,
    classes=("CLIPVisionModelWithProjection", "CLIPVisionModel", "CLIPModel"),
    torch_stem="model",
    flax_stem="flax_model",
    config=CLIPVisionConfig.from_json,
    module=CLIPVision,
    example=lambda config: functools.partial(
        CLIPVision.__call__, pixel_values=abstract_array(1, config.image_size, config.image_size, 3)
    ),
    other_files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    translate=to_transformers,
    ignored=r".*position_ids|text_projection\..*|logit_scale|text_model\..*",
)
WHOLE_CLIP = Component(
    title="CLIP model",
    classes=("CLIPModel",),
    kind=identify.IMAGE_ENCODER,  # `identify` sees its vision half first
    torch_stem="model",
    flax_stem="flax_model",
    config=CLIPConfig.from_json,
    module=CLIP,
    example=lambda config: functools.partial(
        CLIP.__call__,
        pixel_values=abstract_array(1, config.vision.image_size, config.vision.image_size, 3),
        input_ids=abstract_array(1, 1, dtype=jnp.int32),
    ),
    ignored=r".*position_ids|logit_scale",
)


def abstract_params(component: Component, module: Any) -> Tree:
    """The module's parameter tree with a shape and dtype for each leaf; nothing is computed."""
    example = component.example(module.config)
    return parameter_shapes(module, method=example.func, **example.keywords)


def init_params(component: Component, module: Any, key: jax.Array) -> Tree:
    """Initial weights of the module, from flax's initializers."""
    example = component.example(module.config)
    inputs = {name: jnp.zeros(array.shape, array.dtype) for name, array in example.keywords.items()}
    return jax.jit(lambda key: module.init(key, method=example.func, **inputs))(key)["params"]
