"""Converts arrays of numpy, jax, torch and any library with numpy's array interface to numpy.

torch is never imported: a tensor is converted by its own methods.
"""

from collections.abc import Iterator
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np

from ipadapter_jax.errors import InputError

Given = TypeVar("Given")


class _Tensor(Protocol):
    """What is used of a torch tensor."""

    dtype: object

    def detach(self) -> "_Tensor": ...
    def cpu(self) -> "_Tensor": ...
    def float(self) -> "_Tensor": ...
    def numpy(self) -> np.ndarray: ...


class AnyArray(Protocol):
    """What arrays of numpy, jax, torch and other libraries with numpy's array interface have in common."""

    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> object: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator["AnyArray"]: ...
    def __getitem__(self, index: int, /) -> "AnyArray": ...
    def __array__(self) -> np.ndarray: ...


def is_array(value: object) -> TypeGuard[AnyArray]:
    """Whether a value is an array of any library. Numbers, lists and PIL images are not arrays."""
    if isinstance(value, np.ndarray) or _is_tensor(value):
        return True
    return hasattr(value, "__array__") and hasattr(value, "dtype") and getattr(value, "ndim", 0) > 0


def to_numpy(value: object, name: str) -> np.ndarray:
    """The array in numpy, on the host and without a gradient, with the same shape. The dtype stays, but floats that
    numpy itself lacks (bfloat16, float8) become float32. A list of numbers or of arrays becomes one array.

    Raises InputError naming the argument for what is not an array, such as rows of unequal length.
    """
    try:
        array = np.asarray(_off_device(value))
    except Exception as error:  # each library raises its own kinds
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{name} could not be read as an array ({why}); give one of numbers") from None
    return array.astype(np.float32) if _is_extended(array.dtype) else array


def to_python_number(value: Given) -> Given:
    """A scalar of numpy, jax or torch as a number of Python, also inside lists and tuples. Other values are returned as
    they are."""
    found: Any = value
    if type(found) in (list, tuple):
        return type(found)(map(to_python_number, found))
    return found.tolist() if hasattr(found, "tolist") and getattr(found, "ndim", 1) == 0 else found


def image_array(value: object, name: str) -> np.ndarray:
    """An image as a numpy array with channels last. A torch tensor is taken as (C, H, W) or (1, C, H, W), unless only
    its last axis can be the channels. Raises InputError as `to_numpy` does."""
    array = to_numpy(value, name)
    if not _is_tensor(value):
        return array
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return np.moveaxis(array, 0, -1)
    return array


def _is_tensor(value: object) -> TypeGuard[_Tensor]:
    """Whether this is a torch tensor: no other array has all of these methods."""
    return all(hasattr(value, name) for name in ("detach", "cpu", "numpy", "float"))


def _off_device(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_off_device(item) for item in value]
    if not _is_tensor(value):
        return value
    tensor = value.detach().cpu()
    short = str(tensor.dtype).removeprefix("torch.").startswith(("bfloat16", "float8_"))
    return (tensor.float() if short else tensor).numpy()


def _is_extended(dtype: np.dtype) -> bool:
    return dtype.name.startswith(("bfloat16", "float4_", "float6_", "float8_"))
