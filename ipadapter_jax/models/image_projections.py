"""Image projections: networks from CLIP's image features to the image tokens (B, N, D) of an image prompt.

`ip_adapter.py` computes keys and values from the tokens. Parameters are named as in the authors' files, with
`_<number>` instead of `.<number>`: `proj.0` is `proj_0`.
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
    """The image projection of a variant, without its parameters."""
    return {"base": ImageProj, "plus": Resampler, "full": MLPProj}[config.variant](config, dtype)


class ImageProj(nn.Module):
    """Base and light adapters: a linear layer and a norm (paper, section 3.2.1).

    Takes the image embedding (B, F) before L2 normalization, gives tokens (B, N, D).
    """

    config: ImageProjConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        n, d = self.config.num_tokens, self.config.cross_attention_dim
        x = Dense(n * d, dtype=self.dtype, name="proj")(features.astype(self.dtype))
        return layer_norm(self.dtype, name="norm")(x.reshape(-1, n, d))


class MLPProj(nn.Module):
    """Full adapters: an MLP of two layers at every position.

    Takes the penultimate hidden states (B, L, F), gives a token for each position, (B, L, D).
    """

    config: ImageProjConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x = Dense(self.config.feature_dim, dtype=self.dtype, name="proj_0")(features.astype(self.dtype))
        x = Dense(self.config.cross_attention_dim, dtype=self.dtype, name="proj_2")(gelu(x))
        return layer_norm(self.dtype, name="proj_3")(x)


class Resampler(SkipShapeCheck, nn.Module):
    """Plus adapters: learned queries that attend to the hidden states, as in Perceiver (paper, section 4.4.2).

    Takes the penultimate hidden states (B, L, F), gives tokens (B, N, D).
    """

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
    """Queries from the latents (B, N, D); keys and values from the image's states (B, L, D) and the latents.

    Gives what is added to the latents, (B, N, D).
    """

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
    """The shape and dtype of one image's features, to initialize or check a projection with."""
    shape = (1, config.num_tokens, config.feature_dim) if config.feature_kind.has_positions else (1, config.feature_dim)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


Projection = ImageProj | MLPProj | Resampler
