"""Small scenes with known attributes: up to three objects with shape, color, texture, size and place.

A scene depends on (split, index) only. The split `held_out` has combinations of shape, color and texture that `train`
never shows, while `train` shows each pair of such attributes.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np

from ipadapter_jax.errors import InputError

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "centre")
COLOURS = {
    "red": (215, 40, 45),
    "orange": (240, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 160, 70),
    "blue": (45, 85, 200),
    "purple": (140, 60, 170),
}
BACKGROUNDS = {
    "white": (242, 242, 242),
    "black": (18, 18, 18),
    "grey": (128, 128, 128),
    "pink": (245, 175, 200),
    "cyan": (140, 215, 225),
    "brown": (150, 105, 70),
}

Split = Literal["train", "held_out"]
Kind = tuple[str, str, str]  # shape, color, texture

_JITTER = 8  # largest random difference, in each channel, from the named color
_RADII = {"small": (0.19, 0.23), "large": (0.30, 0.36)}  # bounds of the radius, as fractions of the image's side
_SEVERAL = {2: (0.17, 0.20), 3: (0.145, 0.165)}
_TWO = ((("left", "right"), ((0.27, 0.5), (0.73, 0.5))), (("top", "bottom"), ((0.5, 0.27), (0.5, 0.73))))
_THREE = (("left", "right", "bottom"), ((0.25, 0.29), (0.75, 0.29), (0.5, 0.72)))


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object. Lengths are fractions of the image's side; x and y start at the top left corner."""

    shape: str
    colour: str
    texture: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    angle: float  # radians
    rgb: tuple[int, int, int]  # the rendered color, near the named one

    @property
    def kind(self) -> Kind:
        return self.shape, self.colour, self.texture


@dataclasses.dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    rgb: tuple[int, int, int]  # of the background, near the named color


def _is_held_out(kind: Kind) -> bool:
    """One combination in six is held out. Of the combinations with the same two attributes, at most one is held out and
    at least three are not."""
    shape, colour, texture = kind
    return (SHAPES.index(shape) + tuple(COLOURS).index(colour) + TEXTURES.index(texture)) % 6 == 0


_ALL = tuple(itertools.product(SHAPES, COLOURS, TEXTURES))
KINDS: dict[Split, tuple[Kind, ...]] = {
    "train": tuple(kind for kind in _ALL if not _is_held_out(kind)),
    "held_out": tuple(kind for kind in _ALL if _is_held_out(kind)),
}


def generator(split: Split, index: int, stream: int = 0) -> np.random.Generator:
    """The random generator of one index. Independent uses of an index have different values of `stream`.

    Raises InputError for an unknown split and a negative index.
    """
    if split not in KINDS:
        raise InputError(f"split {split!r}: scenes have the splits {' and '.join(KINDS)}; give one of them")
    if not 0 <= index < 1 << 64:
        raise InputError(f"scene {index} of {split}: give an index of 0 or more, below 2^64")
    return np.random.Generator(np.random.Philox(key=[index, list(KINDS).index(split) + 16 * stream]))


def make_scene(split: Split, index: int, count: int | None = None) -> Scene:
    """Scene `index` of a split, with `count` objects; by default one (70 %), two (20 %) or three.

    Raises InputError for an unknown split, a negative index and another count.
    """
    if count not in (None, 1, 2, 3):
        raise InputError(f"a scene of {count} objects: give a count of 1, 2 or 3")
    rng = generator(split, index)
    drawn = int(rng.choice((1, 2, 3), p=(0.7, 0.2, 0.1)))
    background = str(rng.choice(tuple(BACKGROUNDS)))
    things = _alone(split, rng) if (count or drawn) == 1 else _together(split, rng, count or drawn)
    return Scene(things, background, _near(BACKGROUNDS[background], rng))


def _alone(split: Split, rng: np.random.Generator) -> tuple[Thing, ...]:
    size, place = str(rng.choice(SIZES)), str(rng.choice(PLACES))
    radius = rng.uniform(*_RADII[size])
    reach = 0.47 - 1.15 * radius  # distance of its place from the center
    sign = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}[place]
    x, y = (0.5 + reach * s + rng.uniform(-0.02, 0.02) for s in sign)
    return (_thing(split, rng, size, place, x, y, radius),)


def _together(split: Split, rng: np.random.Generator, count: int) -> tuple[Thing, ...]:
    places, spots = _TWO[int(rng.integers(2))] if count == 2 else _THREE
    things = []
    for place, spot in zip(places, np.asarray(spots), strict=True):
        x, y = spot + rng.uniform(-0.02, 0.02, 2)
        things.append(_thing(split, rng, "small", place, x, y, rng.uniform(*_SEVERAL[count])))
    return tuple(things)


def _thing(split: Split, rng: np.random.Generator, size: str, place: str, x: float, y: float, radius: float) -> Thing:
    shape, colour, texture = KINDS[split][int(rng.integers(len(KINDS[split])))]
    angle, rgb = rng.uniform(-0.25, 0.25), _near(COLOURS[colour], rng)
    return Thing(shape, colour, texture, size, place, float(x), float(y), float(radius), float(angle), rgb)


def _near(rgb: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = np.clip(np.asarray(rgb) + rng.integers(-_JITTER, _JITTER + 1, 3), 0, 255)
    return int(r), int(g), int(b)
