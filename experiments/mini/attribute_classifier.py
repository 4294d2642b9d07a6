"""Reads the attributes of an image by classical methods, so that no network judges the networks.

    verdicts = judge(pixels)  # (B, 64, 64, 3) uint8
    (verdicts.colour == "red").mean()

It finds the largest object of an image and compares its outline and texture with templates. The templates are renders
of experiments.mini.scenes that pass through the same steps.
tests/experiments/test_attribute_classifier.py checks the accuracy on renders; docs/results.md has the accuracy on
images after the VAE.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from experiments.mini.scenes.render import COARSE, SHADE, SIDE, render, second_tone
from experiments.mini.scenes.scene import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, Thing

UNKNOWN = "unknown"
ATTRIBUTES = ("background", "colour", "shape", "texture", "size", "place")

_RING = 3  # width in pixels of the border from which the background is read
_CONTRAST = (22.0, 34.0)  # bounds of the RGB distance between object and background; shades on black: 40
_CONTRAST_SHARE = 0.2  # the threshold as a fraction of the object's distance, within these bounds
_AREAS = (48, 0.6 * SIDE**2)  # smallest and largest area in pixels; objects of scenes have 200 to 0.4 SIDE^2
_GRID = 24  # samples along each side of an object that was scaled to one size
_REACH = 1.9  # half the width of the grid, in standard deviations of the object's pixels
_ANGLES = np.linspace(-0.25, 0.25, 7)
_SCALES = np.geomspace(0.36, 0.8, 9)  # scales of textures: radii in a standard deviation
_SCALE_ERROR = 0.12  # largest difference of log(scale) from the scale that the outline gives
_HALF, _WHOLE = np.arange(0, 0.5, 0.1), np.arange(0, 0.76, 0.095)  # phases over the periods of the patterns
_PHASES = {"plain": ((0,), (0,)), "striped": ((0,), _HALF), "dotted": (_HALF, _HALF), "checkered": (_WHOLE, _WHOLE[:4])}
_LARGE = 0.265  # an object with a larger radius is large; as a fraction of the image's side
_OFF_CENTRE = (0.0285, 0.09)  # a large, a small object that is farther from the center is off it; likewise


class Verdicts(NamedTuple):
    """The attributes of each image's largest object, by name, and the number of objects, each (B,). In an image without
    objects the count is 0, and all attributes but the background are UNKNOWN."""

    background: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    texture: np.ndarray
    size: np.ndarray
    place: np.ndarray
    count: np.ndarray


def judge(pixels: np.ndarray) -> Verdicts:
    """Reads the attributes of images (B, 64, 64, 3) uint8. Raises ValueError for another shape or dtype."""
    if pixels.ndim != 4 or pixels.shape[1:] != (SIDE, SIDE, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"judge reads images (B, {SIDE}, {SIDE}, 3) uint8, not {pixels.shape} {pixels.dtype}")
    backgrounds, counts, things = zip(*(_see(image.astype(np.float32)) for image in pixels), strict=True)
    found = [i for i, thing in enumerate(things) if thing is not None]
    names = {name: np.full(len(pixels), UNKNOWN, object) for name in ATTRIBUTES[1:]}
    if found:
        for name, values in _compare([thing for thing in things if thing is not None]).items():
            names[name][found] = values
    read = {name: values.astype(str) for name, values in names.items()}
    return Verdicts(background=np.array(backgrounds), count=np.array(counts), **read)


def truth(scenes: Sequence[Scene]) -> Verdicts:
    """The true attributes of scenes with one object: what `judge` should read in their renders."""
    own = {name: np.array([getattr(scene.things[0], name) for scene in scenes]) for name in ATTRIBUTES[1:]}
    backgrounds, counts = [scene.background for scene in scenes], [len(scene.things) for scene in scenes]
    return Verdicts(background=np.array(backgrounds), count=np.array(counts), **own)


class _Thing(NamedTuple):
    """An object cut out of its image; lengths in pixels."""

    colour: str
    centroid: tuple[float, float]  # x, y
    deviation: float  # standard deviation of its pixels from the centroid
    cover: np.ndarray  # (_GRID^2,) in [0, 1]: its outline, scaled to one size
    tone: np.ndarray  # (_GRID^2,) in [0, 1]: where the second tone is
    inside: np.ndarray  # (_GRID^2,) in [0, 1]: where the background does not mix with the tone


def _see(image: np.ndarray) -> tuple[str, int, _Thing | None]:
    """An image (H, W, 3) -> its background, the number of objects, and the largest object."""
    background, rgb = _background(image)
    labels, areas = _objects(_length(image - rgb))
    if not len(areas):
        return background, 0, None
    whole: Any = ndimage.binary_fill_holes(labels == 1 + int(np.argmax(areas)))
    inside: Any = ndimage.binary_erosion(whole, iterations=2)
    colour = _colour(image[inside if inside.any() else whole])
    primary = np.asarray(COLOURS[colour], np.float32)
    tone = np.clip((1 - image @ primary / (primary @ primary)) / (1 - SHADE), 0, 1)
    rows, columns = np.nonzero(whole)
    x, y = float(columns.mean()), float(rows.mean())
    deviation = float(np.sqrt(columns.var() + rows.var()))
    layers = (_scaled(layer, x, y, deviation) for layer in (whole, tone, inside))
    return background, len(areas), _Thing(colour, (x, y), deviation, *layers)


def _length(difference: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("...c,...c->...", difference, difference))


def _background(image: np.ndarray) -> tuple[str, np.ndarray]:
    """The name of the background that most of the border has, and its color (3,)."""
    ring = np.concatenate([image[:_RING], image[-_RING:], *np.split(image, [_RING, -_RING], axis=1)[::2]], None)
    ring, palette = ring.reshape(-1, 3), np.array(list(BACKGROUNDS.values()), np.float32)
    nearest = ((palette**2).sum(1) - 2 * ring @ palette.T).argmin(axis=1)
    most = int(np.bincount(nearest).argmax())
    return tuple(BACKGROUNDS)[most], np.median(ring[nearest == most], axis=0)


def _objects(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the background (H, W) -> labels of objects (H, W), from 1, and the area of each. What is too small
    or too large to be an object has the label 0, as the background has."""
    smooth = ndimage.gaussian_filter(distance, 0.5)
    least = np.clip(_CONTRAST_SHARE * np.percentile(smooth, 97), *_CONTRAST)
    labelled: Any = ndimage.label(smooth > least, structure=np.ones((3, 3)))
    labels = labelled[0]
    areas = np.bincount(labels.ravel())[1:]
    kept = (areas >= _AREAS[0]) & (areas <= _AREAS[1])
    return np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)])[labels], areas[kept]


def _colour(pixels: np.ndarray) -> str:
    """The name of the color whose two tones, and mixtures of both, are closest to the pixels (n, 3)."""
    palette = np.array(list(COLOURS.values()), np.float32)
    along = np.clip(pixels @ palette.T / (palette**2).sum(1), SHADE, 1)
    return tuple(COLOURS)[int(_length(pixels[:, None] - along[..., None] * palette).mean(axis=0).argmin())]


def _scaled(layer: np.ndarray, x: float, y: float, deviation: float) -> np.ndarray:
    """A layer (H, W) around the object, scaled to one size: (_GRID^2,)."""
    steps = np.linspace(-_REACH, _REACH, _GRID) * deviation
    rows, columns = np.meshgrid(y + steps, x + steps, indexing="ij")
    return ndimage.map_coordinates(layer.astype(np.float32), [rows.ravel(), columns.ravel()], order=1)


class _Outlines(NamedTuple):
    """T rendered objects, scaled to one size."""

    cover: np.ndarray  # (T, _GRID^2)
    shape: np.ndarray  # (T,)
    radius: np.ndarray  # (T,) in standard deviations of the object's pixels
    offset: np.ndarray  # (T, 2) x, y of the object's place relative to its centroid, likewise


@functools.cache
def _outlines() -> _Outlines:
    covers, shapes, radii, offsets = [], [], [], []
    for shape, radius, angle, blur in itertools.product(SHAPES, (0.155, 0.21, 0.33), _ANGLES, (0.0, 1.0)):
        thing = Thing(shape, "red", "plain", "", "centre", 0.5, 0.5, radius, angle, COLOURS["red"])
        image = render(Scene((thing,), "white", BACKGROUNDS["white"])).astype(np.float32)
        _, _, seen = _see(ndimage.gaussian_filter(image, (blur, blur, 0)) if blur else image)
        assert seen is not None
        covers.append(seen.cover)
        shapes.append(shape)
        radii.append(radius * SIDE / seen.deviation)
        offsets.append([((SIDE - 1) / 2 - at) / seen.deviation for at in seen.centroid])
    return _Outlines(np.stack(covers), np.array(shapes), np.array(radii), np.array(offsets))


class _Patterns(NamedTuple):
    """P textures of all angles, scales and phases. A network may generate other phases of a pattern than `render`."""

    tone: np.ndarray  # (P, _GRID^2)
    texture: np.ndarray  # (P,)
    scale: np.ndarray  # (P,) radii of the texture in a standard deviation of the object's pixels


@functools.cache
def _patterns() -> _Patterns:
    tones, names, scales = [], [], []
    steps = np.linspace(-_REACH, _REACH, _GRID)
    for texture, angle, scale in itertools.product(TEXTURES, _ANGLES[::2], _SCALES):
        cos, sin = np.cos(angle), np.sin(angle)
        u = (cos * steps[None, :] + sin * steps[:, None]) * scale
        v = (cos * steps[:, None] - sin * steps[None, :]) * scale
        for du, dv, blur in itertools.product(*_PHASES[texture], (0.0, 0.7, 1.4)):
            tone = second_tone(texture, u + du, v + dv, 10.0)
            tones.append((ndimage.gaussian_filter(tone, blur) if blur else tone).ravel())
            names.append(texture)
            scales.append(scale)
    return _Patterns(np.stack(tones).astype(np.float32), np.array(names), np.array(scales))


def _compare(things: Sequence[_Thing]) -> dict[str, np.ndarray]:
    """The attributes of n objects, each (n,), by the nearest outline and the nearest pattern."""
    outlines = _outlines()
    covers = np.stack([thing.cover for thing in things])
    best = ((outlines.cover**2).sum(1) - 2 * covers @ outlines.cover.T).argmin(axis=1)
    deviation = np.array([thing.deviation for thing in things])
    radius = outlines.radius[best] * deviation / SIDE
    centre = np.array([thing.centroid for thing in things]) + outlines.offset[best] * deviation[:, None] + 0.5
    return {
        "colour": np.array([thing.colour for thing in things]),
        "shape": outlines.shape[best],
        "texture": _texture(things, np.minimum(1, radius / COARSE) / outlines.radius[best]),
        "size": np.where(radius > _LARGE, "large", "small"),
        "place": _place(centre / SIDE - 0.5, radius),
    }


def _texture(things: Sequence[_Thing], scale: np.ndarray) -> np.ndarray:
    """The texture of the nearest pattern, among those of about the given scale (n,)."""
    patterns = _patterns()
    inside, tone = (np.stack([getattr(thing, name) for thing in things]) for name in ("inside", "tone"))
    misfit = inside @ (patterns.tone**2).T - 2 * (inside * tone) @ patterns.tone.T  # (n, P)
    other = np.abs(np.log(patterns.scale / scale[:, None])) > _SCALE_ERROR
    return patterns.texture[np.where(other, np.inf, misfit).argmin(axis=1)]


def _place(offset: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """The place of objects. offset: (n, 2) from the image's center, x right and y down, as fractions of the side."""
    sideways = np.abs(offset[:, 0]) > np.abs(offset[:, 1])
    across = np.where(offset[:, 0] > 0, "right", "left")
    along = np.where(offset[:, 1] > 0, "bottom", "top")
    far = np.abs(offset).max(axis=1) > np.where(radius > _LARGE, *_OFF_CENTRE)
    return np.where(far, np.where(sideways, across, along), "centre")
