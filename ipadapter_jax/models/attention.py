"""How attention is computed: the only place that knows.

Shapes used in every network: B batch, H W pixels, h w latent, C channels, L positions, S text tokens, N image tokens,
D width. Images and latents are channels-last everywhere.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

# Logits of fewer elements than this are formed at once; above it the queries are walked in chunks (memory on
# accelerators, cache on a CPU).
_DENSE_LOGITS = 1 << 20
_CPU_QUERY_CHUNK = 512
_ACCELERATOR_CHUNK_LOGITS = 1 << 28

Entry = tuple[Array, Array, Array | float]
"""Keys (B, S, C), values (B, S, C) and a weight that broadcasts against (B, L, C)."""


def attend(query: Array, entries: Sequence[Entry], num_heads: int, *, causal: bool = False) -> Array:
    """y = sum_i w_i softmax(q k_i^T / sqrt(d)) v_i: decoupled cross-attention (arXiv 2308.06721, equation 5).

    query (B, L, C); every entry has its own softmax, computed in float32 whatever the input's dtype. Plain attention is
    one entry of weight 1. A weight is a scalar, or (B, 1, 1) per row, or (B, L, 1) for a regional mask. Returns
    (B, L, C) in the dtype of the query.
    """
    total = None
    for key, value, weight in entries:
        out = _softmax_attention(query, key, value, num_heads, causal)
        if not (isinstance(weight, float) and weight == 1.0):
            out = out * weight
        total = out if total is None else total + out
    assert total is not None, "attention needs at least one entry"
    return total.astype(query.dtype)


def attention_map(query: Array, key: Array, num_heads: int) -> Array:
    """softmax(q k^T / sqrt(d)) as `attend` forms it, the mean over the heads: (B, L, C), (B, S, C) -> (B, L, S)."""
    q, k = _split_heads(query, num_heads), _split_heads(key, num_heads)
    logits = jnp.einsum("...ld,...sd->...ls", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits).mean(axis=1)


def _softmax_attention(query: Array, key: Array, value: Array, num_heads: int, causal: bool) -> Array:
    """One softmax attention (B, L, C), (B, S, C), (B, S, C) -> (B, L, C) in float32."""
    q, k, v = (_split_heads(x, num_heads) for x in (query, key, value))
    batch, heads, length, depth = q.shape
    logits_per_query = batch * heads * k.shape[2]
    q = q * jnp.asarray(depth**-0.5, q.dtype)
    if causal or logits_per_query * length <= _DENSE_LOGITS:
        out = _dense(q, k, v, causal)
    elif jax.default_backend() == "cpu" and jax.device_count() == 1:
        out = _per_head(q, k, v, _CPU_QUERY_CHUNK)
    else:
        out = _chunked(q, k, v, max(128, _ACCELERATOR_CHUNK_LOGITS // logits_per_query))
    return out.transpose(0, 2, 1, 3).reshape(batch, length, heads * depth)


def _split_heads(x: Array, num_heads: int) -> Array:
    """(B, L, C) -> (B, heads, L, C / heads)."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)


def _dense(q: Array, k: Array, v: Array, causal: bool = False) -> Array:
    """softmax(q k^T) v over the last two axes, logits and sums in float32, products in the dtype of v."""
    logits = jnp.einsum("...ld,...sd->...ls", q, k, preferred_element_type=jnp.float32)
    if causal:
        logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, jnp.finfo(jnp.float32).min)
    # The largest one cancels out, so its gradient is nothing but work.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jnp.einsum("...ls,...sd->...ld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out / weights.sum(-1, keepdims=True)


def _chunked(q: Array, k: Array, v: Array, chunk: int) -> Array:
    """The same as `_dense`, `chunk` queries at a time; a chunk's weights are formed again in the backward pass."""
    length = q.shape[-2]
    chunks = -(-length // chunk)
    if chunks == 1:
        return jax.checkpoint(_dense)(q, k, v)
    chunk = -(-length // chunks)  # equal ones, so that nothing is padded as a rule
    padding = [(0, 0)] * (q.ndim - 2) + [(0, chunks * chunk - length), (0, 0)]
    walked = jnp.moveaxis(jnp.pad(q, padding).reshape(*q.shape[:-2], chunks, chunk, q.shape[-1]), -3, 0)
    out = jax.lax.map(jax.checkpoint(lambda rows: _dense(rows, k, v)), walked)
    return jnp.moveaxis(out, 0, -3).reshape(*q.shape[:-2], chunks * chunk, q.shape[-1])[..., :length, :]


def _per_head(q: Array, k: Array, v: Array, chunk: int) -> Array:
    """One head of one row at a time: on a CPU only then are the two products plain matrix products with the logits in
    cache, 4 times faster than the batched form. For one device: on a mesh every device would be given all rows."""
    merged = tuple(x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = jax.lax.map(lambda head: _chunked(head[0], head[1], head[2], chunk), merged)
    return out.reshape(*q.shape)
