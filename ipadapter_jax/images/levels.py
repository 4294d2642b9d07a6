"""Conversion to 8 bits: from floats, from 16 bits, and from PIL modes of these."""

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError


def to_uint8(images: np.ndarray, name: str = "the image array") -> np.ndarray:
    """Floats in [0, 1] of any shape, as a rule (B, H, W, 3), to uint8, rounded as by diffusers' `numpy_to_pil`.

    Raises InputError, with `name` in the message, for integers, NaN and values outside [0, 1].
    """
    values = np.asarray(images)
    if values.dtype.kind in "biuc":
        raise InputError(f"{name} has dtype {values.dtype}: give floats in [0, 1]")
    values = values.astype(np.float32)  # also from bfloat16
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinite values: repair or recompute it")
    if values.size and (values.min() < 0 or values.max() > 1):
        raise InputError(f"{name} has values from {values.min():g} to {values.max():g}: scale them to [0, 1]")
    return (values * 255).round().astype(np.uint8)


def eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Modes that PIL would clip (I;16*, I = 16 bits in 32, F = 0..1 or 0..255) as L; other modes are unchanged."""
    if not image.mode.startswith(("I", "F")):
        return (
            image.convert("LA") if image.mode == "La" else image
        )  # the only conversion of PIL from premultiplied gray
    values = np.asarray(image)
    if image.mode == "F":
        return array_to_image(values / 255 if 1 < values.max() <= 255 else values, name)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{name} has gray values beyond 16 bits (0..65535): save it with 8 or 16 bits")
    transparent = image.info.get("transparency")  # one gray value, in PNG
    return array_to_image(np.where(values == transparent, 65535, values).astype(np.uint16), name)


def array_to_image(array: np.ndarray, name: str) -> Image.Image:
    """(H, W) or (H, W, 1 | 3 | 4) of uint8, uint16 or floats in [0, 1] as a PIL image. Raises InputError for others."""
    if array.shape[2:] not in ((), (1,), (3,), (4,)) or array.ndim < 2 or array.size == 0:
        raise InputError(f"{name} has shape {array.shape}: make it (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype.kind == "f":
        array = to_uint8(array, name)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = _from_sixteen_bits(array)
    elif array.dtype != np.uint8:
        raise InputError(f"{name} has dtype {array.dtype}: make it uint8, uint16 or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def mask_levels(array: np.ndarray, name: str, *, labels: bool) -> np.ndarray:
    """The values of a mask as uint8, read by their range rather than by their dtype.

    Booleans are outside and inside, and so are integers up to 1 if they may be `labels`. Integers up to 255 are levels
    of 8 bits, larger ones of 16 bits. Floats in [0, 1] are fractions.
    Raises InputError, with `name` in the message, for other numbers.
    """
    if array.dtype.kind == "f":
        whole = array.size and np.isfinite(array).all() and array.max() > 1 and (array == np.rint(array)).all()
        if not whole:
            return to_uint8(array, name)
        array = array.astype(np.int64)
    if array.dtype.kind not in "biu":
        raise InputError(f"{name} has dtype {array.dtype}: make it integers, booleans or floats in [0, 1]")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > 65535:
        raise InputError(f"{name} has values from {low} to {high}: scale them to 0..255 or to [0, 1]")
    if array.dtype.kind == "b" or (labels and high <= 1):
        return array.astype(np.uint8) * np.uint8(255)
    return array.astype(np.uint8) if high <= 255 else _from_sixteen_bits(array)


def _from_sixteen_bits(array: np.ndarray) -> np.ndarray:
    return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)  # round(x / 257) in integers
