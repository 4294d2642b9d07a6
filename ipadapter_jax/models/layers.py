"""Layers that the networks share, with the numerics of PyTorch: exact GELU, two-pass statistics in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.models.convolution import convolve


def group_norm(groups: int, epsilon: float, dtype: jnp.dtype, name: str | None = None) -> nn.GroupNorm:
    """GroupNorm with PyTorch's variance: flax's fast variance E[x^2] - E[x]^2 loses digits when the mean is large."""
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def layer_norm(dtype: jnp.dtype, epsilon: float = 1e-5, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with PyTorch's epsilon and variance."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def conv(features: int, kernel: int, dtype: jnp.dtype, name: str | None = None) -> nn.Conv:
    """A convolution that keeps the size."""
    return nn.Conv(
        features, (kernel, kernel), padding=kernel // 2, dtype=dtype, conv_general_dilated=convolve, name=name
    )


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


def upsample_nearest(x: Array, height: int, width: int) -> Array:
    """(B, h, w, C) -> (B, height, width, C): target pixel i reads source pixel floor(i h / height), as PyTorch's."""
    batch, h, w, channels = x.shape
    if (height, width) == (2 * h, 2 * w):  # a broadcast, cheaper than a gather
        x = jnp.broadcast_to(x[:, :, None, :, None], (batch, h, 2, w, 2, channels))
        return x.reshape(batch, height, width, channels)
    return x[:, np.arange(height) * h // height][:, :, np.arange(width) * w // width]


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut (diffusers' ResnetBlock2D): (B, h, w, C) -> features."""

    features: int
    groups: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, time: Array | None = None) -> Array:
        """time (B, T) is the time embedding; the VAE has none."""
        y = nn.silu(group_norm(self.groups, self.epsilon, self.dtype, "norm1")(x))
        y = conv(self.features, 3, self.dtype, "conv1")(y)
        if time is not None:
            shift = nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))
            y = y + match_rows(shift, y.shape[0])[:, None, None]
        y = nn.silu(group_norm(self.groups, self.epsilon, self.dtype, "norm2")(y))
        y = conv(self.features, 3, self.dtype, "conv2")(y)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.dtype, "conv_shortcut")(x)
        return x + y


class Downsample(nn.Module):
    """Halves the size with a strided convolution. `padding` is ((top, bottom), (left, right)): the UNet pads 1 on every
    side, the VAE only below and right."""

    features: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Conv(self.features, (3, 3), strides=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest neighbours to the given size, then a convolution."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, height: int, width: int) -> Array:
        return conv(self.features, 3, self.dtype, "conv")(upsample_nearest(x, height, width))
