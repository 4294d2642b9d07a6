"""Arrays of numpy, jax and torch, and whatever else has numpy's array interface, as arrays of numpy.

torch is never imported: a tensor's own methods bring it here.
"""

from typing import Any, TypeVar

import numpy as np

from ipadapter_jax.errors import InputError

Given = TypeVar("Given")


def is_array(value: Any) -> bool:
    """Whether this is an array of any library; numbers, lists and PIL images are not arrays."""
    if isinstance(value, np.ndarray) or _is_tensor(value):
        return True
    return hasattr(value, "__array__") and hasattr(value, "dtype") and getattr(value, "ndim", 0) > 0


def to_numpy(value: Any, name: str) -> np.ndarray:
    """The array in numpy, on the host and without a gradient; shapes stay, and so do dtypes, but for short floats that
    numpy itself lacks (bfloat16, float8), which become float32. Lists of numbers, and of arrays, become one array.

    Raises InputError naming the argument for what is no array, such as rows of unequal length.
    """
    try:
        array = np.asarray(_off_device(value))
    except Exception as error:  # every library has its own kinds
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{name} could not be read as an array ({why}); give one of numbers") from None
    return array.astype(np.float32) if _is_extended(array.dtype) else array


def to_python_number(value: Given) -> Given:
    """A number of numpy, jax or torch as Python's own, in lists too; whatever else, as it is."""
    found: Any = value
    if type(found) in (list, tuple):
        return type(found)(map(to_python_number, found))
    return found.tolist() if hasattr(found, "tolist") and getattr(found, "ndim", 1) == 0 else found


def image_array(value: Any, name: str) -> np.ndarray:
    """An image as an array with its channels last. A tensor of torch has them first, (C, H, W) or (1, C, H, W), unless
    only its last axis can be the channels. Raises InputError as `to_numpy`."""
    array = to_numpy(value, name)
    if not _is_tensor(value):
        return array
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return np.moveaxis(array, 0, -1)
    return array


def _is_tensor(value: Any) -> bool:
    """Of torch, by the methods that no other array has together."""
    return all(hasattr(value, name) for name in ("detach", "cpu", "numpy", "float"))


def _off_device(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_off_device(item) for item in value]
    if not _is_tensor(value):
        return value
    tensor = value.detach().cpu()
    short = str(tensor.dtype).removeprefix("torch.").startswith(("bfloat16", "float8_"))
    return (tensor.float() if short else tensor).numpy()


def _is_extended(dtype: np.dtype) -> bool:
    return dtype.name.startswith(("bfloat16", "float4_", "float6_", "float8_"))
