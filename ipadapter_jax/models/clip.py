"""CLIP's text and vision transformers (arXiv 2103.00020) with the parameter names of transformers' Flax CLIP."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.config_fields import added_setting, build_config
from ipadapter_jax.models.image_features import FeatureKind
from ipadapter_jax.models.layers import ACTIVATIONS, Conv, Dense, Embed, layer_norm
from ipadapter_jax.ops.attention import AttentionBranch, attend
from ipadapter_jax.ops.fast_params import SkipShapeCheck


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The settings of a text encoder. The defaults are those of CLIP ViT-L/14, which Stable Diffusion 1.5 uses."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int | None = 49407
    projection_dim: int | None = added_setting(None)  # of the pooled state, where the encoder projects it

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> "CLIPTextConfig":
        """From the config.json of transformers' CLIPTextModel. Raises InputError for what is not supported."""
        return _from_json(cls, {**raw, "projection_dim": None}, _TEXT_DEFAULTS, "text encoder")

    @classmethod
    def with_projection(cls, raw: Mapping[str, object]) -> "CLIPTextConfig":
        """From the config.json of transformers' CLIPTextModelWithProjection. Raises InputError likewise."""
        projected = {"projection_dim": _VISION_DEFAULTS["projection_dim"]}
        return _from_json(cls, raw, _TEXT_DEFAULTS | projected, "text encoder")


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The settings of an image encoder. The defaults are those of OpenCLIP ViT-H/14, which IP-Adapter uses."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    projection_dim: int = 1024
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> "CLIPVisionConfig":
        """From transformers' config.json of a vision model or of a whole CLIP. Raises InputError likewise."""
        vision = raw.get("vision_config")
        whole = {**raw, **vision} if isinstance(vision, Mapping) else raw
        return _from_json(cls, whole, _VISION_DEFAULTS, "image encoder")

    @property
    def num_positions(self) -> int:
        """The length L of the sequence: the class token and the patches."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The settings of a whole CLIP. Both encoders project to embeddings of length P = `vision.projection_dim`."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> "CLIPConfig":
        """From config.json of transformers' CLIPModel. Raises InputError if the settings of an encoder are missing."""
        text, vision = raw.get("text_config"), raw.get("vision_config")
        if not isinstance(text, Mapping) or not isinstance(vision, Mapping):
            half = "vision" if isinstance(text, Mapping) else "text"
            raise InputError(
                f"no whole CLIP model, for there is no {half}_config; give one with both encoders, such as "
                "openai/clip-vit-large-patch14"
            )
        # text_config and vision_config may each have a projection_dim, which transformers' CLIPModel ignores.
        projection = {"projection_dim": raw.get("projection_dim", _VISION_DEFAULTS["projection_dim"])}
        return cls(CLIPTextConfig.from_json(text), CLIPVisionConfig.from_json({**vision, **projection}))


_Config = TypeVar("_Config", CLIPTextConfig, CLIPVisionConfig)

# transformers' defaults, for settings that a published config.json leaves out: the sizes of ViT-B/32.
_SHARED = {"num_hidden_layers": 12, "hidden_act": "quick_gelu"}
_TEXT_DEFAULTS = {**_SHARED, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_VISION_DEFAULTS = {
    **_SHARED,
    **{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    **{"projection_dim": 512, "patch_size": 32},
}


def _from_json(cls: type[_Config], raw: Mapping[str, object], defaults: Mapping[str, object], what: str) -> _Config:
    given = {field.name: raw[field.name] for field in dataclasses.fields(cls) if field.name in raw}
    config = build_config(cls, {**defaults, **given}, what)
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"{what} config: hidden_act={config.hidden_act!r}, known are {', '.join(ACTIVATIONS)}")
    if not config.num_attention_heads or config.hidden_size % config.num_attention_heads:
        raise InputError(f"{what} config: {config.num_attention_heads} heads do not divide width {config.hidden_size}")
    return config


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
