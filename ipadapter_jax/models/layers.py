"""Layers that several networks use, with the numerics of PyTorch: exact GELU, statistics of norms in float32."""

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
    """A linear layer over the last axis: x @ kernel + bias."""


class Conv(SkipShapeCheck, nn.Conv):
    """A convolution over the axes h and w of (B, h, w, C)."""


class Embed(SkipShapeCheck, nn.Embed):
    """An embedding table: integer ids (...) -> vectors (..., D)."""


class GroupNorm(SkipShapeCheck, nn.GroupNorm):
    """Normalizes each group of channels of each batch element, over all positions."""


class LayerNorm(SkipShapeCheck, nn.LayerNorm):
    """Normalizes the channels of each position."""


def _sums_at_once(dtype: jnp.dtype) -> bool:
    """Whether a norm computes the variance as E[x^2] - E[x]^2, with both sums in float32 from one pass over x.

    With a large mean m its error is about 1e-7 m^2. In bfloat16 that does not matter, because rounding x has already
    cost 1e-5 m^2. In float16 and float32 rounding costs no more than that, so two passes are worth it.
    """
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
    """A convolution with stride 1 that keeps h and w. `how` computes it, and may give another h and w."""
    return Conv(features, (kernel, kernel), padding=kernel // 2, dtype=dtype, conv_general_dilated=how, name=name)


def gelu(x: Array) -> Array:
    """x Phi(x), the exact GELU as in PyTorch; jax.nn.gelu approximates it with tanh by default."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


def timestep_embedding(timesteps: Array, width: int) -> Array:
    """Sinusoidal embedding: timesteps (...), which may be fractional -> (..., width) float32.

    The cosines come first, then the sines, of t * 10000^(-i / (width / 2)) for i = 0 to width / 2 - 1.
    """
    half = width // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def match_rows(x: Array, rows: int) -> Array:
    """Repeats each element of a batch: (B, ...) -> (rows, ...), where `rows` is B or a multiple of it.

    So what does not depend on the conditioning is computed once for all guidance branches.
    """
    return x if x.shape[0] == rows else jnp.repeat(x, rows // x.shape[0], axis=0)


class ResnetBlock(nn.Module):
    """diffusers' ResnetBlock2D: norm, SiLU, conv, + time shift, norm, SiLU, conv, + shortcut.

    Takes x (B, h, w, C) and a time shift (B, features), or (R, features) with R a multiple of B; gives
    (B or R, h, w, features).
    """

    features: int
    groups: int
    epsilon: float
    dtype: jnp.dtype

    def setup(self):
        self.norm1, self.norm2 = (group_norm(self.groups, self.epsilon, self.dtype) for _ in range(2))
        self.conv1, self.conv2 = (conv(self.features, 3, self.dtype) for _ in range(2))
        # Flax makes parameters only for modules that are called. So the VAE, which has no time embedding, has no
        # time_emb_proj, and a block whose input has as many channels as its output has no conv_shortcut.
        self.time_emb_proj = Dense(self.features, dtype=self.dtype)
        self.conv_shortcut = conv(self.features, 1, self.dtype)

    def time_shift(self, time: Array) -> Array:
        """Time embedding (B, T) -> the time shift (B, features), an argument of `__call__`."""
        return self.time_emb_proj(nn.silu(time))

    def __call__(self, x: Array, time_shift: Array | None = None) -> Array:
        """(B, h, w, C) and shifts (1, B or R, features) -> (B or R, h, w, features). With R shifts, a multiple of B,
        everything before they are added is computed once for B."""
        y = self.conv1(nn.silu(self.norm1(x)))
        if time_shift is not None:
            rows = max(y.shape[0], time_shift.shape[0])
            y = match_rows(y, rows) + match_rows(time_shift, rows)[:, None, None]
        y = self.conv2(nn.silu(self.norm2(y)))
        shortcut = x if x.shape[-1] == self.features else self.conv_shortcut(x)
        return match_rows(shortcut, y.shape[0]) + y


class Downsample(nn.Module):
    """Halves h and w with a strided 3x3 convolution.

    `padding` is ((top, bottom), (left, right)): the UNet pads 1 on every side, the VAE only at the bottom and right.
    """

    features: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Conv(self.features, (3, 3), strides=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling to the given height and width, then a 3x3 convolution."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, height: int, width: int) -> Array:
        how = functools.partial(convolve_upsampled, height, width)
        return conv(self.features, 3, self.dtype, "conv", how)(x)
