"""Reads the files of `numpy.save`, such as image embeddings."""

from pathlib import Path

import numpy as np

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.formats.torch_pickle import UNNAMED
from ipadapter_jax.weights.lazy import LazyTransform, Tensor


def read_numpy_file(path: Path) -> dict[str, Tensor]:
    """The array under the name UNNAMED. Raises WeightFileError naming the file for pickled objects, which are never
    loaded, and for arrays of anything but numbers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightFileError(
            f"{path}: not a weight file, nor a complete array of NumPy ({reason}); save it again"
        ) from None
    if array.dtype.kind not in "fiub":
        raise WeightFileError(f"{path}: an array of {array.dtype}, not of numbers; save what the encoder gives")
    dtype = array.dtype.newbyteorder("=")
    return {UNNAMED: LazyTransform(array.shape, dtype, lambda: np.ascontiguousarray(array, dtype))}
