"""The Stable Diffusion UNet (1.x, 2.x, XL), channels-last, with keys and values of the cross-attentions as arguments.

Keys and values of a cross-attention layer depend on the prompt and not on the UNet's state. So the caller computes
them once per prompt (`text_kv`) and once per image (models/ip_adapter.py), and image prompts need no other UNet. What
depends on the timestep alone is an argument too, for callers that know all timesteps in advance (`time_shifts`).
Parameter names are those of the published Flax trees.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.models.layers import (
    Dense,
    Downsample,
    ResnetBlock,
    Upsample,
    conv,
    group_norm,
    match_rows,
    timestep_embedding,
)
from ipadapter_jax.models.transformer import Transformer
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.ops.attention import AttentionBranch, KeyValue
from ipadapter_jax.runtime.trees import Params

Contexts = Sequence[Sequence[Sequence[AttentionBranch]]]
"""What a block's cross-attentions attend to: [attention][layer], the text first, then every image branch."""


class UNetResiduals(NamedTuple):
    """What another network, such as a ControlNet, adds inside the UNet: to each skip connection in the order in which
    the UNet makes them, and to the middle block's output. All are (R, h, w, C), R the UNet's batch, or (1, h, w, C)."""

    skips: Sequence[Array]
    mid: Array


class AddedConditioning(NamedTuple):
    """What conditions SDXL's time embedding next to the timestep."""

    pooled: Array  # (..., D), the pooled text
    time_ids: Array  # (..., 6) float32: original height and width, top and left of the crop, target height and width


class UNet(nn.Module):
    """Predicts the noise (or v) in latents. See `__call__`.

    With `remat` the resnets and transformers are rematerialized in the backward pass, which keeps only their inputs.
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        config, dtype, remat = self.config, self.dtype, self.remat
        channels = config.block_out_channels
        self.conv_in = conv(channels[0], 3, dtype)
        self.time_embedding = TimeEmbedding(4 * channels[0], dtype)
        if config.addition_embed_type is not None:
            self.add_embedding = TimeEmbedding(4 * channels[0], dtype)
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
        added: AddedConditioning | None = None,
    ) -> Array:
        """latents (B, h, w, 4), timesteps (B,) -> prediction (R, h, w, 4) float32.

        R is the batch size of the keys and values, B or a multiple: with two guidance branches, element b * 2 + g is
        branch g of latent b, and everything before the first cross-attention is computed once for both. text_kv holds
        (k, v), each (R, S, C), per layer of `cross_attention_layers`. image_kv holds the same for every image branch,
        and image_weight[branch][layer] that branch's weight there: a scalar, or what broadcasts to (R, L, 1).
        """
        return self.at(latents, self.time_shifts(timesteps, added), text_kv, image_kv, image_weight)

    def at(
        self,
        latents: Array,
        time_shifts: Sequence[Sequence[Array]],
        text_kv: Sequence[KeyValue],
        image_kv: Sequence[Sequence[KeyValue]] = (),
        image_weight: Array | Sequence = (),
        residuals: UNetResiduals | None = None,
    ) -> Array:
        """The same with `time_shifts` of the timesteps, (1, B or R, C): one for all, for each latent, or for each
        element of the keys and values; and with what other networks add inside."""
        contexts = self._contexts(text_kv, image_kv, image_weight)
        shifts = iter(time_shifts)
        x = self.conv_in(latents.astype(self.dtype))
        skips = [x]
        for block in self.down_blocks:
            x, skips_of_block = block(x, next(shifts), contexts[str(block.name)])
            skips += skips_of_block
        x = self.mid_block(x, next(shifts), contexts["mid_block"])
        if residuals is not None:
            skips = [_add(skip, residual) for skip, residual in zip(skips, residuals.skips, strict=True)]
            x = _add(x, residuals.mid)
        for block in self.up_blocks:
            taken = [skips.pop() for _ in range(block.layers)]
            x = block(x, taken, skips[-1].shape if skips else None, next(shifts), contexts[str(block.name)])
        assert not skips
        return self.conv_out(nn.silu(self.conv_norm_out(x))).astype(jnp.float32)

    def time_shifts(self, timesteps: Array, added: AddedConditioning | None = None) -> list[list[Array]]:
        """Timesteps (...) -> per block, in the order of the forward pass, what time adds in each resnet, (..., C). The
        leading axes of the added conditioning, where the UNet has one, and of the timesteps broadcast: timesteps (n, 1)
        and the conditioning of R elements give (n, R, C)."""
        time = self.time_embedding(timestep_embedding(timesteps, self.config.block_out_channels[0]))
        if self.config.addition_embed_type is not None:
            assert added is not None
            ids = timestep_embedding(added.time_ids, self.config.addition_time_embed_dim or 0)
            ids = ids.reshape(*ids.shape[:-2], -1).astype(self.dtype)
            time = time + self.add_embedding(jnp.concatenate([added.pooled.astype(self.dtype), ids], axis=-1))
        blocks = (*self.down_blocks, self.mid_block, *self.up_blocks)
        return [[resnet.time_shift(time) for resnet in block.resnets] for block in blocks]

    def text_kv(self, text: Array) -> list[KeyValue]:
        """Text states (B, S, D) -> (k, v), each (B, S, C), per cross-attention layer in file order: once per prompt."""
        blocks = {block.name: block for block in (*self.down_blocks, *self.up_blocks, self.mid_block)}
        text = text.astype(self.dtype)
        layers = cross_attention_layers(self.config)
        return [blocks[layer.block].attentions[layer.attention].text_kv(text, layer.layer) for layer in layers]

    @staticmethod
    def maps_of(collection: Params, config: UNetConfig) -> list[list[Array]]:
        """The collection "maps" of a call as attention (R, L, N) to the tokens of every image branch, per branch and
        cross-attention layer."""
        found = [layer.subtree(collection)["images"] for layer in cross_attention_layers(config)]
        return [list(branch) for branch in zip(*found, strict=True)]

    def from_text(self, latents: Array, timesteps: Array, text: Array, added: AddedConditioning | None = None) -> Array:
        """The plain UNet of text states (B, S, D): touches every parameter, so it also initializes."""
        return self(latents, timesteps, self.text_kv(text), added=added)

    def _contexts(
        self,
        text_kv: Sequence[KeyValue],
        image_kv: Sequence[Sequence[KeyValue]],
        image_weight: Array | Sequence,
    ) -> Mapping[str, Contexts]:
        """The contexts of every block, by its name."""
        blocks = (*self.down_blocks, self.mid_block, *self.up_blocks)
        contexts: dict[str, list[list[list[AttentionBranch]]]] = {str(block.name): [] for block in blocks}
        for i, layer in enumerate(cross_attention_layers(self.config)):
            images = [AttentionBranch(*kv[i], weight[i]) for kv, weight in zip(image_kv, image_weight, strict=True)]
            of_block = contexts[layer.block]
            if layer.attention == len(of_block):
                of_block.append([])
            of_block[layer.attention].append([AttentionBranch(*text_kv[i]), *images])
        return contexts


def _add(x: Array, residual: Array) -> Array:
    """x (B or R, h, w, C) + residual (R or 1, h, w, C), in the dtype of x."""
    return match_rows(x, max(x.shape[0], residual.shape[0])) + residual.astype(x.dtype)


class TimeEmbedding(nn.Module):
    """Sinusoids (B, C) -> (B, width)."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Dense(self.width, dtype=self.dtype, name="linear_1")(x)
        return Dense(self.width, dtype=self.dtype, name="linear_2")(nn.silu(x))


def _resnet(config: UNetConfig, width: int, dtype: jnp.dtype, remat: bool) -> ResnetBlock:
    kind = nn.remat(ResnetBlock) if remat else ResnetBlock
    return kind(width, config.norm_num_groups, config.norm_eps, dtype)


def _transformer(config: UNetConfig, level: int, dtype: jnp.dtype, remat: bool) -> Transformer:
    kind = nn.remat(Transformer) if remat else Transformer
    layers = config.transformer_layers(level)
    width, heads, groups = config.block_out_channels[level], config.heads(level), config.norm_num_groups
    return kind(width, heads, layers, groups, dtype, config.use_linear_projection)


class DownBlockOutput(NamedTuple):
    """What the next block reads, and the skip connections that the block made."""

    x: Array
    skips: list[Array]


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

    def __call__(self, x: Array, time_shifts: Sequence[Array], contexts: Contexts) -> DownBlockOutput:
        skips = []
        for i, (resnet, shift) in enumerate(zip(self.resnets, time_shifts, strict=True)):
            x = resnet(x, shift)
            if self.attention:
                x = self.attentions[i](x, contexts[i])
            skips.append(x)
        if self.level < self.config.levels - 1:
            x = self.downsamplers[0](x)
            skips.append(x)
        return DownBlockOutput(x, skips)


class MidBlock(nn.Module):
    """resnet, transformer, resnet at the coarsest level."""

    config: UNetConfig
    dtype: jnp.dtype
    remat: bool

    def setup(self):
        width = self.config.block_out_channels[-1]
        self.resnets = [_resnet(self.config, width, self.dtype, self.remat) for _ in range(2)]
        self.attentions = [_transformer(self.config, self.config.levels - 1, self.dtype, self.remat)]

    def __call__(self, x: Array, time_shifts: Sequence[Array], contexts: Contexts) -> Array:
        x = self.attentions[0](self.resnets[0](x, time_shifts[0]), contexts[0])
        return self.resnets[1](x, time_shifts[1])


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
        time_shifts: Sequence[Array],
        contexts: Contexts,
    ) -> Array:
        """next_skip is the shape (B, h, w, C) of the next block's first skip: odd sizes do not double exactly."""
        for i, (resnet, skip, shift) in enumerate(zip(self.resnets, skips, time_shifts, strict=True)):
            x = resnet(jnp.concatenate([x, match_rows(skip, x.shape[0])], axis=-1), shift)
            if self.attention:
                x = self.attentions[i](x, contexts[i])
        return x if next_skip is None else self.upsamplers[0](x, *next_skip[1:3])
