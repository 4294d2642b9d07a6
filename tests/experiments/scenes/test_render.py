"""Images show the colours and the areas of their scenes, at every size."""

import dataclasses
import math

import numpy as np
import pytest

from experiments.mini.scenes.render import mask, render
from experiments.mini.scenes.scene import SHAPES, TEXTURES, Scene, Thing, make_scene

SIDES = (64, 128)
SCENES = [make_scene(split, index) for split in ("train", "held_out") for index in range(40)]


def scene_of(shape: str, texture: str = "plain", radius: float = 0.3, angle: float = 0.2) -> Scene:
    thing = Thing(shape, "red", texture, "large", "centre", 0.51, 0.48, radius, angle, (215, 40, 45))
    return Scene((thing,), "white", (242, 242, 242))


def alone(scene: Scene, thing: Thing) -> Scene:
    return dataclasses.replace(scene, things=(thing,))


@pytest.mark.parametrize("side", SIDES)
def test_images_and_masks_are_of_the_side_asked_for(side):
    for scene in SCENES[:5]:
        image, cover = render(scene, side), mask(scene, side)
        assert image.shape == (side, side, 3) and image.dtype == np.uint8
        assert cover.shape == (side, side) and cover.min() == 0 and cover.max() == 1


@pytest.mark.parametrize("side", SIDES)
def test_colours_are_those_of_the_scene(side):
    for scene in SCENES:
        image, cover = render(scene, side), mask(scene, side)
        assert (image[cover == 0] == scene.rgb).all()
        for thing in scene.things:
            inside = image[mask(alone(scene, thing), side) == 1].astype(int)
            rgb, low = np.array(thing.rgb), 0.4 * np.array(thing.rgb)
            if thing.texture == "plain":
                assert (inside == rgb).all()
            else:  # two tones, and what lies between them; each of the two covers at least a tenth
                assert (inside <= rgb).all() and (inside >= low - 0.5).all()
                tone = (rgb - inside).sum(axis=1) / (rgb - low).sum()
                assert (tone < 0.1).mean() > 0.1 and (tone > 0.9).mean() > 0.1


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_is_what_the_image_shows(shape, side):
    scene = scene_of(shape)
    background, colour = np.array(scene.rgb, float), np.array(scene.things[0].rgb, float)
    shown = ((render(scene, side) - background) @ (colour - background)) / np.sum((colour - background) ** 2)
    np.testing.assert_allclose(mask(scene, side), shown, atol=0.5 / 180)  # half a level, of a contrast of 180


# The area in squared radii: of circle and square by their formulae, of the others by those of their corners.
AREAS = {
    "circle": math.pi * 0.98**2,
    "square": 1.76**2,
    "triangle": 1.28**2 * 3 * math.sqrt(3) / 4,
    "star": 5 * 1.25 * 0.52 * math.sin(math.pi / 5),
    "cross": 4 * 0.76 * 1.08 - 0.76**2,
    "heart": 180 * math.pi / 15**2,
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_areas(shape, side):
    area = mask(scene_of(shape), side).sum() / (0.3 * side) ** 2
    assert area == pytest.approx(AREAS[shape], rel=0.01)


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_change_no_mask(texture):
    np.testing.assert_array_equal(mask(scene_of("heart", texture), 64), mask(scene_of("heart"), 64))


def test_twice_the_side_is_the_same_image():
    for scene in SCENES:
        fine, coarse = render(scene, 128), render(scene, 64)
        halved = fine.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(halved - coarse).mean() < 2.0  # levels; edges fall differently
        assert mask(scene, 128).mean() == pytest.approx(mask(scene, 64).mean(), rel=0.01)


def test_several_objects_lie_apart():
    for index in range(20):
        scene = make_scene("train", index, 3)
        covers = [mask(alone(scene, thing)) for thing in scene.things]
        np.testing.assert_allclose(sum(covers), mask(scene), atol=1e-12)
