"""The configurations of CLIP's text and vision transformers."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.config_fields import added_setting, build_config
from ipadapter_jax.models.layers import ACTIVATIONS


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
