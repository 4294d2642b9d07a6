"""Layers that the networks share, with the numerics of PyTorch: exact GELU, statistics in float32."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.ops.convolution import convolve
from ipadapter_jax.ops.fast_params import SkipShapeCheck
from ipadapter_jax.ops.upsample_conv import convolve_upsampled


class Dense(SkipShapeCheck, nn.Dense):
    """x kernel + bias."""


class Conv(SkipShapeCheck, nn.Conv):
    """A convolution over h and w."""


class Embed(SkipShapeCheck, nn.Embed):
    """A table of vectors."""


class GroupNorm(SkipShapeCheck, nn.GroupNorm):
    """Every group of channels of a row has mean 0 and variance 1."""


class LayerNorm(SkipShapeCheck, nn.LayerNorm):
    """Every position has mean 0 and variance 1."""


def _sums_at_once(dtype: jnp.dtype) -> bool:
    """Whether a norm's variance may be E[x^2] - E[x]^2, both sums in float32 from one reading of x. With a large mean m
    it is off by about 1e-7 m^2: rounding x to bfloat16 has cost 1e-5 m^2 before, but to float16 as little as this."""
    return jnp.dtype(dtype) == jnp.bfloat16


def group_norm(groups: int, epsilon: float, dtype: jnp.dtype, name: str | None = None) -> GroupNorm:
    """GroupNorm with statistics in float32."""
    return GroupNorm(groups, epsilon=epsilon, use_fast_variance=_sums_at_once(dtype), dtype=dtype, name=name)


def layer_norm(dtype: jnp.dtype, epsilon: float = 1e-5, name: str | None = None) -> LayerNorm:
    """LayerNorm with PyTorch's epsilon and statistics in float32."""
    return LayerNorm(epsilon=epsilon, use_fast_variance=_sums_at_once(dtype), dtype=dtype, name=name)


def conv(
    features: int, kernel: int, dtype: jnp.dtype, name: str | None = None, how: Callable[..., Array] = convolve
) -> Conv:
    """A convolution that keeps the size, unless `how` it is computed says otherwise."""
    return Conv(features, (kernel, kernel), padding=kernel // 2, dtype=dtype, conv_general_dilated=how, name=name)


def gelu(x: Array) -> Array:
    """x Phi(x), the exact form; jax's default is the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


def timestep_embedding(timesteps: Array, width: int) -> Array:
    """Sinusoids (B,) -> (B, width) float32: cos then sin of t * 10000^(-i / (width/2)); timesteps may be fractional."""
    half = width // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def match_rows(x: Array, rows: int) -> Array:
    """(B, ...) -> (rows, ...), each row repeated: what needs no context is computed once for all branches."""
    return x if x.shape[0] == rows else jnp.repeat(x, rows // x.shape[0], axis=0)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut (diffusers' ResnetBlock2D): (B, h, w, C) -> features."""

    features: int
    groups: int
    epsilon: float
    dtype: jnp.dtype

    def setup(self):
        self.norm1, self.norm2 = (group_norm(self.groups, self.epsilon, self.dtype) for _ in range(2))
        self.conv1, self.conv2 = (conv(self.features, 3, self.dtype) for _ in range(2))
        # Flax gives parameters to what is called: the VAE has no time, and equal widths need no shortcut.
        self.time_emb_proj = Dense(self.features, dtype=self.dtype)
        self.conv_shortcut = conv(self.features, 1, self.dtype)

    def time_shift(self, time: Array) -> Array:
        """The time embedding (B, T) -> what `__call__` adds for it, (B, features)."""
        return self.time_emb_proj(nn.silu(time))

    def __call__(self, x: Array, time_shift: Array | None = None) -> Array:
        y = self.conv1(nn.silu(self.norm1(x)))
        if time_shift is not None:
            y = y + match_rows(time_shift, y.shape[0])[:, None, None]
        y = self.conv2(nn.silu(self.norm2(y)))
        return (x if x.shape[-1] == self.features else self.conv_shortcut(x)) + y


class Downsample(nn.Module):
    """Halves the size with a strided convolution. `padding` is ((top, bottom), (left, right)): the UNet pads 1 on every
    side, the VAE only below and right."""

    features: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Conv(self.features, (3, 3), strides=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest neighbours to the given size, then a convolution."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, height: int, width: int) -> Array:
        how = functools.partial(convolve_upsampled, height, width)
        return conv(self.features, 3, self.dtype, "conv", how)(x)
