"""`convolve`: convolutions as all networks call them. It chooses how a convolution is computed."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from ipadapter_jax.ops.cpu.winograd import winograd

# On a CPU (benchmarks/convolution.py), a convolution over at most this many positions of the batch is one matrix
# product. With more positions, a 3x3 kernel with at least this many input and output channels uses winograd.py.
_PRODUCT_POSITIONS = 512
_WINOGRAD_CHANNELS = 256

Padding = str | Sequence[tuple[int, int]]


class ConvolutionOptions(TypedDict, total=False):
    """The other arguments of jax.lax.conv_general_dilated that flax's layers give."""

    lhs_dilation: Sequence[int] | None
    rhs_dilation: Sequence[int] | None
    dimension_numbers: jax.lax.ConvGeneralDilatedDimensionNumbers
    feature_group_count: int
    precision: jax.lax.PrecisionLike


def convolve(
    x: Array, kernel: Array, window_strides: Sequence[int], padding: Padding, **options: Unpack[ConvolutionOptions]
) -> Array:
    """Stands in for jax.lax.conv_general_dilated: x (B, h, w, C), kernel (kh, kw, C, C') -> (B, h', w', C')."""
    if tuple(window_strides) == (1, 1) and not isinstance(padding, str):
        margins = [(before, after) for before, after in padding]
        if kernel.shape[:2] == (1, 1) and margins == [(0, 0)] * 2:
            return x @ kernel[0, 0]
        if jax.default_backend() == "cpu":
            if x.shape[0] * x.shape[1] * x.shape[2] <= _PRODUCT_POSITIONS:
                return _as_product(x, kernel, margins)
            if _suits_tiles(x, kernel) and margins == [(1, 1)] * 2:
                return winograd(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)


def _suits_tiles(x: Array, kernel: Array) -> bool:
    wide = min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS
    return kernel.shape[:2] == (3, 3) and wide and x.dtype == jnp.float32


def _as_product(x: Array, kernel: Array, margins: Sequence[tuple[int, int]]) -> Array:
    """One matrix product: the patches around all positions (B h' w', kh kw C) times the kernel (kh kw C, C')."""
    rows, columns = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), *margins, (0, 0)))
    batch, height, width = padded.shape[0], padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    shifted = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(batch * height * width, -1)
    return (patches @ kernel.reshape(patches.shape[-1], -1)).reshape(batch, height, width, -1)
