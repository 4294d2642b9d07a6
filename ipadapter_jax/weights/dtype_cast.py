"""Arrays of a file in another dtype, all of their numbers finite: for a device, or for another file."""

import math

import numpy as np

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.lazy import LazyTransform, Tensor

_ALIGNMENT = 64  # jax uses a CPU array with this alignment without copying it
_COLUMNS, _BLOCK = 1024, 1 << 18  # elements of the last axis, and in all, that are copied at a time: they stay in cache


def cast(array: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """The array in `dtype`, with its axes in the same order in memory; the array itself if that is its dtype.

    Raises WeightFileError naming `what`, the tensor, when a number is not finite or does not fit `dtype`.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # reported just below, with the tensor's name
        found = array.astype(dtype, copy=False)
    if not all_finite(found):
        raise _not_finite(array, dtype, what)
    return found


def cast_tensor(tensor: Tensor, dtype: np.dtype | None, what: str) -> LazyTransform:
    """The tensor in `dtype`, cast when it is read; None keeps its dtype, except that float64 becomes float32. Reading
    it raises WeightFileError as `cast`."""
    stored = np.dtype(np.float32) if tensor.dtype == np.float64 else tensor.dtype
    target = stored if dtype is None else dtype
    return LazyTransform(tensor.shape, target, lambda: cast(tensor.read(), target, what))


def cast_for_device(view: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """An aligned copy in `dtype` and C order of an array from a file, which may be transposed.

    It is brought into C order in the dtype of the file first, then cast: each of the two runs near the speed of memory,
    while numpy alone iterates over a transposed array against the cache. Raises WeightFileError as `cast`.
    """
    array = _aligned(view.shape, dtype)
    if not view.flags.c_contiguous:
        view = _ordered(view, array if view.dtype == dtype else np.empty(view.shape, view.dtype))
    source, target = view.reshape(-1), array.reshape(-1)
    blocks = [slice(i, i + _BLOCK) for i in range(0, view.size, _BLOCK)]
    with np.errstate(over="ignore", invalid="ignore"):  # reported just below, with the tensor's name
        if not all(_cast_block(source[block], target[block]) for block in blocks):
            raise _not_finite(view, dtype, what)
    return array


def _not_finite(array: np.ndarray, dtype: np.dtype, what: str) -> WeightFileError:
    if np.isfinite(array).all():
        largest = float(np.abs(array).max())
        remedy = "another file" if dtype == np.float32 else "float32"
        return WeightFileError(f"{what} reaches {largest:.3g}, too large for {dtype}; use {remedy}")
    return WeightFileError(
        f"{what} holds NaN or infinity: the file is damaged or its training diverged; use another file or an earlier "
        "checkpoint"
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = dtype.itemsize * math.prod(shape)
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _ordered(view: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Copies a transposed array into `out`, tile by tile."""
    if view.ndim < 2:  # one axis with gaps, as a damaged file may declare
        out[...] = view
        return out
    rows = max(1, _BLOCK // (_COLUMNS * max(1, math.prod(view.shape[:-2]))))
    for row in range(0, view.shape[-2], rows):
        for column in range(0, view.shape[-1], _COLUMNS):
            tile = ..., slice(row, row + rows), slice(column, column + _COLUMNS)
            out[tile] = view[tile]
    return out


# From the bits of a 16-bit float to those of a float32: shift them to their places, mask the copies of the sign, then
# multiply by 2 ** (difference of the exponent biases). Exact for finite numbers; numpy's own cast takes four times
# as long.
_WIDENING = {"float16": (13, ~0x70000000, 2.0**112), "bfloat16": (16, ~0, 1.0)}


def _cast_block(block: np.ndarray, out: np.ndarray) -> bool:
    """Writes the numbers into `out` in its dtype. False when one is not finite there."""
    if out.dtype != np.float32 or block.dtype.name not in _WIDENING:
        np.copyto(out, block, casting="unsafe")
        return all_finite(out)
    shift, mask, factor = _WIDENING[block.dtype.name]
    bits = block.view(np.int16).astype(np.int32)
    bits <<= shift
    bits &= np.int32(mask)
    np.multiply(bits.view(np.float32), np.float32(factor), out=out)
    return all_finite(block)


_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}


def all_finite(array: np.ndarray) -> bool:
    """Whether a floating-point array has neither NaN nor infinity.

    Both have all exponent bits set. Read as integers they are therefore larger than every finite number of their sign:
    the positive ones among signed, the negative ones among unsigned integers.
    """
    infinity, bits = _INFINITY[array.dtype.name], 8 * array.dtype.itemsize
    signed, unsigned = array.view(f"i{bits // 8}"), array.view(f"u{bits // 8}")
    return not array.size or bool(signed.max() < infinity and unsigned.max() < infinity + 2 ** (bits - 1))
