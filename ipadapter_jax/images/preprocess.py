"""Reads any image as RGB, and crops or resizes RGB images to the squares that the networks take.

Shapes: B batch, H and W pixels, C channels. Nothing here changes the settings of PIL or the warning filters, not even
temporarily: data loaders read images in threads, and both are shared by all threads.
"""

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.images.formats import LIMITS, check_size, open_image
from ipadapter_jax.images.levels import array_to_image, eight_bits
from ipadapter_jax.images.levels import to_uint8 as to_uint8
from ipadapter_jax.images.urls import fetch, is_url
from ipadapter_jax.inputs.arrays import image_array, is_array
from ipadapter_jax.storage.nearby_paths import nearby_hint
from ipadapter_jax.storage.paths import expand_home

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FITS = ("crop", "resize", "pad")
MAX_TILES = 8
_WHOLE_LIMIT = 1 << 24  # a scaled image of up to this many pixels (64 MiB in PIL) is computed whole, then cropped
# For EXIF orientations 2 to 8:
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


def load_image(source: object, background: str = "white") -> Image.Image:
    """Any image as a new, upright, opaque PIL image of mode RGB.

    source: a file; an https URL, where the network is allowed; a PIL image; or an array (H, W) or (H, W, 1 | 3 | 4)
    of uint8, uint16 or floats in [0, 1], of numpy, jax or torch, whose tensors may have their channels first.
    EXIF orientation is applied, the first frame of an animation taken, transparency composited on white (as in
    transformers 5) or another `background`, 16 bits are scaled to 8, CMYK is converted without a profile. Warns when a
    side is 1 pixel long.
    Raises InputError: no such file, damaged, not an image, above the limits (checked undecoded), bad values, a URL.
    """
    return _loaded(source, lambda image, name: _to_rgb(image, name, background))


def load_upright(source: object) -> Image.Image:
    """The image upright, but in its own mode with palette and transparency, as masks need it. Raises as
    `load_image`."""
    return _loaded(source, _upright)


def _loaded(source: object, prepare: Callable[[Image.Image, str], Image.Image]) -> Image.Image:
    path = expand_home(os.fspath(source)) if isinstance(source, str | os.PathLike) else None
    shown = path or (getattr(source, "filename", None) if isinstance(source, Image.Image) else None)
    name = repr(shown)[:500] if shown else "the image array" if is_array(source) else "the image"

    def read() -> Image.Image:
        if isinstance(source, Image.Image):
            return prepare(source, name)
        if is_array(source):
            return prepare(array_to_image(image_array(source, name), name), name)
        place = io.BytesIO(fetch(path)) if path and is_url(path) else _checked_path(path, name)
        with open_image(place, name) as file:
            return prepare(file, name)

    image = _errors_naming(read, name)
    if min(image.size) == 1:
        warnings.warn(f"{name} is only 1 pixel wide or high: no shape is left in it; use a larger one", stacklevel=3)
    return image


def decode_image(data: bytes, name: str) -> Image.Image:
    """`load_image` for the bytes of an image file, which messages call `name`. Does not warn of a side of 1 pixel.

    Thread-safe. Raises InputError: damaged, not an image, above the limits (checked undecoded).
    """
    name = repr(name)[:500]

    def read() -> Image.Image:
        with open_image(io.BytesIO(data), name) as file:
            return _to_rgb(file, name)

    return _errors_naming(read, name)


def clip_pixel_values(
    images: Sequence[Image.Image], size: int = 224, fit: str = "crop", mean=CLIP_MEAN, std=CLIP_STD
) -> np.ndarray:
    """Pixel values for the CLIP image encoder, (B, size, size, 3) float32.

    images: B images, or anything else that `load_image` takes. fit, always bicubic in uint8:
    - "crop": the shortest edge becomes `size`, then the center is cut out. Equal to CLIPImageProcessorPil of
      transformers; above an aspect of 1:334 (at size 224) one value in a thousand may differ by a gray level or two.
    - "resize": stretched to the square; nothing is lost, but the aspect ratio changes.
    - "pad": the longest edge becomes `size`; the borders get the mean color, exactly 0 after normalization. Zeros add
      nothing in the encoder's bias-free patch convolution and are what IP-Adapter plus feeds for a dropped image; a
      black or white border would be image content, for the adapter to imitate.
    Raises InputError for an unknown fit, a size below 1, a bare image in place of a list, and as `load_image` does.
    """
    if fit not in FITS or size < 1:
        raise InputError(f"fit={fit!r}, size={size}: choose fit from {', '.join(FITS)} and a size of at least 1")
    if isinstance(images, str | os.PathLike | Image.Image) or is_array(images):
        raise InputError(f"images is a single {type(images).__name__}: put the images in a list")
    table = _normalization(mean, std)
    values = np.zeros((len(images), size, size, 3), np.float32)  # zero is the pad color
    for out, source in zip(values, images, strict=True):
        image = load_image(source)
        if fit == "crop":
            image = _clip_crop(image, size)
        else:
            width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
            image = image.resize((size, size) if fit == "resize" else (width, height), Image.Resampling.BICUBIC)
        top, left = (size - image.height) // 2, (size - image.width) // 2
        out[top : top + image.height, left : left + image.width] = table[np.asarray(image), [0, 1, 2]]
    return values


def square_tiles(image: Image.Image) -> list[Image.Image]:
    """The fewest squares that cover an image along its longer side, evenly spaced, so that nothing is cropped. Raises
    InputError above MAX_TILES."""
    short, long = sorted(image.size)
    count = -(-long // short)
    if count > MAX_TILES:
        raise InputError(
            f"an image of {image.width} x {image.height} would be {count} tiles, at most {MAX_TILES}: crop it"
        )
    starts = [round(i * (long - short) / max(1, count - 1)) for i in range(count)]
    wide = image.width > image.height
    return [image.crop((s, 0, s + short, short) if wide else (0, s, short, s + short)) for s in starts]


def clip_pixels(image: Image.Image, size: int = 224) -> np.ndarray:
    """The pixels of `clip_pixel_values` with fit="crop" before normalization, (size, size, 3) uint8. `image`: RGB.

    CLIP_TABLE[clip_pixels(image), [0, 1, 2]] is bit-exactly clip_pixel_values([image])[0]: uint8 is a quarter of the
    bytes to transfer to a device, which can normalize.
    """
    return np.asarray(_clip_crop(image, size))


def square_pixels(image: Image.Image, size: int) -> np.ndarray:
    """The training pixels of IP-Adapter's authors: the shortest side resized to `size`, then a center crop, (size,
    size, 3) uint8.

    `image`: RGB. Equal to Resize(size, BILINEAR) and CenterCrop(size) of torchvision on PIL images, which antialias; an
    image whose shortest side is `size` already is only cropped.
    """
    # CenterCrop rounds half to even; CLIP's crop rounds down.
    return np.asarray(_crop(image, size, Image.Resampling.BILINEAR, lambda spare: round(spare / 2)))


def _normalization(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The table from gray level and channel to the encoder's value, (256, 3) float32."""
    unit = (np.arange(256) * (1 / 255)).astype(np.float32)  # rounded as in transformers: float64, then float32
    return (unit[:, None] - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


CLIP_TABLE = _normalization(CLIP_MEAN, CLIP_STD)


def image_grid(images: Sequence[Image.Image] | np.ndarray, columns: int | None = None) -> Image.Image:
    """One RGB image of all `images` (images or (B, H, W, 3) uint8), row by row on white; nearly square by default.

    Every cell has the size of the largest image. Raises InputError without images or with columns < 1.
    """
    cells = [load_image(image) for image in images]
    columns = math.ceil(math.sqrt(len(cells))) if columns is None else min(columns, len(cells))
    if not cells or columns < 1:
        raise InputError(f"an image grid of {len(cells)} images in {columns} columns: give at least 1 of each")
    width, height = max(p.width for p in cells), max(p.height for p in cells)
    grid = Image.new("RGB", (columns * width, math.ceil(len(cells) / columns) * height), "white")
    for i, cell in enumerate(cells):
        grid.paste(cell, (i % columns * width, i // columns * height))
    return grid


def _errors_naming(read: Callable[[], Image.Image], name: str) -> Image.Image:
    """`read()`; whatever it raises becomes an InputError about `name`."""
    try:
        return read()
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{name} is far too large: {LIMITS}") from None
    except Exception as error:  # from the file system, or one of many kinds from PIL's readers
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{name} cannot be read ({why}): if damaged, download it again; else check access") from error


def _checked_path(path: object, name: str) -> str:
    if not isinstance(path, str):
        raise InputError(f"{name} is of an unknown type: give a path (str), a PIL image or an array")
    if re.match(r"(https?|ftp|s3|gs|file):/|data:", path, re.IGNORECASE):
        raise InputError(f"{name} is a URL, not a file: download it first, then give the path of the file")
    if not os.path.isfile(path):  # opening a pipe could block for ever
        if os.path.exists(path):
            raise InputError(f"{name} is a folder or device: give the path of an image file")
        raise InputError(f"{name} does not exist: give the path of an image file{nearby_hint(path)}")
    return path


def _to_rgb(image: Image.Image, name: str, background: str = "white") -> Image.Image:
    """Decodes an image, applies its orientation, and converts it to opaque 8-bit RGB."""
    image = eight_bits(_upright(image, name), name)
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    image = image.convert("RGB")
    image.info.clear()  # else a second call would rotate the image again
    return image


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Decodes an image within the limits and applies its EXIF orientation."""
    check_size(*image.size, name)
    image.load()
    try:  # not ImageOps.exif_transpose, which writes the tags back and fails for the tags of some cameras
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # with unreadable tags the image itself may be intact
        orientation = 1
    if orientation in range(2, 9):
        turned = image.transpose(Image.Transpose[_TURNS[orientation - 2]])
        turned.format = image.format  # masks depend on the file format
        return turned
    return image


def _clip_crop(image: Image.Image, size: int) -> Image.Image:
    return _crop(image, size, Image.Resampling.BICUBIC, lambda spare: spare // 2)


def _crop(image: Image.Image, size: int, resampling: Image.Resampling, offset: Callable[[int], int]) -> Image.Image:
    """Resizes the shortest edge to `size`, then crops a square (size, size).

    The new long edge is rounded down, as in transformers and torchvision. `offset` gives the start of the square from
    the number of pixels that are cropped.
    """
    wide, short, long = image.width > image.height, min(image.size), max(image.size)
    new_long = int(size * long / short)
    start = offset(new_long - size)

    def span(first, last, across):  # the box from `first` to `last` along the long edge
        return (first, 0, last, across) if wide else (0, first, across, last)

    if size * new_long <= _WHOLE_LIMIT:
        whole = image.resize((new_long, size) if wide else (size, new_long), resampling)
        return whole.crop(span(start, start + size, size))
    # A very thin image: 1 x 16384 would become 224 x 3,670,016, 3 GB in PIL. Only the cropped part is resized, with the
    # source pixels that the filter reads around it. They are cut out first: PIL stores boxes in float32, which is
    # precise only near 0.
    scale, margin = long / new_long, 3 + math.ceil(2 * long / new_long)
    low, high = start * scale, (start + size) * scale
    first, last = max(0, int(low) - margin), min(long, int(high) + margin)
    cut = image.crop(span(first, last, short))
    return cut.resize((size, size), resampling, box=span(low - first, high - first, short))
