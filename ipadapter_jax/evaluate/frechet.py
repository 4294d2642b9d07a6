"""The Frechet distance of two sets of features (arXiv 1706.08500), from sums that any number of rows is added to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.nearby_paths import nearby_hint
from ipadapter_jax.weights.formats.tensor_files import open_tensors

_MAX_NUMBERS = 1 << 14  # of an image: their covariances take 2 GiB
_BLOCK = 4096  # rows of a file in memory at once


class Moments:
    """Of rows (N, D): their number, sum (D,) and sum of outer products (D, D), in float64."""

    def __init__(self, width: int):
        self.count, self.total, self.outer = 0, np.zeros(width), np.zeros((width, width))

    def add(self, rows: np.ndarray) -> None:
        """Rows (B, D)."""
        rows = np.asarray(rows, np.float64)
        self.count += len(rows)
        self.total += rows.sum(axis=0)
        self.outer += rows.T @ rows

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """With N - 1, as is usual. Zeros for a single row."""
        return (self.outer - np.outer(self.total, self.mean)) / max(self.count - 1, 1)


class Distance(float):
    """A Frechet distance that knows how many rows it comes from, on either side, and of how many features."""

    rows: tuple[int, int]
    features: int

    @classmethod
    def between(cls, a: Moments, b: Moments) -> Self:
        found = cls(frechet_distance(a, b))
        found.rows, found.features = (a.count, b.count), len(a.total)
        return found

    @property
    def caveat(self) -> str | None:
        """Why the number means little, where the covariance of one side cannot have full rank; else None."""
        if min(self.rows) > self.features:
            return None
        return (
            f"biased: {self.rows[0]:,} and {self.rows[1]:,} images for {self.features:,} features; compare only with "
            "distances of as many images"
        )


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), the squared distance of two normal distributions.

    A B has the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: no complex numbers come up, also where there are
    fewer rows than features.
    """
    root = _root(a.covariance)
    shared = np.linalg.eigvalsh(root @ b.covariance @ root)
    traces = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(shared, 0)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + traces)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def distance_of_files(real: Path, made: Path) -> Distance:
    """The Frechet distance of features (N, F) in two files: the FID where they are those of Inception. Raises
    InputError naming what is wrong with them."""
    a, b = moments_of_file(real), moments_of_file(made)
    if len(a.total) != len(b.total):
        raise InputError(f"{real} has features of {len(a.total)} numbers and {made} of {len(b.total)}; use one network")
    return Distance.between(a, b)


def moments_of_file(path: Path) -> Moments:
    """Of an array (N, F) in a .npy file, or the only one in a .safetensors file, N >= 2. Raises InputError."""
    array = _array(path)
    if array.ndim != 2 or array.dtype.kind != "f" or len(array) < 2 or not array.shape[1]:
        raise InputError(
            f"{path} holds an array {array.shape} of {array.dtype}; give float features (images, numbers) of at "
            "least 2 images"
        )
    if array.shape[1] > _MAX_NUMBERS:
        raise InputError(f"{path} holds {array.shape[1]:,} numbers of each image; give at most {_MAX_NUMBERS:,}")
    moments = Moments(array.shape[1])
    for rows in _blocks(array):
        if not np.isfinite(rows).all():
            raise InputError(f"{path} holds NaN or infinite features; compute them again")
        moments.add(rows)
    return moments


def _array(path: Path) -> np.ndarray:
    if path.suffix != ".npy":
        tensors = open_tensors(path)
        if len(tensors) != 1:
            raise InputError(f"{path} holds {len(tensors)} arrays; give a file with the features alone")
        [tensor] = tensors.values()
        return tensor.read()
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("it is an archive of arrays")
        return found
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file{nearby_hint(path)}") from None
    except (OSError, ValueError, OverflowError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read as an array of numpy ({reason}); save it with numpy.save") from None


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (np.asarray(array[start : start + _BLOCK]) for start in range(0, len(array), _BLOCK))
