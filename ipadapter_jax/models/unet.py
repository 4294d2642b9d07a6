"""The Stable Diffusion 1.x UNet, channels-last, with keys and values of the cross-attentions as arguments.

K and V of a cross-attention depend on the prompt and not on the UNet's state, so the caller computes them once per
prompt (`text_kv`) and once per image (models/adapter.py) and an image prompt needs no other UNet. Parameter names are
those of the published Flax trees.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.errors import InputError
from ipadapter_jax.models.attention import Entry
from ipadapter_jax.models.layers import (
    Downsample,
    ResnetBlock,
    Upsample,
    conv,
    group_norm,
    match_rows,
    timestep_embedding,
)
from ipadapter_jax.models.transformer import KeyValue, Transformer
from ipadapter_jax.settings import pick, typed


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of one UNet of the Stable Diffusion 1.x family; the defaults are SD 1.5."""

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
    sample_size: int | tuple[int, ...] | None = 64  # (h, w) of the latents it was trained on

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "UNetConfig":
        """From diffusers' unet/config.json. Raises InputError for what this family does not have."""
        found = pick(cls, raw, what="UNet", fixed=_FIXED, ignored=_IGNORED)
        config: UNetConfig = typed(cls, {"sample_size": None} | found, "UNet")
        levels = len(config.block_out_channels)
        if {len(config.down_block_types), len(config.up_block_types)} != {levels}:
            raise InputError(
                f"UNet config: {levels} block_out_channels need as many down_block_types and up_block_types"
            )
        for kind in config.down_block_types + config.up_block_types:
            if kind not in ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"):
                raise InputError(f"UNet config: block type {kind!r} is not supported")
        return config

    def heads(self, level: int) -> int:
        """Attention heads at a resolution level, 0 being the finest."""
        return self.attention_head_dim if isinstance(self.attention_head_dim, int) else self.attention_head_dim[level]

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)


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
    "transformer_layers_per_block": (1,),
    "use_linear_projection": (False,),
    "addition_embed_type_num_heads": (64,),
}
_IGNORED = {"dropout", "split_head_dim", "use_memory_efficient_attention"}


@dataclasses.dataclass(frozen=True)
class Site:
    """One cross-attention: its block's name, its number inside the block, its width C, its level of resolution, 0 being
    the finest."""

    block: str
    index: int
    width: int
    level: int


def cross_attention_sites(config: UNetConfig) -> tuple[Site, ...]:
    """All cross-attentions in file order: down, up, mid (the order in which diffusers registers its processors)."""
    sites = []
    for level, kind in enumerate(config.down_block_types):
        if kind == "CrossAttnDownBlock2D":
            width = config.block_out_channels[level]
            sites += [Site(f"down_blocks_{level}", i, width, level) for i in range(config.layers_per_block)]
    for block, kind in enumerate(config.up_block_types):
        if kind == "CrossAttnUpBlock2D":
            width = config.block_out_channels[::-1][block]
            level = config.levels - 1 - block
            sites += [Site(f"up_blocks_{block}", i, width, level) for i in range(config.layers_per_block + 1)]
    return (*sites, Site("mid_block", 0, config.block_out_channels[-1], config.levels - 1))


def site_grids(config: UNetConfig, h: int, w: int) -> list[tuple[int, int]]:
    """Per site the rows and columns of its queries for latents of h x w: every level halves, rounding up."""
    return [(-(-h // 2**site.level), -(-w // 2**site.level)) for site in cross_attention_sites(config)]


class UNet(nn.Module):
    """Predicts the noise (or v) in latents. See `__call__`.

    With `remat` a backward pass keeps the inputs of the resnets and transformers alone and computes their inside again.
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        config, dtype, remat = self.config, self.dtype, self.remat
        channels = config.block_out_channels
        self.conv_in = conv(channels[0], 3, dtype)
        self.time_embedding = TimeEmbedding(4 * channels[0], dtype)
        self.down_blocks = [
            DownBlock(config, level, kind == "CrossAttnDownBlock2D", dtype, remat)
            for level, kind in enumerate(config.down_block_types)
        ]
        self.mid_block = MidBlock(config, dtype, remat)
        self.up_blocks = [
            UpBlock(config, config.levels - 1 - block, kind == "CrossAttnUpBlock2D", dtype, remat)
            for block, kind in enumerate(config.up_block_types)
        ]
        self.conv_norm_out = group_norm(config.norm_num_groups, config.norm_eps, dtype)
        self.conv_out = conv(config.out_channels, 3, dtype)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        text_kv: Sequence[KeyValue],
        image_kv: Sequence[Sequence[KeyValue]] = (),
        image_weight: Array | Sequence = (),
    ) -> Array:
        """latents (B, h, w, 4), timesteps (B,) -> prediction (R, h, w, 4) float32.

        R is the rows of the keys and values, B or a multiple: with two branches of guidance, row b * 2 + g is branch g
        of latent b, and all that comes before the first cross-attention is computed once for both. text_kv holds
        (k, v), each (R, S, C), per site of `cross_attention_sites`. image_kv holds the same for every image entry, and
        image_weight[entry][site] that entry's weight there: a scalar or what broadcasts to (R, L, 1).
        """
        contexts = self._contexts(text_kv, image_kv, image_weight)
        time = self.time_embedding(timestep_embedding(timesteps, self.config.block_out_channels[0]))
        x = self.conv_in(latents.astype(self.dtype))
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time, contexts[str(block.name)])
            skips += outputs
        x = self.mid_block(x, time, contexts["mid_block"])
        for block in self.up_blocks:
            taken = [skips.pop() for _ in range(block.layers)]
            x = block(x, taken, skips[-1].shape if skips else None, time, contexts[str(block.name)])
        assert not skips
        return self.conv_out(nn.silu(self.conv_norm_out(x))).astype(jnp.float32)

    def text_kv(self, text: Array) -> list[KeyValue]:
        """Text states (B, S, D) -> (k, v), each (B, S, C), per site in file order: once per prompt."""
        blocks = {block.name: block for block in (*self.down_blocks, *self.up_blocks, self.mid_block)}
        text = text.astype(self.dtype)
        return [blocks[site.block].attentions[site.index].text_kv(text) for site in cross_attention_sites(self.config)]

    @staticmethod
    def maps_of(collection: Mapping[str, Any], config: UNetConfig) -> list[list[Array]]:
        """The collection "maps" of a call as attention (R, L, N) to the tokens of every image entry, per entry and
        site."""
        sites = cross_attention_sites(config)
        blocks = [collection[site.block][f"attentions_{site.index}"]["transformer_blocks_0"] for site in sites]
        return [list(entry) for entry in zip(*(block["attn2"]["images"] for block in blocks), strict=True)]

    def from_text(self, latents: Array, timesteps: Array, text: Array) -> Array:
        """The plain UNet of text states (B, S, D): touches every parameter, so it also initialises."""
        return self(latents, timesteps, self.text_kv(text))

    def _contexts(self, text_kv, image_kv, image_weight) -> dict[str, Iterator[list[Entry]]]:
        """Per block an iterator over its sites' attention entries: the text first, then every image entry."""
        sites = cross_attention_sites(self.config)
        blocks = (*self.down_blocks, self.mid_block, *self.up_blocks)
        entries: dict[str, list[list[Entry]]] = {str(block.name): [] for block in blocks}
        for s, site in enumerate(sites):
            images = [(*kv[s], weight[s]) for kv, weight in zip(image_kv, image_weight, strict=True)]
            entries[site.block].append([(*text_kv[s], 1.0), *images])
        return {name: iter(block) for name, block in entries.items()}


class TimeEmbedding(nn.Module):
    """Sinusoids (B, C) -> (B, width)."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(self.width, dtype=self.dtype, name="linear_1")(x)
        return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(nn.silu(x))


def _resnet(config: UNetConfig, width: int, dtype: jnp.dtype, remat: bool) -> ResnetBlock:
    kind = nn.remat(ResnetBlock) if remat else ResnetBlock
    return kind(width, config.norm_num_groups, config.norm_eps, dtype)


def _transformer(config: UNetConfig, level: int, dtype: jnp.dtype, remat: bool) -> Transformer:
    kind = nn.remat(Transformer) if remat else Transformer
    return kind(config.block_out_channels[level], config.heads(level), config.norm_num_groups, dtype)


class DownBlock(nn.Module):
    """Resnets, each followed by a transformer where the level has attention, then a halving unless it is the last."""

    config: UNetConfig
    level: int
    attention: bool
    dtype: jnp.dtype
    remat: bool

    def setup(self):
        config, width = self.config, self.config.block_out_channels[self.level]
        layers = range(config.layers_per_block)
        self.resnets = [_resnet(config, width, self.dtype, self.remat) for _ in layers]
        if self.attention:
            self.attentions = [_transformer(config, self.level, self.dtype, self.remat) for _ in layers]
        if self.level < config.levels - 1:
            self.downsamplers = [Downsample(width, ((1, 1), (1, 1)), self.dtype)]

    def __call__(self, x: Array, time: Array, contexts: Iterator[list[Entry]]) -> tuple[Array, list[Array]]:
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attention:
                x = self.attentions[i](x, next(contexts))
            outputs.append(x)
        if self.level < self.config.levels - 1:
            x = self.downsamplers[0](x)
            outputs.append(x)
        return x, outputs


class MidBlock(nn.Module):
    """resnet, transformer, resnet at the coarsest level."""

    config: UNetConfig
    dtype: jnp.dtype
    remat: bool

    def setup(self):
        width = self.config.block_out_channels[-1]
        self.resnets = [_resnet(self.config, width, self.dtype, self.remat) for _ in range(2)]
        self.attentions = [_transformer(self.config, self.config.levels - 1, self.dtype, self.remat)]

    def __call__(self, x: Array, time: Array, contexts: Iterator[list[Entry]]) -> Array:
        x = self.attentions[0](self.resnets[0](x, time), next(contexts))
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One resnet (and transformer) more than on the way down, each fed a skip; then a doubling except at the finest."""

    config: UNetConfig
    level: int
    attention: bool
    dtype: jnp.dtype
    remat: bool

    def setup(self):
        config, width = self.config, self.config.block_out_channels[self.level]
        self.resnets = [_resnet(config, width, self.dtype, self.remat) for _ in range(self.layers)]
        if self.attention:
            self.attentions = [_transformer(config, self.level, self.dtype, self.remat) for _ in range(self.layers)]
        if self.level > 0:
            self.upsamplers = [Upsample(width, self.dtype)]

    @property
    def layers(self) -> int:
        return self.config.layers_per_block + 1

    def __call__(
        self,
        x: Array,
        skips: Sequence[Array],
        next_skip: tuple[int, ...] | None,
        time: Array,
        contexts: Iterator[list[Entry]],
    ) -> Array:
        """next_skip is the shape (B, h, w, C) of the next block's first skip: odd sizes do not double exactly."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = resnet(jnp.concatenate([x, match_rows(skip, x.shape[0])], axis=-1), time)
            if self.attention:
                x = self.attentions[i](x, next(contexts))
        return x if next_skip is None else self.upsamplers[0](x, *next_skip[1:3])
