"""Attention of one head at a time, with its gradient written out: the fastest form on a CPU.

Shapes: L queries, S keys, d the head_dim.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.ops.attention_xla import Heads, QueryChunks, chunked

HEAD_CHUNK = 1024  # queries of a head at a time; 256 to 2048 are equally fast


class _QueriesAndEntries(NamedTuple):
    """The arguments of attention, or the gradients with respect to them."""

    queries: Array
    entries: list[Heads]


class _ChunkGradients(NamedTuple):
    """The contribution of a chunk of the queries to the gradients of one branch."""

    queries: Array  # (L, d)
    key_value: Heads  # both (d, S), without a weight
    weight: Array | None  # (L, 1)


@jax.custom_vjp
def per_head_attention(q: Array, entries: Sequence[Heads]) -> Array:
    """`dense` over (B, heads), one head of one sample at a time: only then are the products on a CPU plain matrix
    products with the logits in cache, up to 4 times faster than the batched form."""
    merged = jax.tree.map(_merged, (q, list(entries)))
    out = jax.lax.map(lambda head: chunked(head[0], head[1], HEAD_CHUNK), merged)
    return out.reshape(*q.shape[:2], *out.shape[1:])


def _merged(x: Array) -> Array:
    """(B, heads, ...) -> (B heads, ...)."""
    return x.reshape(-1, *x.shape[2:])


def _forward(q: Array, entries: Sequence[Heads]) -> tuple[Array, _QueriesAndEntries]:
    return per_head_attention(q, entries), _QueriesAndEntries(q, list(entries))


def _backward(given: _QueriesAndEntries, gradient: Array) -> tuple[Array, list[Heads]]:
    """The gradients of keys and values are summed as (d, S): gradient^T weights takes XLA on a CPU less than half the
    time of weights^T gradient. If it were transposed inside the loops, the first would be made the second."""
    found = jax.lax.map(lambda head: _head_backward(*head), jax.tree.map(_merged, (*given, gradient)))
    dq, entries = jax.tree.map(lambda x, like: x.reshape(*like.shape[:2], *x.shape[1:]), found, given)
    entries = [Heads(key.swapaxes(-1, -2), value.swapaxes(-1, -2), weight) for key, value, weight in entries]
    by = jax.tree.map(lambda x, like: x.astype(like.dtype), _QueriesAndEntries(dq, entries), given)
    return by.queries, by.entries


def _head_backward(q: Array, entries: list[Heads], gradient: Array) -> _QueriesAndEntries:
    """From the gradient of a head's result (L, d) those of its queries (L, d), its keys and values, both as (d, S), and
    its weights (L, 1), all float32."""
    chunks = QueryChunks(q.shape[-2], HEAD_CHUNK)

    def add(total: list[Heads], rows: tuple[Array, list[Array | None], Array]):
        queries, weights, given = rows
        found = [_chunk_backward(queries, e._replace(weight=w), given) for e, w in zip(entries, weights, strict=True)]
        of_queries, of_entries, of_weights = zip(*found, strict=True)
        return jax.tree.map(jnp.add, total, list(of_entries)), (functools.reduce(jnp.add, of_queries), list(of_weights))

    zeros = [Heads(*(jnp.zeros(x.shape[::-1], jnp.float32) for x in (e.key, e.value)), weight=None) for e in entries]
    rows = jax.tree.map(chunks.split, (q, [entry.weight for entry in entries], gradient))
    total, (dq, weights) = jax.lax.scan(add, zeros, rows)
    of_entries = [e._replace(weight=jax.tree.map(chunks.join, w)) for e, w in zip(total, weights, strict=True)]
    return _QueriesAndEntries(chunks.join(dq), of_entries)


def _chunk_backward(q: Array, entry: Heads, gradient: Array) -> _ChunkGradients:
    k, v, weight = entry
    with jax.named_scope("rematted_computation"):  # as jax.checkpoint calls it: the count of FLOP leaves it out
        logits = jnp.einsum("ld,sd->ls", q, k, preferred_element_type=jnp.float32)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    given = gradient / total
    of_weights = jnp.einsum("ld,sd->ls", given.astype(v.dtype), v, preferred_element_type=jnp.float32)
    along = (weights * of_weights).sum(-1, keepdims=True)
    of_logits = weights * (of_weights - along / total)
    if weight is not None:
        of_logits, given = of_logits * weight, given * weight
    of_logits, given, weights = of_logits.astype(q.dtype), given.astype(v.dtype), weights.astype(v.dtype)
    dq = jnp.einsum("ls,sd->ld", of_logits, k, preferred_element_type=jnp.float32)
    dk = jnp.einsum("ld,ls->ds", q, of_logits, preferred_element_type=jnp.float32)
    dv = jnp.einsum("ld,ls->ds", given, weights, preferred_element_type=jnp.float32)
    return _ChunkGradients(dq, Heads(dk, dv, weight=None), None if weight is None else along)


per_head_attention.defvjp(_forward, _backward)
