"""A scene follows from split and index alone, and the kinds of the splits are apart."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest

from experiments.mini.scenes.captions import caption
from experiments.mini.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    generator,
    make_scene,
)
from ipadapter_jax.errors import InputError

SPLITS = tuple(KINDS)
LARGEST_JITTER = 8  # of a channel, from the colour of the name


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "275b04761dcd39f7662cd08173ad79292631c6bc3b877fd45d4bd67e82fe792e"),
        ("held_out", "75edfff49b097cb2afe42eb54071e4fa8a65d34423b2aebc348f80e4d8b0c295"),
    ],
)
def test_no_scene_ever_changes(split, digest):
    """The networks of mini have learnt from these scenes and captions."""
    scenes = [make_scene(split, index) for index in range(200)]
    told = [(scene, caption(scene, generator(split, index, 2))) for index, scene in enumerate(scenes)]
    assert hashlib.sha256(repr(told).encode()).hexdigest() == digest


def test_order_changes_nothing():
    forwards = [make_scene("train", index) for index in range(30)]
    assert [make_scene("train", index) for index in reversed(range(30))] == forwards[::-1]
    assert len(set(forwards)) == 30
    assert make_scene("held_out", 3) != make_scene("train", 3)


def test_train_and_held_out_are_apart_and_together_everything():
    train, held_out = (set(KINDS[split]) for split in SPLITS)
    assert not train & held_out and len(train) == 120 and len(held_out) == 24
    assert train | held_out == set(itertools.product(SHAPES, COLOURS, TEXTURES))


def test_both_show_every_attribute_and_train_every_pair_three_times():
    lists = SHAPES, COLOURS, TEXTURES
    for split, (i, names) in itertools.product(SPLITS, enumerate(lists)):
        assert {kind[i] for kind in KINDS[split]} == set(names)
    for i, j in itertools.combinations(range(3), 2):
        pairs = Counter((kind[i], kind[j]) for kind in KINDS["train"])
        assert set(pairs) == set(itertools.product(lists[i], lists[j])) and min(pairs.values()) >= 3
        both = {(kind[i], kind[j]) for kind in KINDS["held_out"]}
        # Of shape and colour, a third of the pairs has no texture that is held out.
        assert len(both) == 24 <= len(pairs)


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_drawn(split):
    scenes = [make_scene(split, index) for index in range(1000)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.kind for thing in things} == set(KINDS[split])
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {thing.size for thing in things} == set(SIZES) and {thing.place for thing in things} == set(PLACES)
    shares = [sum(len(scene.things) == count for scene in scenes) / 1000 for count in (1, 2, 3)]
    np.testing.assert_allclose(shares, (0.7, 0.2, 0.1), atol=0.06)  # four deviations of 1000 draws
    for named, names in ((things, COLOURS), (scenes, BACKGROUNDS)):
        away = [np.subtract(x.rgb, names[x.colour if named is things else x.background]) for x in named]
        assert np.abs(away).max() == LARGEST_JITTER


def test_objects_are_where_they_are_said_to_be():
    for index in range(500):
        for thing in make_scene("train", index).things:
            right, down = thing.x - 0.5, thing.y - 0.5
            signs = {"left": -right, "right": right, "top": -down, "bottom": down}
            if thing.place == "centre":
                assert max(abs(right), abs(down)) <= 0.02
            else:
                assert signs[thing.place] > 0.03
            assert (thing.radius >= 0.3) == (thing.size == "large")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_so_many_objects_as_asked_for(count):
    assert {len(make_scene("held_out", index, count).things) for index in range(20)} == {count}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", 0), "split 'test': scenes have the splits train and held_out; give one of them"),
        (("train", -1), "scene -1 of train: give an index of 0 or more"),
        (("train", 1 << 64), "give an index of 0 or more, below 2\\^64"),
        (("train", 0, 4), "a scene of 4 objects: give a count of 1, 2 or 3"),
    ],
)
def test_what_cannot_be_asked_for(arguments, message):
    with pytest.raises(InputError, match=message):
        make_scene(*arguments)
