"""Data of the experiments: held-out scenes as image prompts, training data, and scenes in another drawing style."""

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from experiments.mini.scenes.captions import caption
from experiments.mini.scenes.examples import Example, example
from experiments.mini.scenes.render import render
from experiments.mini.scenes.scene import SHAPES, Scene, generator, make_scene

INK, CHALK = (18, 18, 18), (242, 242, 242)  # colors of outlines; CHALK is used on black backgrounds
LINE = 0.035  # width of an outline, as a fraction of the image's side
_WORDS = 16  # a stream of random draws that no data set uses


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A held-out scene of one object as image prompt. It depends on its index only."""

    index: int
    scene: Scene
    pixels: np.ndarray  # (64, 64, 3) uint8
    caption: str  # names every attribute
    other_shape: str  # a shape that the object does not have
    other_caption: str


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A crop of a photograph as image prompt. The training data have other crops of the same photographs."""

    index: int
    pixels: np.ndarray  # (64, 64, 3) uint8


@functools.cache
def photograph(index: int) -> Photograph:
    return Photograph(index, example("held_out", index, photographs=1.0).pixels)


@functools.cache
def prompt(index: int) -> Prompt:
    scene, rng = make_scene("held_out", index, 1), generator("held_out", index, _WORDS)
    words = caption(scene, rng, whole=True)
    other = str(rng.choice([shape for shape in SHAPES if shape != scene.things[0].shape]))
    return Prompt(index, scene, render(scene), words, other, f"a {other}")


def inked(scene: Scene) -> Scene:
    """The scene in another drawing style: every object has an outline of ink."""
    ink = CHALK if scene.background == "black" else INK
    things = []
    for thing in scene.things:
        line = dataclasses.replace(thing, texture="plain", rgb=ink, radius=thing.radius + LINE)
        things += [line, thing]
    return dataclasses.replace(scene, things=tuple(things))


def plain_example(index: int) -> Example:
    return example("train", index)


def inked_example(index: int) -> Example:
    """An example of the training split, with ink outlines. Photographs are unchanged."""
    made = example("train", index)
    return made if made.scene is None else dataclasses.replace(made, pixels=render(inked(made.scene)))


def write_examples(path: Path, draw: Callable[[int], Example], count: int) -> None:
    """Writes images and captions of the first `count` examples as Parquet, unless the file exists. It gets its name
    when it is complete."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part, schema = path.with_suffix(".part"), pa.schema({"image": pa.binary(), "text": pa.string()})
    with pq.ParquetWriter(part, schema, compression="none") as writer:
        for rows in _rows(draw, count):
            writer.write_table(pa.Table.from_pylist(rows, schema))
    part.rename(path)


def _rows(draw: Callable[[int], Example], count: int, group: int = 100) -> Iterator[list[dict]]:
    for start in range(0, count, group):
        made = [draw(index) for index in range(start, min(start + group, count))]
        yield [{"image": _png(one.pixels), "text": one.text} for one in made]


def _png(pixels: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        return file.getvalue()
