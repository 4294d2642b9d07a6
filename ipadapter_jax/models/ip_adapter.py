"""The adapter: image tokens to keys and values for every cross-attention of the UNet (arXiv 2308.06721, 3.2.2)."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.models.layers import Dense
from ipadapter_jax.ops.attention import KeyValue


class IPAdapter(nn.Module):
    """to_k_ip and to_v_ip of every site, in file order: tokens (B, N, D) -> [(k', v')], each (B, N, C_site).

    `widths` are the sites' widths C. Parameters are numbered 1, 3, 5, ... as in the authors' files, where the even
    numbers are the self-attentions, which have none.
    """

    widths: Sequence[int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> list[KeyValue]:
        tokens = tokens.astype(self.dtype)
        return [
            KeyValueProjection(width, self.dtype, name=str(2 * i + 1))(tokens) for i, width in enumerate(self.widths)
        ]


class KeyValueProjection(nn.Module):
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: Array) -> KeyValue:
        key = Dense(self.width, use_bias=False, dtype=self.dtype, name="to_k_ip")(tokens)
        return KeyValue(key, Dense(self.width, use_bias=False, dtype=self.dtype, name="to_v_ip")(tokens))
