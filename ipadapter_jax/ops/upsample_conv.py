"""Nearest-neighbor upsampling followed by a 3x3 convolution. Where the size doubles, both are fused.

The fused form does not compute the upsampled image. After doubling, rows 2i and 2i + 1 are copies of row i, so the
three rows that a 3x3 kernel covers are copies of only two rows of the input:

- at an even output row 2i, input row i - 1 meets the first row of the kernel, and row i meets the other two, which can
  be added up beforehand;
- at an odd output row 2i + 1, input row i meets the first two rows of the kernel, and row i + 1 meets the last.

The same is true of columns. So each of the four parities of an output position (even or odd row, even or odd column) is
a 2x2 convolution of the input, with 4 products for each output value instead of 9.
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.ops.batch_sharding import batch_shards
from ipadapter_jax.ops.convolution import ConvolutionOptions, convolve

# The fused form is used for at least this many input positions (batch x h x w) on each accelerator. With fewer, adding
# up rows of the kernel takes longer than it saves (benchmarks/compile_ahead.py: four times as long for a batch of two
# at 8x8). It is never used on a CPU: there winograd.py saves as many products, and the gradient of a 2x2 convolution is
# slow (benchmarks/convolution.py).
_FEWEST_POSITIONS = 1024


def convolve_upsampled(
    height: int, width: int, x: Array, kernel: Array, *_: object, **options: Unpack[ConvolutionOptions]
) -> Array:
    """Upsamples x (B, h, w, C) and convolves it with a kernel (3, 3, C, C') -> (B, height, width, C').

    With height and width given by functools.partial it has the signature of jax.lax.conv_general_dilated; strides and
    padding are ignored, because they are always 1.
    """
    batch, h, w = x.shape[:3]
    many = jax.default_backend() != "cpu" and batch * h * w >= _FEWEST_POSITIONS * batch_shards()
    if many and (height, width) == (2 * h, 2 * w):
        return convolve_doubled(x, kernel, **options)
    return convolve(upsample_nearest(x, height, width), kernel, (1, 1), ((1, 1), (1, 1)), **options)


def upsample_nearest(x: Array, height: int, width: int) -> Array:
    """(B, h, w, C) -> (B, height, width, C). As in PyTorch, output row i is input row floor(i h / height)."""
    batch, h, w, channels = x.shape
    if (height, width) == (2 * h, 2 * w):  # a broadcast, cheaper than a gather
        x = jnp.broadcast_to(x[:, :, None, :, None], (batch, h, 2, w, 2, channels))
        return x.reshape(batch, height, width, channels)
    return x[:, np.arange(height) * h // height][:, :, np.arange(width) * w // width]


def convolve_doubled(x: Array, kernel: Array, **options: Unpack[ConvolutionOptions]) -> Array:
    """The fused form: x (B, h, w, C), kernel (3, 3, C, C') -> (B, 2h, 2w, C').

    It equals a convolution of `upsample_nearest(x, 2h, 2w)` up to rounding: sums of kernel rows are formed in float32
    and rounded once to the dtype of x.

    One convolution gives all four parities, with their 2x2 kernels side by side in the output channels. It has
    h + 1 by w + 1 positions. Along each axis, even output positions use all but the last of them, and odd ones all but
    the first.
    """
    batch, h, w = x.shape[:3]
    kinds = [part.astype(x.dtype) for half in _halves(kernel.astype(jnp.float32), 0) for part in _halves(half, 1)]
    found = convolve(x, jnp.concatenate(kinds, axis=-1), (1, 1), ((1, 1), (1, 1)), **options)
    found = found.reshape(batch, h + 1, w + 1, 2, 2, -1)
    rows = [jnp.stack([found[:, i : i + h, j : j + w, i, j] for j in (0, 1)], axis=3) for i in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * h, 2 * w, -1)


class _Halves(NamedTuple):
    """The kernels of even and of odd output positions along one axis, each of length 2."""

    even: Array
    odd: Array


def _halves(kernel: Array, axis: int) -> _Halves:
    """A kernel of length 3 along `axis` -> the two kernels of length 2 that replace it."""
    first, middle, last = jnp.split(kernel, 3, axis)
    return _Halves(jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis))
