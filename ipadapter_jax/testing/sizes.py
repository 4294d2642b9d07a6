"""Sizes of models for tests and benchmarks: Stable Diffusion 1.5's own, and three small ones that have its parts."""

import dataclasses
from collections.abc import Mapping

from ipadapter_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class ModelConfigs:
    """The configurations of all networks of a base model and of the image encoder that its adapters need."""

    unet: UNetConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig
    image_encoder: CLIPVisionConfig


FULL = ModelConfigs(UNetConfig(), VAEConfig(), CLIPTextConfig(eos_token_id=2), CLIPVisionConfig())
TINY = ModelConfigs(
    UNetConfig(block_out_channels=(32, 64, 64, 64), layers_per_block=1, cross_attention_dim=64, sample_size=32),
    VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
    CLIPTextConfig(514, 64, 128, 2, 4, eos_token_id=513),
    CLIPVisionConfig(64, 128, 64, 3, 4, patch_size=32),
)
MICRO = ModelConfigs(
    UNetConfig(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        sample_size=16,
    ),
    VAEConfig(block_out_channels=(32, 32), layers_per_block=1),
    CLIPTextConfig(514, 32, 64, 1, 2, eos_token_id=513),
    CLIPVisionConfig(32, 64, 32, 2, 2, image_size=32, patch_size=16),
)
NANO = ModelConfigs(  # one level: the smallest model that has every part
    UNetConfig(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        sample_size=8,
    ),
    VAEConfig(block_out_channels=(32,), layers_per_block=1),
    MICRO.text_encoder,
    MICRO.image_encoder,
)
SIZES: Mapping[str, ModelConfigs] = {"nano": NANO, "micro": MICRO, "tiny": TINY, "full": FULL}
