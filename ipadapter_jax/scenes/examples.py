"""The data set of mini: rendered scenes with crops of photographs among them, each example made from its index."""

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from ipadapter_jax.data.records import Record
from ipadapter_jax.scenes.captions import caption
from ipadapter_jax.scenes.photographs import crop
from ipadapter_jax.scenes.render import SIDE, render
from ipadapter_jax.scenes.scene import Scene, Split, generator, make_scene

_PHOTOGRAPHS, _CAPTIONS = 1, 2  # streams of random numbers beside the scenes'


@dataclasses.dataclass(frozen=True)
class Example:
    pixels: np.ndarray  # (side, side, 3) uint8
    text: str
    scene: Scene | None  # None of a photograph


def example(split: Split, index: int, *, side: int = SIDE, photographs: float = 0.1) -> Example:
    """Example `index`; a share of `photographs` of all indices are crops of photographs (with `held_out` too)."""
    rng = generator(split, index, _PHOTOGRAPHS)
    if rng.random() < photographs:
        return Example(*crop(rng, side), None)
    scene = make_scene(split, index)
    return Example(render(scene, side), caption(scene, generator(split, index, _CAPTIONS)), scene)


class Scenes:
    """Examples as a random-access source of records (PNG and caption), for the trainer and for grain."""

    def __init__(self, split: Split, count: int, *, side: int = SIDE, photographs: float = 0.1):
        self._split, self._count, self._side, self._photographs = split, count, side, photographs

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        made = example(self._split, index, side=self._side, photographs=self._photographs)
        with io.BytesIO() as file:
            Image.fromarray(made.pixels).save(file, "PNG")
            return Record(self.key(index), file.getvalue(), made.text)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def key(self, index: int) -> str:
        return f"{self._split}-{index:07d}"

    def identity(self) -> dict[str, Any]:
        drawn = {"split": self._split, "side": self._side, "photographs": self._photographs}
        return {"kind": "scenes", "records": self._count, **drawn}
