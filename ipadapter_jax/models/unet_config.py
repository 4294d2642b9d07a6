"""The configuration of a Stable Diffusion UNet (1.x, 2.x, XL), and its cross-attention layers."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.config_fields import added_setting, build_config, select_fields

if TYPE_CHECKING:  # the command line reads layers before it imports jax
    from ipadapter_jax.runtime.trees import Params


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of one UNet, in the words of diffusers' config.json; the defaults are SD 1.5."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8  # the NUMBER of heads: a published misnomer
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    transformer_layers_per_block: int | tuple[int, ...] = added_setting(1)
    use_linear_projection: bool = added_setting(False)
    addition_embed_type: str | None = added_setting(None)  # "text_time" for SDXL
    addition_time_embed_dim: int | None = added_setting(None)
    projection_class_embeddings_input_dim: int | None = added_setting(None)
    sample_size: int | tuple[int, ...] | None = 64  # (h, w) of the latents it was trained on

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> "UNetConfig":
        """From diffusers' unet/config.json. Raises InputError for a setting that this family does not have."""
        found = select_fields(cls, raw, what="UNet", fixed=_FIXED, ignored=_IGNORED)
        config: UNetConfig = build_config(cls, {"sample_size": None} | found, "UNet")
        levels = len(config.block_out_channels)
        if {len(config.down_block_types), len(config.up_block_types)} != {levels}:
            raise InputError(
                f"UNet config: {levels} block_out_channels need as many down_block_types and up_block_types"
            )
        if isinstance(config.sample_size, tuple) and len(config.sample_size) != 2:
            raise InputError(
                f"UNet config: sample_size={config.sample_size} is not usable, it must be height and width"
            )
        for kind in config.down_block_types + config.up_block_types:
            if kind not in ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"):
                raise InputError(f"UNet config: block type {kind!r} is not supported")
        for name in ("attention_head_dim", "transformer_layers_per_block"):
            value = getattr(config, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise InputError(f"UNet config: {levels} block_out_channels need as many values of {name}, not {value}")
        _check_added_conditioning(config)
        return config

    def heads(self, level: int) -> int:
        """The number of attention heads at a resolution level; 0 is the finest."""
        return self.attention_head_dim if isinstance(self.attention_head_dim, int) else self.attention_head_dim[level]

    def transformer_layers(self, level: int) -> int:
        """The number of layers of each transformer at a resolution level."""
        depth = self.transformer_layers_per_block
        return depth if isinstance(depth, int) else depth[level]

    @property
    def pooled_dim(self) -> int | None:
        """Width of the pooled text that conditions the time embedding, or None where nothing but time does."""
        if self.addition_embed_type is None:
            return None
        return (self.projection_class_embeddings_input_dim or 0) - TIME_IDS * (self.addition_time_embed_dim or 0)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Channels of one attention head, for every resolution level."""
        return tuple(width // self.heads(level) for level, width in enumerate(self.block_out_channels))

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)


TIME_IDS = 6
"""Numbers that SDXL is conditioned on: height and width of the original image, top and left of the crop, height and
width of the target image."""


def _check_added_conditioning(config: UNetConfig) -> None:
    if config.addition_embed_type not in (None, "text_time"):
        kind = config.addition_embed_type
        raise InputError(f"UNet config: addition_embed_type={kind!r} is not supported, only None or 'text_time'")
    pooled = config.pooled_dim
    if pooled is not None and (pooled < 1 or not config.addition_time_embed_dim or config.addition_time_embed_dim % 2):
        raise InputError(
            f"UNet config: projection_class_embeddings_input_dim={config.projection_class_embeddings_input_dim} is not "
            f"usable, it must be the width of the pooled text and {TIME_IDS} times addition_time_embed_dim="
            f"{config.addition_time_embed_dim}, which must be even"
        )


_FIXED = {
    "act_fn": ("silu",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "addition_embed_type_num_heads": (64,),
}
# upcast_attention: products of queries and keys are float32 here in every dtype.
_IGNORED = {"dropout", "upcast_attention", "split_head_dim", "use_memory_efficient_attention"}


@dataclasses.dataclass(frozen=True)
class CrossAttentionLayer:
    """A cross-attention layer: the name of its block, the index of its transformer among the block's `attentions`, the
    index of its layer in that transformer, its width C, and its resolution level, of which 0 is the finest."""

    block: str
    attention: int
    layer: int
    width: int
    level: int

    def subtree(self, tree: "Params") -> "Params":
        """The part of a collection of the UNet's variables, such as its parameters, that belongs to this layer."""
        return tree[self.block][f"attentions_{self.attention}"][f"transformer_blocks_{self.layer}"]["attn2"]


def cross_attention_layers(config: UNetConfig) -> tuple[CrossAttentionLayer, ...]:
    """All cross-attention layers in the order of weight files: down, up, mid, as diffusers registers its processors."""
    layers = []
    for level, kind in enumerate(config.down_block_types):
        if kind == "CrossAttnDownBlock2D":
            layers += _of_block(config, f"down_blocks_{level}", level, config.layers_per_block)
    for block, kind in enumerate(config.up_block_types):
        if kind == "CrossAttnUpBlock2D":
            level = config.levels - 1 - block
            layers += _of_block(config, f"up_blocks_{block}", level, config.layers_per_block + 1)
    return (*layers, *_of_block(config, "mid_block", config.levels - 1, 1))


def _of_block(config: UNetConfig, block: str, level: int, attentions: int) -> list[CrossAttentionLayer]:
    width = config.block_out_channels[level]
    layers = range(config.transformer_layers(level))
    return [CrossAttentionLayer(block, i, layer, width, level) for i in range(attentions) for layer in layers]


def attention_grids(config: UNetConfig, h: int, w: int) -> list[tuple[int, int]]:
    """For each cross-attention layer, the height and width of its queries, given latents of h x w. Each level halves
    them, rounded up."""
    return [(-(-h // 2**layer.level), -(-w // 2**layer.level)) for layer in cross_attention_layers(config)]
