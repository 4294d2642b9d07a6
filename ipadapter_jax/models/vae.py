"""The KL autoencoder between images and latents (diffusers' AutoencoderKL), channels-last.

Latents in and latents out are those that the sampler uses: `scaling_factor` is applied here and nowhere else. Only a
`Posterior` is unscaled.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.config_fields import build_config, select_fields
from ipadapter_jax.models.layers import Dense, Downsample, ResnetBlock, Upsample, conv, group_norm
from ipadapter_jax.ops.attention import AttentionBranch, attend

_EPSILON = 1e-6  # of every norm in the VAE
_Images = TypeVar("_Images", np.ndarray, Array)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The configuration of a VAE. The defaults are those of Stable Diffusion 1.5."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> "VAEConfig":
        """From diffusers' vae/config.json. Raises InputError for a setting that this family does not have."""
        channels = {"block_out_channels": raw.get("block_out_channels", cls.block_out_channels)}
        levels = len(build_config(cls, channels, "VAE").block_out_channels)
        fixed = {
            "act_fn": ("silu",),
            "down_block_types": (("DownEncoderBlock2D",) * levels,),
            "up_block_types": (("UpDecoderBlock2D",) * levels,),
            "mid_block_add_attention": (True,),
            "use_quant_conv": (True,),
            "use_post_quant_conv": (True,),
        }
        found = select_fields(cls, raw, what="VAE", fixed=fixed, ignored={"sample_size", "force_upcast"})
        config: VAEConfig = build_config(cls, found, "VAE")
        if config.scaling_factor <= 0:
            raise InputError(f"VAE config: scaling_factor={config.scaling_factor} must be positive")
        return config

    @property
    def downscale(self) -> int:
        """The number of pixels for each latent position, along one axis."""
        return 2 ** (len(self.block_out_channels) - 1)


def normalize(pixels: _Images) -> _Images:
    """Pixels from 0 to 255, of any shape -> float32 in [-1, 1], the VAE's input."""
    return pixels.astype(np.float32) / 127.5 - 1


def denormalize(images: _Images) -> _Images:
    """The VAE's output, about [-1, 1] -> images clipped to [0, 1]."""
    return (images / 2 + 0.5).clip(0, 1)


class Posterior(NamedTuple):
    """The normal distribution of each image's latents, before scaling: the output of the encoder, which the feature
    cache stores. Both (B, h, w, C) float32."""

    mean: Array
    log_variance: Array


class VAE(nn.Module):
    """Images (B, H, W, 3) in [-1, 1] to scaled latents (B, h, w, C) and back."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        latent = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = conv(2 * latent, 1, self.dtype)
        self.post_quant_conv = conv(latent, 1, self.dtype)

    def encode(self, images: Array, noise: Array) -> Array:
        """Latents (B, h, w, C) float32, one sample of each image's posterior; noise (B, h, w, C) is standard normal.
        One image broadcasts against noise for several."""
        return self.sample(self.posterior(images), noise)

    def posterior(self, images: Array) -> Posterior:
        """The posterior of each image, unscaled."""
        moments = self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))

    @nn.nowrap
    def sample(self, posterior: Posterior, noise: Array | float) -> Array:
        """Latents of a posterior for standard normal noise (B, h, w, C), or of its mean for noise 0. Needs no
        parameters, so it is called on the module itself."""
        mean, log_variance = posterior
        return self.config.scaling_factor * (mean + jnp.exp(0.5 * log_variance) * noise)

    def decode(self, latents: Array) -> Array:
        """latents (B, h, w, C) -> images (B, H, W, 3) float32, about [-1, 1] and not clipped."""
        latents = latents / self.config.scaling_factor
        return self.decoder(self.post_quant_conv(latents.astype(self.dtype))).astype(jnp.float32)

    def __call__(self, images: Array) -> Array:
        """Reconstructs images from the means of their posteriors: touches every parameter, so it also initializes."""
        return self.decode(self.sample(self.posterior(images), 0.0))


class Encoder(nn.Module):
    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, channels = self.config, self.config.block_out_channels
        x = conv(channels[0], 3, self.dtype, "conv_in")(x)
        for level, width in enumerate(channels):
            x = DownBlock(config, width, level < len(channels) - 1, self.dtype, name=f"down_blocks_{level}")(x)
        x = MidBlock(config, self.dtype, name="mid_block")(x)
        x = nn.silu(group_norm(config.norm_num_groups, _EPSILON, self.dtype, "conv_norm_out")(x))
        return conv(2 * config.latent_channels, 3, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, channels = self.config, self.config.block_out_channels[::-1]
        x = conv(channels[0], 3, self.dtype, "conv_in")(x)
        x = MidBlock(config, self.dtype, name="mid_block")(x)
        for block, width in enumerate(channels):
            x = UpBlock(config, width, block < len(channels) - 1, self.dtype, name=f"up_blocks_{block}")(x)
        x = nn.silu(group_norm(config.norm_num_groups, _EPSILON, self.dtype, "conv_norm_out")(x))
        return conv(config.out_channels, 3, self.dtype, "conv_out")(x)


class DownBlock(nn.Module):
    config: VAEConfig
    width: int
    downsamples: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.config.layers_per_block):
            x = _resnet(self.config, self.width, self.dtype, f"resnets_{i}")(x)
        if self.downsamples:
            x = Downsample(self.width, ((0, 1), (0, 1)), self.dtype, name="downsamplers_0")(x)
        return x


class UpBlock(nn.Module):
    config: VAEConfig
    width: int
    upsamples: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.config.layers_per_block + 1):
            x = _resnet(self.config, self.width, self.dtype, f"resnets_{i}")(x)
        if self.upsamples:
            x = Upsample(self.width, self.dtype, name="upsamplers_0")(x, 2 * x.shape[1], 2 * x.shape[2])
        return x


class MidBlock(nn.Module):
    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = self.config.block_out_channels[-1]
        x = _resnet(self.config, width, self.dtype, "resnets_0")(x)
        x = Attention(self.config, self.dtype, name="attentions_0")(x)
        return _resnet(self.config, width, self.dtype, "resnets_1")(x)


class Attention(nn.Module):
    """Self-attention over all positions with a single head."""

    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, *_, width = x.shape
        y = group_norm(self.config.norm_num_groups, _EPSILON, self.dtype, "group_norm")(x).reshape(batch, -1, width)
        q, k, v = (Dense(width, dtype=self.dtype, name=name)(y) for name in ("query", "key", "value"))
        y = Dense(width, dtype=self.dtype, name="proj_attn")(attend(q, [AttentionBranch(k, v)], num_heads=1))
        return x + y.reshape(x.shape)


def _resnet(config: VAEConfig, width: int, dtype: jnp.dtype, name: str) -> ResnetBlock:
    return ResnetBlock(width, config.norm_num_groups, _EPSILON, dtype, name=name)
