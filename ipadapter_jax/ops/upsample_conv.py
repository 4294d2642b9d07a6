"""Nearest neighbours and a 3x3 convolution of what they give, without making it where an image is doubled.

Three neighbouring rows of a doubled image hold two rows of the image: an even row sees one of them through the
first row of the kernel and the next through the sum of the other two, an odd row the other way round. The same holds of
columns, so each of the four kinds of positions is a 2x2 convolution of the image itself: 4 products where the formula
has 9.
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.ops.batch_sharding import batch_shards
from ipadapter_jax.ops.convolution import ConvolutionOptions, convolve

# Of the image, on each accelerator: with fewer, forming the sums of the kernel takes longer than they save
# (benchmarks/compile_ahead.py: at 8x8 and two rows four times as long). On a CPU tiles (winograd.py) save as much of
# the doubled image, and the gradient of a 2x2 convolution is slow there (benchmarks/convolution.py).
_FEWEST_POSITIONS = 1024


def convolve_upsampled(
    height: int, width: int, x: Array, kernel: Array, *_: object, **options: Unpack[ConvolutionOptions]
) -> Array:
    """Stands in for jax.lax.conv_general_dilated once its size is given: x (B, h, w, C), kernel (3, 3, C, C') ->
    (B, height, width, C')."""
    batch, h, w = x.shape[:3]
    many = jax.default_backend() != "cpu" and batch * h * w >= _FEWEST_POSITIONS * batch_shards()
    if many and (height, width) == (2 * h, 2 * w):
        return convolve_doubled(x, kernel, **options)
    return convolve(upsample_nearest(x, height, width), kernel, (1, 1), ((1, 1), (1, 1)), **options)


def upsample_nearest(x: Array, height: int, width: int) -> Array:
    """(B, h, w, C) -> (B, height, width, C): target pixel i reads source pixel floor(i h / height), as PyTorch's."""
    batch, h, w, channels = x.shape
    if (height, width) == (2 * h, 2 * w):  # a broadcast, cheaper than a gather
        x = jnp.broadcast_to(x[:, :, None, :, None], (batch, h, 2, w, 2, channels))
        return x.reshape(batch, height, width, channels)
    return x[:, np.arange(height) * h // height][:, :, np.arange(width) * w // width]


def convolve_doubled(x: Array, kernel: Array, **options: Unpack[ConvolutionOptions]) -> Array:
    """What `convolve` gives for the neighbours of x. Sums of the kernel are formed in float32 and rounded once.

    All four kinds come from one convolution of h + 1 by w + 1 places: the last row and column of one kind, and the
    first of the other, are thrown away.
    """
    batch, h, w = x.shape[:3]
    kinds = [part.astype(x.dtype) for half in _halves(kernel.astype(jnp.float32), 0) for part in _halves(half, 1)]
    found = convolve(x, jnp.concatenate(kinds, axis=-1), (1, 1), ((1, 1), (1, 1)), **options)
    found = found.reshape(batch, h + 1, w + 1, 2, 2, -1)
    rows = [jnp.stack([found[:, i : i + h, j : j + w, i, j] for j in (0, 1)], axis=3) for i in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * h, 2 * w, -1)


class _Halves(NamedTuple):
    """What even and odd positions see of the kernel along one axis, each two long."""

    even: Array
    odd: Array


def _halves(kernel: Array, axis: int) -> _Halves:
    """The halves along an axis of three."""
    first, middle, last = jnp.split(kernel, 3, axis)
    return _Halves(jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis))
