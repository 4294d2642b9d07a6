"""How a convolution is computed: the only place that knows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.models.winograd import winograd

# On a CPU, for a 3x3 kernel (scripts/benchmark_convolution.py): one matrix product over at most this many positions of
# the batch, and where there are more of them and at least so many channels on both sides, sixteen products of tiles.
_PRODUCT_POSITIONS = 512
_WINOGRAD_CHANNELS = 256


def convolve(x: Array, kernel: Array, window_strides: Sequence[int], padding: Any, **options: Any) -> Array:
    """Stands in for jax.lax.conv_general_dilated: x (B, h, w, C), kernel (kh, kw, C, C') -> (B, h', w', C')."""
    plain = tuple(window_strides) == (1, 1) and _keeps_size(padding, kernel.shape)
    if plain and kernel.shape[:2] == (1, 1):
        return x @ kernel[0, 0]
    if plain and jax.default_backend() == "cpu":
        if x.shape[0] * x.shape[1] * x.shape[2] <= _PRODUCT_POSITIONS:
            return _as_product(x, kernel)
        if kernel.shape[:2] == (3, 3) and min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS and x.dtype == jnp.float32:
            return winograd(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)


def _keeps_size(padding: Any, kernel: Sequence[int]) -> bool:
    return not isinstance(padding, str) and [tuple(p) for p in padding] == [(k // 2, k // 2) for k in kernel[:2]]


def _as_product(x: Array, kernel: Array) -> Array:
    """Every position's neighbourhood as a row (B h w, kh kw C), times the kernel as a matrix."""
    batch, height, width, channels = x.shape
    rows, columns = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(batch * height * width, -1)
    return (patches @ kernel.reshape(rows * columns * channels, -1)).reshape(batch, height, width, -1)
