"""Classifier-free guidance (arXiv 2207.12598)."""

from jax import Array


def guide(output: Array, scale: Array | float) -> Array:
    """Outputs of both branches, (B, 2, ...) with the unconditional one first -> (B, ...): u + scale (c - u)."""
    unconditional, conditional = output[:, 0], output[:, 1]
    return unconditional + scale * (conditional - unconditional)
