"""Attention as XLA computes it: the formula itself, or a chunk of the queries at a time.

Shapes: leading axes ..., L queries, S keys, d the head_dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Heads(NamedTuple):
    """A branch with its heads split: keys and values (..., S, d), and its weight (..., L, 1) or None for 1."""

    key: Array
    value: Array
    weight: Array | None


def dense(q: Array, entries: Sequence[Heads], causal: bool = False) -> Array:
    """The sum of the attention of all branches. Logits and sums are float32; softmax weights have the dtype of v."""
    return sum(_softmax_attention(q, entry, causal) for entry in entries)  # pyright: ignore[reportReturnType]


def _softmax_attention(q: Array, entry: Heads, causal: bool) -> Array:
    k, v, weight = entry
    logits = jnp.einsum("...ld,...sd->...ls", q, k, preferred_element_type=jnp.float32)
    if causal:
        logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, jnp.finfo(jnp.float32).min)
    # The maximum cancels out of the softmax, so its gradient is zero and need not be computed.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jnp.einsum("...ls,...sd->...ld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / weights.sum(-1, keepdims=True)
    return out if weight is None else out * weight


def chunked(q: Array, entries: Sequence[Heads], chunk: int) -> Array:
    """The same as `dense`, for `chunk` queries at a time. The backward pass recomputes the softmax of each chunk."""
    if q.shape[-2] <= chunk:
        return jax.checkpoint(dense)(q, entries)
    chunks = QueryChunks(q.shape[-2], chunk)

    @jax.checkpoint
    def one(rows):
        queries, weights = rows
        return dense(queries, [e._replace(weight=w) for e, w in zip(entries, weights, strict=True)])

    return chunks.join(jax.lax.map(one, jax.tree.map(chunks.split, (q, [entry.weight for entry in entries]))))


class QueryChunks:
    """Splits arrays with an entry for each of `length` queries into chunks of at most `most`, and joins them again."""

    def __init__(self, length: int, most: int):
        self.length, self.chunks = length, -(-length // most)
        self.chunk = -(-length // self.chunks)  # of equal size, so that most lengths need no padding

    def split(self, x: Array) -> Array:
        """(..., L, d) -> (chunks, ..., chunk, d)."""
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, self.chunks * self.chunk - self.length), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:-2], self.chunks, self.chunk, x.shape[-1]), -3, 0)

    def join(self, x: Array) -> Array:
        """(chunks, ..., chunk, d) -> (..., L, d)."""
        x = jnp.moveaxis(x, 0, -3)
        return x.reshape(*x.shape[:-3], self.chunks * self.chunk, -1)[..., : self.length, :]
