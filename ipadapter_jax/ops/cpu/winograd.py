"""Winograd's 3x3 convolution F(2x2, 3x3), with 16 products for 4 outputs instead of 36 (arXiv 1509.09308, section 4.1).

The output is computed in tiles of 2x2, which depend on 4x4 positions of the input. The input's tile and the kernel are
each transformed to 4x4 numbers, by sums and differences along both axes. Corresponding numbers are multiplied, which is
a matrix product over the channels for each of the 16, and the output's tile is a transform of the results. Everything
is float32, because the differences would lose most digits in half precision.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

Grid = list[list[Array]]

# B^T, G and A^T of the paper's equation 7, along one axis.
_OF_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OF_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OF_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))
_TURNED = (3, 1, 2, 0)  # the rows of G g in the order in which they are G g' for the reversed kernel g'
_BAND = 8192  # positions of the batch that are computed together


@jax.custom_vjp
def winograd(x: Array, kernel: Array) -> Array:
    """x (B, h, w, C), kernel (3, 3, C, C') -> (B, h, w, C'), with zero padding, all in float32.

    The gradient with respect to x is computed in the same way, with the reversed kernel. XLA computes that with respect
    to the kernel.
    """
    return _correlate(x, _kernel_tile(kernel))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return winograd(x, kernel), (x, kernel)


def _backward(kept: tuple[Array, Array], by_output: Array) -> tuple[Array, Array]:
    x, kernel = kept
    tile = _kernel_tile(kernel)
    turned = [[tile[i][j].T for j in _TURNED] for i in _TURNED]
    return _correlate(by_output, turned), _by_kernel(x, kernel, by_output)


winograd.defvjp(_forward, _backward)


def _by_kernel(x: Array, kernel: Array, by_output: Array) -> Array:
    def plain(kernel: Array) -> Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)

    return jax.linear_transpose(plain, kernel)(by_output)[0]


def _correlate(x: Array, kernel_tile: Grid) -> Array:
    """Convolves one band of rows at a time. The transforms of all rows would take four times the memory of the input
    and four times that of the output."""
    batch, height, width, _ = x.shape
    bands = -(-batch * height * width // _BAND)
    rows = 2 * -(-height // (2 * bands))
    bands = -(-height // rows)
    below, right = bands * rows - height, width % 2  # to whole tiles and bands
    padded = jnp.pad(x, ((0, 0), (1, 1 + below), (1, 1 + right), (0, 0)))
    if bands == 1:
        found = _band(padded, kernel_tile)
    else:
        tops = rows * jnp.arange(bands)
        found = jax.lax.map(lambda top: _band(_rows(padded, top, rows + 2), kernel_tile), tops)
        found = jnp.moveaxis(found, 0, 1).reshape(batch, bands * rows, width + right, -1)
    return found[:, :height, :width]


def _rows(x: Array, top: Array, rows: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, top, rows, axis=1)


def _band(padded: Array, kernel_tile: Grid) -> Array:
    """(B, h + 2, w + 2, C) -> (B, h, w, C')."""
    batch, rows, columns, channels = padded.shape
    rows, columns = rows // 2 - 1, columns // 2 - 1
    pairs = padded.reshape(batch, rows + 1, 2, columns + 1, 2, channels)

    def position(i: int, j: int) -> Array:
        """What every tile has at (i, j): (B, rows, columns, C)."""
        return pairs[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2]

    tile = _both_axes(_OF_INPUT, [[position(i, j) for j in range(4)] for i in range(4)])
    # One product each: together, as one product with a batch of 16, they take up to half as long again.
    products = [[x @ k for x, k in zip(*pair, strict=True)] for pair in zip(tile, kernel_tile, strict=True)]
    (a, b), (c, d) = _both_axes(_OF_OUTPUT, products)
    halves = [jnp.concatenate(pair, axis=-1).reshape(batch, rows, 2 * columns, -1) for pair in ((a, b), (c, d))]
    return jnp.stack(halves, axis=2).reshape(batch, 2 * rows, 2 * columns, -1)


def _kernel_tile(kernel: Array) -> Grid:
    return _both_axes(_OF_KERNEL, [[kernel[i, j] for j in range(3)] for i in range(3)])


def _both_axes(matrix: Sequence[Sequence[float]], grid: Grid) -> Grid:
    """matrix @ grid @ matrix^T, its elements being arrays."""
    columns = [[_combine(row, column) for row in matrix] for column in zip(*grid, strict=True)]
    return [[_combine(row, line) for row in matrix] for line in zip(*columns, strict=True)]


def _combine(factors: Sequence[float], arrays: Sequence[Array]) -> Array:
    return sum(factor * x for factor, x in zip(factors, arrays, strict=True) if factor)  # pyright: ignore[reportReturnType]
