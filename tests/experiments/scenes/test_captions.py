"""A caption says nothing that its scene does not show, and in whole all of it."""

import re
from collections import Counter

import pytest

from experiments.mini.scenes.captions import caption
from experiments.mini.scenes.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, TEXTURES, generator, make_scene

# What a person may say, and which attribute it gives; written down here again so that the captions are held to it.
WORDS = {
    "shape": {name: name for name in SHAPES} | {"disc": "circle", "round shape": "circle", "box": "square"},
    "colour": {name: name for name in COLOURS} | {"in one colour": None},
    "texture": {name: name for name in TEXTURES},
    "size": {name: name for name in SIZES} | {"big": "large", "little": "small"},
    "place": {name: name for name in PLACES} | {"middle": "centre"},
}
WORDS["shape"]["plus sign"] = "cross"
WORDS["texture"] |= {"stripes": "striped", "dots": "dotted", "spots": "dotted", "spotted": "dotted"}
WORDS["texture"] |= {"checks": "checkered", "checked": "checkered", "one colour": "plain"}
BACKGROUND_WORDS = {name: name for name in BACKGROUNDS} | {"gray": "grey"}
ENDING = re.compile(r" on an? (\w+) background$|, the background is (\w+)$")
BEGINNING = re.compile(r"^((an image|a drawing|an image) of )?((two|three) shapes: )?")


def said(phrase: str) -> dict[str, set[str]]:
    """The attributes that a phrase names."""
    return {
        role: {name for word, name in words.items() if name and re.search(rf"\b{word}\b", phrase)}
        for role, words in WORDS.items()
    }


def parsed(text: str) -> tuple[str | None, list[dict[str, set[str]]]]:
    """The background, and what is said of each object."""
    ending = ENDING.search(text)
    background = BACKGROUND_WORDS[ending[1] or ending[2]] if ending else None
    body = BEGINNING.sub("", ENDING.sub("", text))
    return background, [said(phrase) for phrase in re.split(r", | and ", body)]


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("whole", [False, True])
def test_captions_agree_with_their_scenes(split, whole):
    missing = Counter()
    for index in range(600):
        scene = make_scene(split, index)
        text = caption(scene, generator(split, index, 2), whole=whole)
        background, things = parsed(text)
        assert background in (None, scene.background), text
        assert len(things) == len(scene.things), text
        for thing, names in zip(scene.things, things, strict=True):
            assert names["shape"] == {thing.shape}, text
            for role, found in names.items():
                assert found <= {getattr(thing, role)}, text
                missing[role] += not found and (role != "size" or len(things) == 1)
        missing["background"] += background is None
    named = {role for role in (*WORDS, "background") if not missing[role]}
    assert named == ({*WORDS, "background"} if whole else {"shape"})


def test_wording_varies():
    scene = make_scene("train", 3)
    texts = {caption(scene, generator("train", index)) for index in range(100)}
    assert len(texts) > 90
    short = [caption(make_scene("train", index, 1), generator("train", index)) for index in range(300)]
    assert any(re.fullmatch(r"an? \w+", text) for text in short)  # "a star", as people ask
    assert all(text == text.lower() and "  " not in text and not re.search(r"\ba [aeiou]", text) for text in short)
