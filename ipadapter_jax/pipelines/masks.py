"""Where in the image an image prompt acts: masks in pixels as weights of every cross-attention's queries."""

import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.images.levels import array_to_image, eight_bits, mask_levels
from ipadapter_jax.images.preprocess import load_upright
from ipadapter_jax.inputs.arrays import AnyArray, image_array, is_array
from ipadapter_jax.pipelines.feature_encoder import ImageLike


def load_mask(
    source: ImageLike, height: int, width: int, what: str = "mask", shape: tuple[int, int] | None = None
) -> np.ndarray:
    """An image file, a PIL image or an array as a mask (height, width) float32 in [0, 1], 1 being inside. One rule
    for all of them:

    - a layer painted in one color on a transparent ground is inside where it is painted, whatever the color;
    - whole numbers 0 and 1, in an array of one channel, a gray image or a palette, are outside and inside, unless the
      image comes from a JPEG or the like, which makes such numbers of black;
    - one color on black is inside as far as it is painted;
    - all else counts by its brightness: white inside, black and transparent outside, gray in between.

    Arrays are (H, W), with axes of 1 and with channels too, of numpy, jax or torch. `shape`: height and width of what
    the mask was drawn for, if not these. Raises InputError, with `what` in the message, when it is none or has other
    proportions. Whether anything is inside, `check_inside` says.
    """
    levels = _levels_of_array(source, what) if is_array(source) else _levels(load_upright(source), what)
    image = Image.fromarray(levels)
    rows, columns = shape or (height, width)
    if abs(image.width * rows - image.height * columns) > 0.02 * image.width * rows:
        raise InputError(
            f"the {what} is {image.width} x {image.height} pixels, the image {columns} x {rows}: give a mask of "
            "the same shape"
        )
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 255


_NEARLY_BLACK = 0.1


def check_inside(mask: np.ndarray, what: str, multiple: int) -> None:
    """Raises InputError for a mask (H, W) in which nothing is inside, or nearly nothing; warns when what is inside is
    smaller than a point of the latents, which has `multiple` pixels along each side."""
    brightest = float(mask.max())
    if brightest < _NEARLY_BLACK:
        raise InputError(
            f"the {what} is black ({brightest * 255:.0f} of 255 at most): nothing is inside; paint what is to be "
            "inside white, or leave the mask out"
        )
    _warn_of_little(mask, what, multiple, stacklevel=4)


def _warn_of_little(mask: np.ndarray, what: str, multiple: int, stacklevel: int) -> None:
    if (area := float(mask.sum())) < multiple**2:
        warnings.warn(
            f"the {what} has about {area:.0f} pixels inside, fewer than one point of the latents: little will come of "
            "it; paint a larger part white",
            stacklevel=stacklevel,
        )


def _levels_of_array(source: AnyArray, what: str) -> np.ndarray:
    """(H, W) uint8."""
    name = f"the {what}, an image array,"
    array = image_array(source, name)
    if array.ndim > 2 and array.size and array.size == array.shape[-2] * array.shape[-1]:
        array = array.reshape(array.shape[-2:])  # (1, H, W) as diffusers has masks
    if array.shape[2:] == (1,):
        array = array[..., 0]
    levels = mask_levels(array, name, labels=array.ndim == 2)
    return levels if array.ndim == 2 and array.size else _levels(array_to_image(levels, name), what)


def _levels(image: Image.Image, what: str) -> np.ndarray:
    """(H, W) uint8 of a PIL image of any mode."""
    may_label = _may_label(image)
    if image.mode.startswith(("I", "F")):
        return mask_levels(np.asarray(image), f"the {what}", labels=may_label)
    indices = np.asarray(image) if image.mode == "P" else None
    labels = None if indices is None or indices.max() > 1 else indices * np.uint8(255)
    if image.has_transparency_data:
        pixels = np.asarray(eight_bits(image, what).convert("RGBA"))
        colors, opacity = pixels[..., :3], pixels[..., 3]
        if opacity.min() < 255:
            if _is_one_color(colors[opacity >= min(128, opacity.max())]):
                return opacity
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), Image.fromarray(pixels))
            labels = None
    colors = np.asarray(image.convert("RGB"))
    if _is_gray(colors):
        levels = mask_levels(np.asarray(image.convert("L")), f"the {what}", labels=may_label)
        return levels if labels is None or levels.max() >= 255 * _NEARLY_BLACK else labels
    brightest = colors.reshape(-1, 3)[colors.sum(axis=-1).argmax()].astype(np.float32)
    share = colors.astype(np.float32) @ brightest / (brightest @ brightest)
    if np.abs(colors - share[..., None] * brightest).max() <= _FUZZ:  # one color on black
        return np.rint(255 * share.clip(0, 1)).astype(np.uint8)
    return np.asarray(image.convert("L")) if labels is None else labels


_LOSSY = frozenset(("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF"))  # PIL's names


def _may_label(image: Image.Image) -> bool:
    """Whether numbers 0 and 1 in an image may be labels, rather than a black that is not quite even."""
    lossy = image.format in _LOSSY or image.info.get("compression") == "jpeg"  # the latter in TIFF
    return image.mode not in ("RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV") and not lossy


_FUZZ = 24  # levels by which JPEG and rounding change a color


def _is_one_color(colors: np.ndarray) -> bool:
    return bool(np.ptp(colors, axis=0).max() <= _FUZZ) if colors.size else True


def _is_gray(colors: np.ndarray) -> bool:
    return bool((colors.max(axis=-1).astype(int) - colors.min(axis=-1)).max() <= _FUZZ)


def layer_mask(mask: np.ndarray | None, grids: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """A mask (H, W), or None for everywhere -> per layer its values (h w,) float32 at the queries, which lie on a grid
    of h x w."""
    by_grid = {grid: np.ones(grid) if mask is None else _bicubic(mask, *grid) for grid in set(grids)}
    return [by_grid[grid].reshape(-1).astype(np.float32) for grid in grids]


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


def check_latent_mask(mask: np.ndarray, multiple: int, *, sees_mask: bool) -> None:
    """Raises InputError for an inpainting mask (H, W) of which no point of the latents is inside; warns when all are,
    unless the UNet sees the mask (`sees_mask`) and is meant to generate all."""
    inside = latent_mask(mask, mask.shape[0] // multiple, mask.shape[1] // multiple)
    if not inside.any():
        raise InputError(
            f"the {argument('mask_image')} has nothing inside ({mask.max() * 255:.0f} of 255 at most, "
            f"{mask.sum():.0f} pixels): "
            "nothing would be generated; paint white what is to be replaced"
        )
    _warn_of_little(mask, argument("mask_image"), multiple, stacklevel=6)
    if inside.all() and not sees_mask:
        warnings.warn(
            f"the {argument('mask_image')} is white everywhere, so that it keeps nothing of the image; leave it out "
            "for image-to-image",
            stacklevel=5,
        )
