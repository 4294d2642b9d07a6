"""IP-Adapter keys and values: from image tokens, for every cross-attention layer (arXiv 2308.06721, section 3.2.2)."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.models.layers import Dense
from ipadapter_jax.ops.attention import KeyValue


class IPAdapter(nn.Module):
    """to_k_ip and to_v_ip of all cross-attention layers.

    Takes image tokens (B, N, D), gives (k', v') for each layer in the order of the weight file, each (B, N, C), where C
    is the layer's entry of `widths`. Parameters are numbered 1, 3, 5, ... as in the authors' files, in which the even
    numbers are self-attention layers, which have no parameters there.
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
