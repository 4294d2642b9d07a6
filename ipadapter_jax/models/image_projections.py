"""Image projections: from CLIP's image features to the image tokens (B, N, D) that become keys and values.

Parameter names are those of the authors' files, every `.<number>` written `_<number>`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.models.image_proj_config import HEAD_DIM, ImageProjConfig
from ipadapter_jax.models.layers import Dense, gelu, layer_norm
from ipadapter_jax.ops.attention import AttentionBranch, attend
from ipadapter_jax.ops.fast_params import SkipShapeCheck


def image_projection(config: ImageProjConfig, dtype: jnp.dtype = jnp.float32) -> "Projection":
    """The projection network of a variant."""
    return {"base": ImageProj, "plus": Resampler, "full": MLPProj}[config.variant](config, dtype)


class ImageProj(nn.Module):
    """One linear layer and a norm: the global embedding (B, F), not normalised, -> (B, N, D). Paper, section 3.2.1."""

    config: ImageProjConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        n, d = self.config.num_tokens, self.config.cross_attention_dim
        x = Dense(n * d, dtype=self.dtype, name="proj")(features.astype(self.dtype))
        return layer_norm(self.dtype, name="norm")(x.reshape(-1, n, d))


class MLPProj(nn.Module):
    """A two-layer perceptron on every position: penultimate states (B, L, F) -> (B, L, D)."""

    config: ImageProjConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x = Dense(self.config.feature_dim, dtype=self.dtype, name="proj_0")(features.astype(self.dtype))
        x = Dense(self.config.cross_attention_dim, dtype=self.dtype, name="proj_2")(gelu(x))
        return layer_norm(self.dtype, name="proj_3")(x)


class Resampler(SkipShapeCheck, nn.Module):
    """Learnt queries that read the penultimate states: (B, L, F) -> (B, N, D). Paper, section 4.4.2."""

    config: ImageProjConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        config, width = self.config, self.config.hidden_dim
        initial = nn.initializers.normal(width**-0.5)
        latents = self.param("latents", initial, (1, config.num_tokens, width)).astype(self.dtype)
        latents = jnp.broadcast_to(latents, (features.shape[0], *latents.shape[1:]))
        x = Dense(width, dtype=self.dtype, name="proj_in")(features.astype(self.dtype))
        for i in range(config.depth):
            latents = latents + PerceiverAttention(width, config.heads, self.dtype, name=f"layers_{i}_0")(x, latents)
            y = layer_norm(self.dtype, name=f"layers_{i}_1_0")(latents)
            y = Dense(config.ff_mult * width, use_bias=False, dtype=self.dtype, name=f"layers_{i}_1_1")(y)
            latents = latents + Dense(width, use_bias=False, dtype=self.dtype, name=f"layers_{i}_1_3")(gelu(y))
        y = Dense(config.cross_attention_dim, dtype=self.dtype, name="proj_out")(latents)
        return layer_norm(self.dtype, name="norm_out")(y)


class PerceiverAttention(nn.Module):
    """The latents (B, N, D) attend to the image's states (B, L, D) and to themselves."""

    width: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, latents: Array) -> Array:
        inner = self.heads * HEAD_DIM
        x, y = layer_norm(self.dtype, name="norm1")(x), layer_norm(self.dtype, name="norm2")(latents)
        q = Dense(inner, use_bias=False, dtype=self.dtype, name="to_q")(y)
        kv = Dense(2 * inner, use_bias=False, dtype=self.dtype, name="to_kv")(jnp.concatenate([x, y], axis=1))
        k, v = jnp.split(kv, 2, axis=-1)
        return Dense(self.width, use_bias=False, dtype=self.dtype, name="to_out")(
            attend(q, [AttentionBranch(k, v)], self.heads)
        )


def example_features(config: ImageProjConfig) -> jax.ShapeDtypeStruct:
    """The shape of one image's features, to initialise or to check with."""
    shape = (1, config.num_tokens, config.feature_dim) if config.feature_kind.has_positions else (1, config.feature_dim)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


Projection = ImageProj | MLPProj | Resampler
