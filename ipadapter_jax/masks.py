"""Where in the picture an image prompt acts: masks in pixels as weights of every cross-attention's queries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.preprocess import load_image


def load_mask(
    source: Any, height: int, width: int, what: str = "mask", shape: tuple[int, int] | None = None
) -> np.ndarray:
    """A picture file, a PIL picture or an array as a mask (height, width) float32 in [0, 1], white or 1 being inside
    and what is transparent outside.

    Grey is kept. `shape`: height and width of what the mask was drawn for, if not these. Raises InputError, with `what`
    in the message, when it is none or has other proportions.
    """
    if isinstance(source, np.ndarray) and source.ndim > 2 and source.size == source.shape[-2] * source.shape[-1]:
        source = source.reshape(source.shape[-2:])  # (1, H, W) as diffusers has masks
    if isinstance(source, np.ndarray) and source.dtype.kind in "biu" and set(np.unique(source)) <= {0, 1}:
        source = source.astype(np.float32)
    picture = load_image(source, background="black").convert("L")
    rows, columns = shape or (height, width)
    if abs(picture.width * rows - picture.height * columns) > 0.02 * picture.width * rows:
        raise InputError(
            f"the {what} is {picture.width} x {picture.height} pixels, the picture {columns} x {rows}: give a mask of "
            "the same shape"
        )
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32) / 255


def site_masks(masks: Sequence[np.ndarray | None], grids: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Masks (H, W) of E entries, or None for everywhere -> per site their values at its queries, (E, L)."""
    made = {grid: [np.ones(grid) if mask is None else _bicubic(mask, *grid) for mask in masks] for grid in set(grids)}
    return [np.reshape(made[h, w], (len(masks), h * w)).astype(np.float32) for h, w in grids]


def _bicubic(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(H, W) -> (rows, columns), each point from the 4 x 4 pixels around it as PyTorch's interpolate does (a = -0.75,
    no smoothing before), which is how diffusers shrinks masks; overshoot is kept."""
    return _matrix(rows, image.shape[0]) @ image.astype(np.float64) @ _matrix(columns, image.shape[1]).T


def _matrix(made: int, given: int) -> np.ndarray:
    a, at = -0.75, (np.arange(made) + 0.5) * given / made - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((made, given))
    for neighbour in range(-1, 3):
        d = np.abs(at - (first + neighbour))
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(matrix, (np.arange(made), np.clip(first + neighbour, 0, given - 1)), np.where(d <= 1, near, far))
    return matrix


def latent_mask(mask: np.ndarray, h: int, w: int) -> np.ndarray:
    """An inpainting mask (H, W) -> (h, w) of 0 and 1: the nearest pixel of each latent, from one half on."""
    rows, columns = (np.arange(n) * size // n for n, size in ((h, mask.shape[0]), (w, mask.shape[1])))
    return (mask[np.ix_(rows, columns)] >= 0.5).astype(np.float32)
