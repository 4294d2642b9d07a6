"""The data set of mini: rendered scenes and some crops of photographs. An example depends on its index only."""

import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image

from experiments.mini.scenes.captions import caption
from experiments.mini.scenes.photographs import crop
from experiments.mini.scenes.render import SIDE, render
from experiments.mini.scenes.scene import Scene, Split, generator, make_scene
from ipadapter_jax.data.types import Record
from ipadapter_jax.errors import InputError

# Defaults:
COUNTS: dict[Split, int] = {"train": 40_000, "held_out": 4_000}
SHARE = 0.1  # fraction of the examples that are crops of photographs
_MIN_SIDE = 32  # in pixels; in smaller images, stripes of small objects are narrower than 2 pixels
_PHOTOGRAPHS, _CAPTIONS = 1, 2  # streams of random draws, besides that of scenes


@dataclasses.dataclass(frozen=True)
class Example:
    pixels: np.ndarray  # (side, side, 3) uint8
    text: str
    scene: Scene | None  # None for a photograph


def example(split: Split, index: int, *, side: int = SIDE, photographs: float = SHARE) -> Example:
    """Example `index` of a split. photographs: the fraction of examples that are crops of photographs.

    Raises InputError for an unknown split, a negative index, a small side, a fraction outside 0 to 1, and if the
    library of a photograph is not installed.
    """
    _check(side, photographs)
    rng = generator(split, index, _PHOTOGRAPHS)
    if rng.random() < photographs:
        return Example(*crop(rng, side), None)
    scene = make_scene(split, index)
    return Example(render(scene, side), caption(scene, generator(split, index, _CAPTIONS)), scene)


class Scenes:
    """The first `count` examples as a random-access source of records (PNG and caption), for the trainer and for grain.

    Raises InputError as `example` does.
    """

    def __init__(self, split: Split, count: int, *, side: int = SIDE, photographs: float = SHARE):
        _check(side, photographs)
        generator(split, 0)
        if count < 1:
            raise InputError(f"{count} scenes of {split}: give at least 1")
        self._split: Split = split
        self._count, self._side, self._photographs = count, side, photographs

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        made = example(self._split, index, side=self._side, photographs=self._photographs)
        return Record(self.key(index), png(made.pixels), made.text)

    def key(self, index: int) -> str:
        return f"{self._split}-{index:07d}"

    def identity(self) -> dict[str, Any]:
        drawn = {"split": self._split, "side": self._side, "photographs": self._photographs}
        return {"kind": "scenes", "records": self._count, **drawn}


def png(pixels: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8 as a PNG file."""
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


def _check(side: int, photographs: float) -> None:
    if side < _MIN_SIDE:
        raise InputError(f"scenes of {side} x {side} pixels: give a side of at least {_MIN_SIDE}")
    if not 0 <= photographs <= 1:
        raise InputError(f"a share of photographs of {photographs}: give a number from 0 to 1")
