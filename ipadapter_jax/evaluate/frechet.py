"""The Frechet distance of two sets of features (arXiv 1706.08500), from sums that are accumulated batch by batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.nearby_paths import nearby_hint
from ipadapter_jax.weights.formats.tensor_files import open_tensors

_MAX_NUMBERS = 1 << 14  # features of an image: the covariances take 2 GiB
_BLOCK = 4096  # images of a file in memory at a time


class Moments:
    """Accumulates features (N, D): their number, sum (D,) and sum of outer products (D, D), in float64."""

    def __init__(self, width: int):
        self.count, self.total, self.outer = 0, np.zeros(width), np.zeros((width, width))

    def add(self, features: np.ndarray) -> None:
        """Adds features (B, D)."""
        features = np.asarray(features, np.float64)
        self.count += len(features)
        self.total += features.sum(axis=0)
        self.outer += features.T @ features

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (D, D), with N - 1; zeros for a single image."""
        return (self.outer - np.outer(self.total, self.mean)) / max(self.count - 1, 1)


class Distance(float):
    """A Frechet distance, with the number of images on either side and the number of features."""

    images: tuple[int, int]
    features: int

    @classmethod
    def between(cls, a: Moments, b: Moments) -> Self:
        found = cls(frechet_distance(a, b))
        found.images, found.features = (a.count, b.count), len(a.total)
        return found

    @property
    def caveat(self) -> str | None:
        """A warning if the covariance of one side cannot have full rank, so that the number means little; else None."""
        if min(self.images) > self.features:
            return None
        return (
            f"biased: {self.images[0]:,} and {self.images[1]:,} images for {self.features:,} features; compare only "
            "with distances of as many images"
        )


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), the squared distance of two normal distributions.

    A B has the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: they are real, also with fewer images than
    features.
    """
    root = _root(a.covariance)
    shared = np.linalg.eigvalsh(root @ b.covariance @ root)
    traces = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(shared, 0)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + traces)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def distance_of_files(real: Path, made: Path) -> Distance:
    """The Frechet distance of features (N, F) in two files; with Inception's features it is the FID. Raises InputError
    naming what is wrong with a file."""
    a, b = moments_of_file(real), moments_of_file(made)
    if len(a.total) != len(b.total):
        raise InputError(f"{real} has features of {len(a.total)} numbers and {made} of {len(b.total)}; use one network")
    return Distance.between(a, b)


def moments_of_file(path: Path) -> Moments:
    """The moments of features (N, F), N >= 2, in a .npy file, or of the only array in a .safetensors file. Raises
    InputError."""
    array = _array(path)
    if array.ndim != 2 or array.dtype.kind != "f" or len(array) < 2 or not array.shape[1]:
        raise InputError(
            f"{path} holds an array {array.shape} of {array.dtype}; give float features (images, numbers) of at "
            "least 2 images"
        )
    if array.shape[1] > _MAX_NUMBERS:
        raise InputError(f"{path} holds {array.shape[1]:,} numbers of each image; give at most {_MAX_NUMBERS:,}")
    moments = Moments(array.shape[1])
    for block in _blocks(array):
        if not np.isfinite(block).all():
            raise InputError(f"{path} holds NaN or infinite features; compute them again")
        moments.add(block)
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
            raise ValueError("the file is an archive of arrays")
        return found
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file{nearby_hint(path)}") from None
    except (OSError, ValueError, OverflowError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read as an array of numpy ({reason}); save it with numpy.save") from None


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (np.asarray(array[start : start + _BLOCK]) for start in range(0, len(array), _BLOCK))
