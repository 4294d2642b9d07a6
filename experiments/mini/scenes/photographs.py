"""Crops of the photographs in scikit-image and scikit-learn, with captions.

Most are in the public domain or CC0; the two of scikit-learn are by danielbuechele (china.jpg) and vultilion
(flower.jpg) under CC BY 2.0. docs/mini.md credits each.
"""

import functools

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError

CAPTIONS = {
    "astronaut": "an astronaut",
    "brick": "a brick wall",
    "camera": "a man with a camera",
    "cell": "a cell",
    "chelsea": "a cat",
    "clock": "a clock",
    "coffee": "a cup of coffee",
    "coins": "coins",
    "grass": "grass",
    "gravel": "gravel",
    "hubble_deep_field": "galaxies",
    "immunohistochemistry": "tissue under a microscope",
    "moon": "the moon",
    "page": "a page of a book",
    "retina": "a retina",
    "rocket": "a rocket",
    "stereo_motorcycle": "a motorcycle",
    "text": "handwriting",
    "china.jpg": "a temple",
    "flower.jpg": "a flower",
}
NAMES = tuple(CAPTIONS)
_BEGINNINGS = ("a photograph of ", "a photo of ", "")


def photograph(name: str) -> Image.Image:
    """The photograph `name` of NAMES, in RGB and full size. Raises InputError if its library is not installed."""
    try:
        if name.endswith(".jpg"):
            import sklearn.datasets

            return Image.fromarray(sklearn.datasets.load_sample_image(name))
        import skimage.data

        found = getattr(skimage.data, name)()
    except ImportError as error:
        raise InputError(f"{error}: the photographs come with it; pip install 'ipadapter-jax[scenes]'") from None
    return Image.fromarray(found[0] if isinstance(found, tuple) else found).convert("RGB")  # a tuple is a stereo pair


def crop(rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
    """A random square of a random photograph, (side, side, 3) uint8, and a caption."""
    name = NAMES[int(rng.integers(len(NAMES)))]
    image = _reduced(name, 2 * side)
    width = rng.uniform(side, min(image.size))
    left, top = (rng.uniform(0, length - width) for length in image.size)
    box = (left, top, left + width, top + width)
    square = image.resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=None)
    if rng.random() < 0.5:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(square), str(rng.choice(_BEGINNINGS)) + CAPTIONS[name]


@functools.lru_cache(maxsize=64)
def _reduced(name: str, side: int) -> Image.Image:
    """The photograph, resized to `side` pixels along its shorter side."""
    image = photograph(name)
    factor = side / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)
