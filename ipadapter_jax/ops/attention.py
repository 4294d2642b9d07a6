"""`attend`: attention as all networks call it. It chooses how the attention is computed.

Shapes used in every network: B batch, H W pixels, h w latent, C channels, L positions, S text tokens, N image tokens,
D width. Images and latents are channels-last everywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.ops.attention_kernels import kernel_for
from ipadapter_jax.ops.attention_xla import Heads, chunked, dense
from ipadapter_jax.ops.batch_sharding import batch_shards, is_batch_sharded, shard_map_batch
from ipadapter_jax.ops.cpu.per_head_attention import per_head_attention

# Up to this many logits are computed together. With more, the queries are processed in chunks: on accelerators to
# bound the memory, on a CPU to stay in its cache.
_DENSE_LOGITS = 1 << 20
_ACCELERATOR_CHUNK_LOGITS = 1 << 28
# On a CPU, heads with more logits than this are computed one at a time. That is 1.6 times faster for 4096 queries and
# 77 keys, twice as fast for 1024 and 1024, equally fast for 1024 and 77, and 2.5 times slower for 65 and 65
# (benchmarks/attention.py).
_CPU_HEAD_LOGITS = 1 << 17


class KeyValue(NamedTuple):
    """Keys and values of one layer, each (B, S, C)."""

    key: Array
    value: Array


class AttentionBranch(NamedTuple):
    """Keys and values that queries attend to by a softmax of their own, and the weight of the result."""

    key: Array  # (B, S, C)
    value: Array  # (B, S, C)
    weight: Array | float = 1.0  # a scalar, or broadcasts against (B, L, C)


def attend(query: Array, branches: Sequence[AttentionBranch], num_heads: int, *, causal: bool = False) -> Array:
    """y = sum_i w_i softmax(q k_i^T / sqrt(d)) v_i: decoupled cross-attention (arXiv 2308.06721, equation 5).

    query (B, L, C); every branch has its own softmax, computed in float32 whatever the input's dtype. Plain attention
    is one branch of weight 1. A weight is a scalar, or (B, 1, 1) per sample, or (B, L, 1) for a regional mask. Returns
    (B, L, C) in the dtype of the query. All branches share one iteration over the queries.
    """
    assert branches, "attention needs at least one branch"
    (key, value, weight), *others = branches
    if not others and not causal and _is_one(weight):
        kernel = kernel_for(query.shape, key.shape, num_heads, query.dtype)
        if kernel is not None:
            return shard_map_batch(kernel, query, key, value)
    batch, length, _ = query.shape
    q = _split_heads(query, num_heads)
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    split = [
        Heads(_split_heads(key, num_heads), _split_heads(value, num_heads), _weight_of_heads(weight, q))
        for key, value, weight in branches
    ]
    out = _in_xla(q, split, causal)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1).astype(query.dtype)


def attention_map(query: Array, key: Array, num_heads: int) -> Array:
    """softmax(q k^T / sqrt(d)) as `attend` forms it, the mean over the heads: (B, L, C), (B, S, C) -> (B, L, S)."""
    q, k = _split_heads(query, num_heads), _split_heads(key, num_heads)
    logits = jnp.einsum("...ld,...sd->...ls", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits).mean(axis=1)


def _is_one(weight: Array | float) -> bool:
    return isinstance(weight, float) and weight == 1.0


def _split_heads(x: Array, num_heads: int) -> Array:
    """(B, L, C) -> (B, heads, L, C / heads)."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)


def _weight_of_heads(weight: Array | float, q: Array) -> Array | None:
    if _is_one(weight):
        return None
    weight = jnp.asarray(weight, jnp.float32)
    return jnp.broadcast_to(weight[..., None, :, :] if weight.ndim else weight, (*q.shape[:-1], 1))


def _in_xla(q: Array, entries: Sequence[Heads], causal: bool) -> Array:
    """Attention as XLA operations, with all logits in memory or a part of them at a time: float32 (B, heads, L, d)."""
    batch, heads, length, _ = q.shape
    keys = sum(entry.key.shape[2] for entry in entries)
    if jax.default_backend() == "cpu" and length * keys > _CPU_HEAD_LOGITS and is_batch_sharded() and not causal:
        return shard_map_batch(per_head_attention, q, entries)
    if causal or batch * heads * length * keys <= _DENSE_LOGITS:
        return dense(q, entries, causal)
    logits_per_query = -(-batch // batch_shards()) * heads * keys  # on each device
    return chunked(q, entries, max(128, _ACCELERATOR_CHUNK_LOGITS // logits_per_query))
