"""Renders scenes. Shapes are signed distance functions, so that edges are antialiased at any image size."""

import functools

import numpy as np

from experiments.mini.scenes.scene import Scene, Thing

SIDE = 64  # default side of an image in pixels
_TABLE = 192  # samples along each side of a shape's table
_EXTENT = 1.6  # the table reaches from -_EXTENT to _EXTENT radii
SHADE = 0.4  # brightness of a texture's second tone, as a fraction of the first
COARSE = 0.24  # objects with a smaller radius have the texture scale of this radius


def render(scene: Scene, side: int = SIDE) -> np.ndarray:
    """The image, (side, side, 3) uint8."""
    image = np.empty((side, side, 3))
    image[:] = scene.rgb
    for thing in scene.things:
        cover, tone = _cover_and_tone(thing, side)
        paint = np.asarray(thing.rgb, float) * (1 - (1 - SHADE) * tone[..., None])
        image += cover[..., None] * (paint - image)
    return (image + 0.5).astype(np.uint8)


def mask(scene: Scene, side: int = SIDE) -> np.ndarray:
    """The fraction of each pixel that objects cover, (side, side) in [0, 1]."""
    free = np.ones((side, side))
    for thing in scene.things:
        free *= 1 - _cover_and_tone(thing, side)[0]
    return 1 - free


def _cover_and_tone(thing: Thing, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The fraction of each pixel that the object covers, and its fraction of the second tone, each (side, side)."""
    centres = (np.arange(side) + 0.5) / side
    x, y = (centres[None, :] - thing.x) / thing.radius, (centres[:, None] - thing.y) / thing.radius
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    u, v = cos * x + sin * y, cos * y - sin * x  # the object's own frame, in radii
    pixels = side * thing.radius  # per radius
    cover = _ramp(-_distance(thing.shape, u, v) * pixels)
    widen = min(1.0, thing.radius / COARSE)
    return cover, second_tone(thing.texture, u * widen, v * widen, pixels / widen)


def _ramp(distance: np.ndarray) -> np.ndarray:
    """The fraction of a pixel inside an edge. distance: from the edge in pixels, positive inside."""
    return np.clip(distance + 0.5, 0, 1)


def second_tone(texture: str, u: np.ndarray, v: np.ndarray, pixels: float) -> np.ndarray:
    if texture == "plain":
        return np.zeros(np.broadcast_shapes(u.shape, v.shape))
    if texture == "striped":
        return _ramp((np.abs(_wrap(v, 0.5)) - 0.125) * pixels)
    if texture == "dotted":
        return _ramp((0.15 - np.hypot(_wrap(u, 0.5), _wrap(v, 0.5))) * pixels)
    a, b = (_ramp((np.abs(_wrap(w - 0.19, 0.76)) - 0.19) * pixels) for w in (u, v))
    return a * (1 - b) + b * (1 - a)  # checkered: exclusive or


def _wrap(x: np.ndarray, period: float) -> np.ndarray:
    """x minus the nearest multiple of the period."""
    return x - period * np.round(x / period)


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The signed distance to the edge in radii, negative inside, interpolated bilinearly from a table."""
    table = _table(shape)
    i, j = ((np.clip(w / _EXTENT, -1, 1) + 1) * (_TABLE - 1) / 2 for w in (v, u))
    i0, j0 = (np.minimum(w.astype(int), _TABLE - 2) for w in (i, j))
    di, dj = i - i0, j - j0
    upper = table[i0, j0] * (1 - dj) + table[i0, j0 + 1] * dj
    lower = table[i0 + 1, j0] * (1 - dj) + table[i0 + 1, j0 + 1] * dj
    return upper * (1 - di) + lower * di


@functools.cache
def _table(shape: str) -> np.ndarray:
    """A table of signed distances in the object's frame; rows are v, columns are u."""
    w = np.linspace(-_EXTENT, _EXTENT, _TABLE)
    u, v = np.meshgrid(w, w)
    found = np.hypot(u, v) - 0.98 if shape == "circle" else _polygon_distance(_outline(shape), u, v)
    found.setflags(write=False)  # threads share it
    return found


def _outline(shape: str) -> np.ndarray:
    """The corners (n, 2) of a polygon in the object's frame, x right and y down. All shapes have similar areas."""
    if shape == "square":
        return 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        return 1.28 * np.array([(np.sin(t), 0.12 - np.cos(t)) for t in 2 * np.pi * np.arange(3) / 3])
    if shape == "star":
        radii = np.where(np.arange(10) % 2 == 0, 1.25, 0.52)
        turns = np.pi * np.arange(10) / 5
        return np.stack([radii * np.sin(turns), 0.08 - radii * np.cos(turns)], axis=1)
    if shape == "cross":
        a, b = 1.08, 0.38
        corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b)]
        return np.array([*corners, (-b, -b)])
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)  # a heart
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2], axis=1) / 15.0


def _polygon_distance(corners: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The signed distance of points to a closed polygon, negative inside. Inside is decided by the even-odd rule."""
    points, starts, ends = np.stack([u, v], axis=-1), corners, np.roll(corners, -1, axis=0)
    nearest, inside = np.full(u.shape, np.inf), np.zeros(u.shape, bool)
    for a, b in zip(starts, ends, strict=True):
        edge, offset = b - a, points - a
        along = np.clip(offset @ edge / (edge @ edge), 0, 1)
        nearest = np.minimum(nearest, np.linalg.norm(offset - along[..., None] * edge, axis=-1))
        crosses = (a[1] > v) != (b[1] > v)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (u < a[0] + (v - a[1]) * edge[0] / edge[1])
    return np.where(inside, -nearest, nearest)
