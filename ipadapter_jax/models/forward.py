"""The forward pass of the UNet with its image prompt, the same for sampling and for training.

text_kv  = text_keys_values(unet, params, text)                       once per prompt
image_kv = image_keys_values(projection, adapter, params, features)   once per image prompt
output   = unet_output(unet, params, latents, time_shifts, UNetContext(text_kv, [image_kv], weights))
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
from jax import Array

from ipadapter_jax.models.image_projections import Projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.unet import AddedConditioning, UNet, UNetResiduals
from ipadapter_jax.ops.attention import KeyValue
from ipadapter_jax.runtime.trees import Params, PyTree


class UNetContext(NamedTuple):
    """What the UNet sees next to latents and time, for each of the R elements of its batch.

    text_kv holds keys and values (R, S, C) per cross-attention layer, image_kv the same (R, N, C) for every image
    branch, and image_weight[branch][layer] the weight of that branch there: a scalar or what broadcasts to (R, L, 1).
    residuals: what other networks add to the skip connections and the middle block.
    """

    text_kv: Sequence[KeyValue]
    image_kv: Sequence[Sequence[KeyValue]] = ()
    image_weight: Sequence[Sequence[Array | float]] = ()
    residuals: UNetResiduals | None = None


class ImageKeysValues(NamedTuple):
    """Keys and values of R image prompts of n images: (R, n N, C) per cross-attention layer, the tokens of a prompt's
    images one after the other. tokens: N, those of one image."""

    kv: list[KeyValue]
    tokens: int


class OutputWithMaps(NamedTuple):
    """The UNet's output, and the attention (R, L, N) to the image tokens per image branch and cross-attention layer."""

    output: Array
    maps: list[list[Array]]


def apply(network: nn.Module, params: Params, *inputs: PyTree, method: Callable | None = None) -> PyTree:
    """What a network with these parameters gives for the inputs, by its method or by a call."""
    return network.apply({"params": params}, *inputs, method=method)


def text_keys_values(unet: UNet, params: Params, text: Array) -> list[KeyValue]:
    """Text states (R, S, D) -> keys and values (R, S, C) per cross-attention layer."""
    return apply(unet, params, text, method=UNet.text_kv)


def image_keys_values(
    projection: Projection, adapter: IPAdapter, params: Mapping[str, Params], features: Array, prompts: int
) -> ImageKeysValues:
    """Image features (R n, ...) of R image prompts -> their keys and values."""
    tokens = apply(projection, params["image_proj"], features)
    joined = tokens.reshape(prompts, -1, tokens.shape[-1])
    return ImageKeysValues(apply(adapter, params["ip_adapter"], joined), tokens.shape[-2])


def time_shifts(
    unet: UNet, params: Params, timesteps: Array, added: AddedConditioning | None = None
) -> list[list[Array]]:
    """Timesteps (...) -> what time, and the added conditioning where the UNet has one, adds in each resnet, (..., C):
    with the leading axes of both broadcast."""
    return apply(unet, params, timesteps, added, method=UNet.time_shifts)


def unet_output(
    unet: UNet, params: Params, latents: Array, shifts: Sequence[Sequence[Array]], context: UNetContext
) -> Array:
    """Latents (B, h, w, C) and time shifts, of 1 or B timesteps -> the UNet's output (R, h, w, C) float32."""
    return apply(unet, params, latents, shifts, *context, method=UNet.at)


def unet_output_with_maps(
    unet: UNet, params: Params, latents: Array, shifts: Sequence[Sequence[Array]], context: UNetContext
) -> OutputWithMaps:
    """The same, and the attention to the image tokens."""
    found: PyTree = unet.apply({"params": params}, latents, shifts, *context, method=UNet.at, mutable=["maps"])
    output, collections = found
    return OutputWithMaps(output, UNet.maps_of(collections["maps"], unet.config))
