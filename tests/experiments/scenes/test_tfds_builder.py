"""The data set that experiments/mini/render_scenes.py writes: whole or not there, and all that is drawn in it."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.mini.render_scenes import first_examples, main, render_scenes
from experiments.mini.scenes.examples import Scenes, example
from experiments.mini.scenes.render import render
from experiments.mini.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    make_scene,
)
from ipadapter_jax.data.open_dataset import open_dataset
from ipadapter_jax.errors import InputError

COUNTS = {"train": 12, "held_out": 8}
SHARE = 0.5
ASSETS = Path(__file__).resolve().parents[3] / "assets"

tfds.disable_progress_bar()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return render_scenes(tmp_path_factory.mktemp("scenes"), COUNTS, photographs=SHARE)


def test_the_trainer_reads_it_in_the_order_of_indices(written):
    source, expected = open_dataset(str(written)), Scenes("train", 12, photographs=SHARE)
    assert len(source) == 12
    read = [source[i] for i in range(12)]
    assert [(record.image, record.text) for record in read] == [(record.image, record.text) for record in expected]


def test_all_that_is_drawn_can_be_read(written):
    builder = tfds.builder_from_directory(str(written))
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == COUNTS
    for split, count in COUNTS.items():
        stored = builder.as_data_source(split=split)
        made = [example(split, index, photographs=SHARE) for index in range(count)]
        assert len(stored) == count and 0 < sum(one.scene is None for one in made) < count
        for fields, one in zip(stored, made, strict=True):
            np.testing.assert_array_equal(fields["image"], one.pixels)
            assert fields["text"].decode() == one.text
            if one.scene is None:
                assert fields["background"] == -1 and len(fields["things"]["shape"]) == 0
                continue
            found = scene_from(fields)
            assert rounded(found) == rounded(one.scene)
            # Lengths are stored as float32, which moves an edge by less than a level.
            assert np.abs(render(found).astype(int) - one.pixels).max() <= 1


def scene_from(fields: dict) -> Scene:
    names = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES, "size": SIZES, "place": PLACES}
    count = len(fields["things"]["shape"])
    things = [
        {name: column[i] for name, column in fields["things"].items()} | {"rgb": rgb_of(fields["things"]["rgb"][i])}
        for i in range(count)
    ]
    named = [thing | {name: labels[thing[name]] for name, labels in names.items()} for thing in things]
    return Scene(
        tuple(Thing(**thing) for thing in named), tuple(BACKGROUNDS)[fields["background"]], rgb_of(fields["rgb"])
    )


def rgb_of(stored: np.ndarray) -> tuple[int, ...]:
    return tuple(stored.tolist())


def rounded(scene: Scene) -> tuple:
    lengths = [np.float32([thing.x, thing.y, thing.radius, thing.angle]).tolist() for thing in scene.things]
    kinds = [(*thing.kind, thing.size, thing.place, thing.rgb) for thing in scene.things]
    return lengths, kinds, scene.background, scene.rgb


def test_what_is_there_is_kept(written):
    before = {path: path.stat().st_mtime_ns for path in written.iterdir()}
    assert render_scenes(written.parents[2], COUNTS, photographs=SHARE) == written
    assert {path: path.stat().st_mtime_ns for path in written.iterdir()} == before
    other = render_scenes(written.parents[2], {"train": 3}, side=128, photographs=0)
    assert other != written and len(open_dataset(str(other))) == 3


def test_nothing_partial_is_left(tmp_path, monkeypatch):
    def broken(split, index, **options):
        if index == 5:
            raise KeyboardInterrupt
        return example(split, index, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("experiments.mini.scenes.tfds_builder.example", broken)
        render_scenes(tmp_path, {"train": 8}, photographs=0)
    assert not list(tmp_path.rglob("*array_record*")) and not list(tmp_path.rglob("dataset_info.json"))
    assert len(open_dataset(str(render_scenes(tmp_path, {"train": 8}, photographs=0)))) == 8


def test_its_configurations_are_those_of_tfds(tmp_path):
    from experiments.mini.scenes import tfds_builder

    for name, side in (("64px", 64), ("128px", 128)):
        builder = tfds.builder(f"scenes/{name}", data_dir=str(tmp_path))
        assert isinstance(builder, tfds_builder.Scenes) and builder.info.features["image"].shape == (side, side, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"side": 16}, "scenes of 16 x 16 pixels: give a side of at least 32"),
        ({"held_out": 0}, "0 scenes of held_out: give at least 1"),
        ({"photographs": -0.1}, "a share of photographs of -0.1"),
    ],
)
def test_bad_words_end_in_one_line(words, message, tmp_path, capsys):
    assert main(tmp_path, **words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"render_scenes: {message}") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(tmp_path / "file", train=3, held_out=3, photographs=0) == 2
    assert "file: not written" in capsys.readouterr().err


def test_without_the_library_that_writes(monkeypatch):
    module = "experiments.mini.scenes.tfds_builder"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"pip install 'ipadapter-jax\[scenes,tfds\]'$"):
        importlib.import_module(module)


def test_the_image_in_the_documents_shows_the_first_examples():
    """Also that no scene has ever been drawn otherwise: what mini has learnt from."""
    shown, drawn = (np.asarray(image, int) for image in (Image.open(ASSETS / "scenes.png"), first_examples()))
    assert np.abs(shown - drawn).max() <= 1  # the last digit of a cosine may round a pixel otherwise
    np.testing.assert_array_equal(drawn[:64, :64], render(make_scene("train", 0)))
