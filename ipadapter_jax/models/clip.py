"""CLIP's text and vision transformers (arXiv 2103.00020) with the parameter names of transformers' Flax CLIP."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.models.image_features import FeatureKind
from ipadapter_jax.models.layers import ACTIVATIONS, Conv, Dense, Embed, layer_norm
from ipadapter_jax.ops.attention import AttentionBranch, attend
from ipadapter_jax.ops.fast_params import SkipShapeCheck


class TextOutput(NamedTuple):
    """The output of a text encoder."""

    last_hidden_state: Array  # (B, S, D), after the final norm
    pooled: Array  # (B, D): its state at the end-of-text token
    hidden_states: tuple[Array, ...]  # (B, S, D) each: the embeddings, then the output of every layer
    text_embeds: Array | None = None  # (B, P): `pooled`, projected, where the encoder has a projection


class VisionOutput(NamedTuple):
    """The output of an image encoder."""

    image_embeds: Array  # (B, P): the projected embedding; base and light adapters read it
    hidden_states: tuple[Array, ...]  # (B, L, D) each, before the post norm; plus and full adapters read [-2]


def clip_features(output: VisionOutput, kind: FeatureKind) -> Array:
    """The image features of this kind, (B, F) or (B, L, F), from the output of an image encoder."""
    return output.hidden_states[-2] if kind is FeatureKind.PENULTIMATE_STATES else output.image_embeds


class CLIPText(nn.Module):
    """Token ids (B, S) -> TextOutput. The parameters are under `text_model` and `text_projection`, as in
    transformers."""

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids: Array, skip: int = 0) -> TextOutput:
        """`skip`: the number of last layers whose output is not used (clip skip)."""
        output = TextTransformer(self.config, self.dtype, name="text_model")(input_ids, skip)
        if self.config.projection_dim is None:
            return output
        project = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
        return output._replace(text_embeds=project(output.pooled))


class TextTransformer(nn.Module):
    config: CLIPTextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, input_ids: Array, skip: int) -> TextOutput:
        config = self.config
        states = Encoder(config, causal=True, dtype=self.dtype, name="encoder")(
            TextEmbeddings(config, self.dtype, name="embeddings")(input_ids)
        )
        last = layer_norm(self.dtype, config.layer_norm_eps, "final_layer_norm")(states[-1 - skip])
        # Published configs have eos_token_id 2 by mistake. The end-of-text token then is the one with the largest id.
        end = input_ids if config.eos_token_id in (None, 2) else (input_ids == config.eos_token_id)
        pooled = jnp.take_along_axis(last, end.argmax(-1)[:, None, None], axis=1)[:, 0]
        return TextOutput(last, pooled, states)


class TextEmbeddings(nn.Module):
    config: CLIPTextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, input_ids: Array) -> Array:
        config = self.config
        tokens = Embed(config.vocab_size, config.hidden_size, dtype=self.dtype, name="token_embedding")
        positions = Embed(
            config.max_position_embeddings, config.hidden_size, dtype=self.dtype, name="position_embedding"
        )
        return tokens(input_ids) + positions(jnp.arange(input_ids.shape[1]))[None]


class CLIPVision(nn.Module):
    """Normalized pixels (B, H, W, 3) -> VisionOutput. Parameters are under `vision_model` and `visual_projection`."""

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: Array) -> VisionOutput:
        states = VisionTransformer(self.config, self.dtype, name="vision_model")(pixel_values)
        project = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")
        return VisionOutput(project(states.pooled), states.hidden_states)


class VisionStates(NamedTuple):
    """pooled (B, D): the class token after the post norm; hidden_states as in VisionOutput."""

    pooled: Array
    hidden_states: tuple[Array, ...]


class VisionTransformer(nn.Module):
    config: CLIPVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixel_values: Array) -> VisionStates:
        config = self.config
        x = VisionEmbeddings(config, self.dtype, name="embeddings")(pixel_values)
        x = layer_norm(self.dtype, config.layer_norm_eps, "pre_layrnorm")(x)  # sic: the published name
        states = Encoder(config, causal=False, dtype=self.dtype, name="encoder")(x)
        pooled = layer_norm(self.dtype, config.layer_norm_eps, "post_layernorm")(states[-1][:, 0])
        return VisionStates(pooled, states)


class VisionEmbeddings(SkipShapeCheck, nn.Module):
    config: CLIPVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixel_values: Array) -> Array:
        config, patch, width = self.config, self.config.patch_size, self.config.hidden_size
        embed = Conv(width, (patch, patch), patch, "VALID", use_bias=False, dtype=self.dtype, name="patch_embedding")
        x = embed(pixel_values.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, width)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, width)), x], axis=1)
        positions = Embed(config.num_positions, width, dtype=self.dtype, name="position_embedding")
        return x + positions(jnp.arange(config.num_positions))[None]


class CLIPEmbeddings(NamedTuple):
    """Embeddings (B, P) of images and of texts in one space. They are not normalized."""

    images: Array
    texts: Array


class CLIP(nn.Module):
    """A whole CLIP: `images` and `texts` give embeddings in one space. The parameters are named as in transformers."""

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.text_model = TextTransformer(self.config.text, self.dtype)
        self.vision_model = VisionTransformer(self.config.vision, self.dtype)
        projections = (Dense(self.config.vision.projection_dim, use_bias=False, dtype=self.dtype) for _ in range(2))
        self.text_projection, self.visual_projection = projections

    def __call__(self, pixel_values: Array, input_ids: Array) -> CLIPEmbeddings:
        return CLIPEmbeddings(self.images(pixel_values), self.texts(input_ids))

    def images(self, pixel_values: Array) -> Array:
        """Normalized pixels (B, H, W, 3) -> embeddings (B, P), not normalized."""
        return self.visual_projection(self.vision_model(pixel_values).pooled)

    def texts(self, input_ids: Array) -> Array:
        """Token ids (B, S) -> embeddings (B, P), not normalized."""
        return self.text_projection(self.text_model(input_ids, 0).pooled)


class Encoder(nn.Module):
    """Embeddings (B, L, D) -> hidden states (B, L, D): the embeddings, then the output of every layer."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        return Layers(self.config, self.causal, self.dtype, name="layers")(x)


class Layers(nn.Module):
    """The layers of `Encoder`. It is a module so that parameters have the published names `encoder/layers/0/...`."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(Layer(self.config, self.causal, self.dtype, name=str(i))(states[-1]))
        return tuple(states)


class Layer(nn.Module):
    """A transformer layer: self-attention, then an MLP, each with a norm before it and a residual connection."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        y = layer_norm(self.dtype, config.layer_norm_eps, "layer_norm1")(x)
        x = x + Attention(config, self.causal, self.dtype, name="self_attn")(y)
        y = layer_norm(self.dtype, config.layer_norm_eps, "layer_norm2")(x)
        return x + MLP(config, self.dtype, name="mlp")(y)


class Attention(nn.Module):
    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = self.config.hidden_size
        q, k, v = (Dense(width, dtype=self.dtype, name=name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        y = attend(q, [AttentionBranch(k, v)], self.config.num_attention_heads, causal=self.causal)
        return Dense(width, dtype=self.dtype, name="out_proj")(y)


class MLP(nn.Module):
    config: CLIPTextConfig | CLIPVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return Dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(ACTIVATIONS[self.config.hidden_act](x))
