"""The UNet's spatial transformer: self-attention, cross-attention whose keys and values are given, feed-forward."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.models.layers import Dense, conv, gelu, group_norm, layer_norm, match_rows
from ipadapter_jax.ops.attention import AttentionBranch, KeyValue, attend, attention_map


class Transformer(nn.Module):
    """diffusers' Transformer2DModel: (B, h, w, C) -> (R, h, w, C), where R is the batch size of the contexts, B or a
    multiple. There is one context per layer. Its projections are 1x1 convolutions, or `linear` layers of the same
    numbers, which a checkpoint stores as matrices."""

    width: int
    heads: int
    layers: int
    groups: int
    dtype: jnp.dtype
    linear: bool = False

    def setup(self):
        self.norm = group_norm(self.groups, 1e-6, self.dtype)  # 1e-6 here, 1e-5 elsewhere in the UNet
        self.proj_in = self._projection()
        self.transformer_blocks = [TransformerBlock(self.width, self.heads, self.dtype) for _ in range(self.layers)]
        self.proj_out = self._projection()

    def _projection(self) -> nn.Module:
        return Dense(self.width, dtype=self.dtype) if self.linear else conv(self.width, 1, self.dtype)

    def text_kv(self, text: Array, layer: int) -> KeyValue:
        return self.transformer_blocks[layer].attn2.key_value(text)

    def __call__(self, x: Array, contexts: Sequence[Sequence[AttentionBranch]]) -> Array:
        y = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block, context in zip(self.transformer_blocks, contexts, strict=True):
            y = block(y, context)
        y = self.proj_out(y.reshape(-1, *x.shape[1:]))
        return match_rows(x, y.shape[0]) + y


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a LayerNorm before it and a residual connection:
    (B, L, C) -> (R, L, C), where R is the batch size of the context, B or a multiple of it."""

    width: int
    heads: int
    dtype: jnp.dtype

    def setup(self):
        self.norm1, self.norm2, self.norm3 = (layer_norm(self.dtype) for _ in range(3))
        self.attn1 = Attention(self.width, self.heads, self.dtype)
        self.attn2 = Attention(self.width, self.heads, self.dtype)
        self.ff = FeedForward(self.width, self.dtype)

    def __call__(self, x: Array, context: Sequence[AttentionBranch]) -> Array:
        y = self.norm1(x)
        x = match_rows(x + self.attn1(y, [AttentionBranch(*self.attn1.key_value(y))]), context[0].key.shape[0])
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    """Attention with queries from x (B, L, C) and given branches of keys and values. If the collection "maps" is
    mutable, it stores there, as `images`, a list of the attention (B, L, N) to each branch but the first, the text."""

    width: int
    heads: int
    dtype: jnp.dtype

    def setup(self):
        self.to_q, self.to_k, self.to_v = (Dense(self.width, use_bias=False, dtype=self.dtype) for _ in range(3))
        self.to_out = [Dense(self.width, dtype=self.dtype)]

    def key_value(self, context: Array) -> KeyValue:
        return KeyValue(self.to_k(context), self.to_v(context))

    def __call__(self, x: Array, branches: Sequence[AttentionBranch]) -> Array:
        query = self.to_q(x)
        if self.is_mutable_collection("maps") and len(branches) > 1:
            maps = [attention_map(query, branch.key, self.heads) for branch in branches[1:]]
            self.put_variable("maps", "images", maps)
        return self.to_out[0](attend(query, branches, self.heads))


class FeedForward(nn.Module):
    """GEGLU to 4 times the width and back (arXiv 2002.05202)."""

    width: int
    dtype: jnp.dtype

    def setup(self):
        self.net_0 = GEGLU(4 * self.width, self.dtype)
        self.net_2 = Dense(self.width, dtype=self.dtype)

    def __call__(self, x: Array) -> Array:
        return self.net_2(self.net_0(x))


class GEGLU(nn.Module):
    """a gelu(b), a and b being halves of one projection."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(Dense(2 * self.width, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return value * gelu(gate)
