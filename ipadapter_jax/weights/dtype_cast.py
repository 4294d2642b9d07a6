"""From an array as a file stores it to one as a device takes it: another dtype, another order of axes, finite."""

import math

import numpy as np

from ipadapter_jax.errors import WeightFileError

_ALIGNMENT = 64  # from here on jax uses an array of the CPU without copying it
_COLUMNS, _BLOCK = 1024, 1 << 18  # elements of the last axis and in all that are copied at a time: they stay in cache


def converted(view: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """A finite, aligned copy in `dtype`, C order, of an array from a file, which may be transposed.

    Ordered first, in the dtype of the file, then cast: each of the two is near the speed of memory, while numpy alone
    walks a transposed array against the cache. Raises WeightFileError naming `what`, the tensor, when it is not finite.
    """
    array = _aligned(view.shape, dtype)
    if not view.flags.c_contiguous:
        view = _ordered(view, array if view.dtype == dtype else np.empty(view.shape, view.dtype))
    source, target = view.reshape(-1), array.reshape(-1)
    blocks = [slice(i, i + _BLOCK) for i in range(0, view.size, _BLOCK)]
    with np.errstate(over="ignore", invalid="ignore"):  # reported just below, with the tensor's name
        if all(_cast(source[block], target[block]) for block in blocks):
            return array
        if np.isfinite(view).all():
            raise WeightFileError(f"{what} has numbers too large for {dtype}; use a wider dtype")
    raise WeightFileError(f"{what} holds NaN or infinity; use another file")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = dtype.itemsize * math.prod(shape)
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _ordered(view: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Copies a transposed array into `out`, whose last axes are the first of the source as a rule."""
    if view.ndim < 2:  # with gaps: a damaged file can say so
        out[...] = view
        return out
    rows = max(1, _BLOCK // (_COLUMNS * max(1, math.prod(view.shape[:-2]))))
    for row in range(0, view.shape[-2], rows):
        for column in range(0, view.shape[-1], _COLUMNS):
            tile = ..., slice(row, row + rows), slice(column, column + _COLUMNS)
            out[tile] = view[tile]
    return out


# How the bits of a short float become those of a float32: shifted to their places, without the copies of the sign, and
# times 2 ** (difference of the exponents' bias). Exact for finite numbers; numpy's own cast takes four times as long.
_WIDENING = {"float16": (13, ~0x70000000, 2.0**112), "bfloat16": (16, ~0, 1.0)}


def _cast(block: np.ndarray, out: np.ndarray) -> bool:
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
    """No NaN and no infinity. Both have all exponent bits set: as integers they lie above every finite number of their
    sign, positive ones among the signed and negative ones among the unsigned integers."""
    infinity, bits = _INFINITY[array.dtype.name], 8 * array.dtype.itemsize
    signed, unsigned = array.view(f"i{bits // 8}"), array.view(f"u{bits // 8}")
    return not array.size or bool(signed.max() < infinity and unsigned.max() < infinity + 2 ** (bits - 1))
