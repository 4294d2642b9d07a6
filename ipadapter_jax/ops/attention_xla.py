"""Attention written out: as the formula stands, some queries at a time, or one head at a time.

Shapes: leading axes ..., L queries, S keys, d depth of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

HEAD_CHUNK = 1024  # queries of a head at a time, on a CPU: 256 to 2048 make no difference


class Heads(NamedTuple):
    """An entry by head: keys and values (..., S, d), and its weight (..., L, 1) or None for 1."""

    key: Array
    value: Array
    weight: Array | None


def dense(q: Array, entries: Sequence[Heads], causal: bool = False) -> Array:
    """The sum over all entries along the last two axes; logits and sums in float32, products in the dtype of v."""
    return sum(_softmax_attention(q, entry, causal) for entry in entries)  # pyright: ignore[reportReturnType]


def _softmax_attention(q: Array, entry: Heads, causal: bool) -> Array:
    k, v, weight = entry
    logits = jnp.einsum("...ld,...sd->...ls", q, k, preferred_element_type=jnp.float32)
    if causal:
        logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, jnp.finfo(jnp.float32).min)
    # The largest one cancels out, so its gradient is nothing but work.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jnp.einsum("...ls,...sd->...ld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / weights.sum(-1, keepdims=True)
    return out if weight is None else out * weight


def chunked(q: Array, entries: Sequence[Heads], chunk: int) -> Array:
    """The same as `dense`, `chunk` queries at a time; a chunk's weights are formed again in the backward pass."""
    if q.shape[-2] <= chunk:
        return jax.checkpoint(dense)(q, entries)
    walked, join = _walk(q.shape[-2], chunk)

    @jax.checkpoint
    def one(rows):
        queries, weights = rows
        return dense(queries, [e._replace(weight=w) for e, w in zip(entries, weights, strict=True)])

    return join(jax.lax.map(one, jax.tree.map(walked, (q, [entry.weight for entry in entries]))))


def _walk(length: int, most: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Two functions: (..., L, d) -> (chunks, ..., chunk, d), with a chunk of at most so many, and back."""
    chunks = -(-length // most)
    chunk = -(-length // chunks)  # equal ones, so that nothing is padded as a rule

    def walked(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, chunks * chunk - length), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:-2], chunks, chunk, x.shape[-1]), -3, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, -3)
        return x.reshape(*x.shape[:-3], chunks * chunk, -1)[..., :length, :]

    return walked, join


@jax.custom_vjp
def by_head(q: Array, entries: Sequence[Heads]) -> Array:
    """`dense` over (B, heads), one head of one row at a time: on a CPU only then are the products plain matrix products
    with the logits in cache, up to 4 times faster than the batched form."""
    merged = jax.tree.map(_merged, (q, list(entries)))
    out = jax.lax.map(lambda head: chunked(head[0], head[1], HEAD_CHUNK), merged)
    return out.reshape(*q.shape[:2], *out.shape[1:])


def _merged(x: Array) -> Array:
    """(B, heads, ...) -> (B heads, ...)."""
    return x.reshape(-1, *x.shape[2:])


def _by_head_forward(q: Array, entries: Sequence[Heads]) -> tuple[Array, Any]:
    return by_head(q, entries), (q, list(entries))


def _by_head_backward(given: tuple[Array, list[Heads]], gradient: Array) -> tuple[Array, list[Heads]]:
    """The gradients of keys and values are summed as (d, S): gradient^T weights takes XLA on a CPU less than half the
    time of weights^T gradient. If it were transposed inside the loops, the first would be made the second."""
    found = jax.lax.map(lambda head: _head_backward(*head), jax.tree.map(_merged, (*given, gradient)))
    dq, entries = jax.tree.map(lambda x, like: x.reshape(*like.shape[:2], *x.shape[1:]), found, given)
    entries = [Heads(key.swapaxes(-1, -2), value.swapaxes(-1, -2), weight) for key, value, weight in entries]
    return jax.tree.map(lambda x, like: x.astype(like.dtype), (dq, entries), given)


def _head_backward(q: Array, entries: list[Heads], gradient: Array) -> tuple[Array, list[Heads]]:
    """From the gradient of a head's result (L, d) those of its queries (L, d), its keys and values, both as (d, S), and
    its weights (L, 1), all float32."""
    walked, join = _walk(q.shape[-2], HEAD_CHUNK)

    def add(total: list[Any], rows: tuple[Any, ...]) -> tuple[list[Any], Any]:
        queries, weights, given = rows
        found = [_rows_backward(queries, e._replace(weight=w), given) for e, w in zip(entries, weights, strict=True)]
        dq, of_entries, of_weights = zip(*found, strict=True)
        return jax.tree.map(jnp.add, total, list(of_entries)), (sum(dq), list(of_weights))

    zeros = [tuple(jnp.zeros(x.shape[::-1], jnp.float32) for x in entry[:2]) for entry in entries]
    rows = jax.tree.map(walked, (q, [entry.weight for entry in entries], gradient))
    total, (dq, weights) = jax.lax.scan(add, zeros, rows)
    return join(dq), [Heads(k, v, jax.tree.map(join, w)) for (k, v), w in zip(total, weights, strict=True)]


def _rows_backward(q: Array, entry: Heads, gradient: Array) -> tuple[Array, tuple[Array, Array], Array | None]:
    """What these queries add: (L, d), both (d, S), (L, 1)."""
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
    return dq, (dk, dv), None if weight is None else along


by_head.defvjp(_by_head_forward, _by_head_backward)
