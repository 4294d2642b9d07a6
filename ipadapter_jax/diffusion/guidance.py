"""Classifier-free guidance (arXiv 2207.12598), and its rescaling (arXiv 2305.08891)."""

import jax.numpy as jnp
import numpy as np
from jax import Array


def guide(output: Array, scale: Array | np.floating | float, rescale: Array | np.floating | float = 0.0) -> Array:
    """Combines the outputs (B, 2, ...) of both guidance branches, the unconditional one first, into (B, ...).

    From u and c it computes g = u + scale (c - u), and then rescale g std(c) / std(g) + (1 - rescale) g, with the
    standard deviations of each image (arXiv 2305.08891, equations 15 and 16).
    """
    unconditional, conditional = output[:, 0], output[:, 1]
    guided = unconditional + scale * (conditional - unconditional)
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdims=True) / jnp.maximum(guided.std(axes, keepdims=True), 1e-30)
    return jnp.where(rescale == 0, guided, guided * (rescale * ratio + (1 - rescale)))
