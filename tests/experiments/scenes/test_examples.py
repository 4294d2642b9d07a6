"""Examples follow from their index in any process and order, as records and for grain."""

import hashlib
import io
import os
import pickle
import subprocess
import sys

import grain
import numpy as np
import pytest
from PIL import Image

from experiments.mini.scenes.examples import Scenes, example
from experiments.mini.scenes.render import render
from experiments.mini.scenes.scene import make_scene
from ipadapter_jax.data.workers import load_in_workers
from ipadapter_jax.errors import InputError

DIGEST = """
import hashlib
import io
from experiments.mini.scenes.examples import Scenes
for split in ("held_out", "train"):
    source = Scenes(split, 20, photographs=0.3)
    records = {i: source[i] for i in reversed(range(20))}
    print(split, hashlib.sha256(repr(sorted(records.items())).encode()).hexdigest())
"""


def test_other_processes_make_the_same_records():
    other = subprocess.run(
        [sys.executable, "-c", DIGEST], env=os.environ | {"PYTHONHASHSEED": "5"}, capture_output=True, text=True
    )
    for line in other.stdout.splitlines():
        split, digest = line.split()
        records = sorted(enumerate(Scenes(split, 20, photographs=0.3)))
        assert hashlib.sha256(repr(records).encode()).hexdigest() == digest
    assert other.stdout.count("\n") == 2, other.stderr


def test_an_example_is_its_scene_or_a_photograph():
    for index in range(20):
        scene = make_scene("held_out", index)
        plain, mixed = (example("held_out", index, photographs=share) for share in (0, 0.5))
        assert plain.scene == scene
        np.testing.assert_array_equal(plain.pixels, render(scene))
        if mixed.scene is None:
            assert mixed.pixels.shape == plain.pixels.shape
        else:  # the others stay as they were
            assert mixed.scene == scene and mixed.text == plain.text


@pytest.mark.parametrize(("share", "least", "most"), [(0, 0, 0), (0.1, 35, 65), (0.5, 220, 280), (1, 500, 500)])
def test_the_share_of_photographs(share, least, most, monkeypatch):
    for name in ("render", "crop"):  # which take the time
        monkeypatch.setattr(f"experiments.mini.scenes.examples.{name}", lambda *_: ("pixels", "text"))
    found = sum(example("train", index, photographs=share).scene is None for index in range(500))
    assert least <= found <= most


@pytest.mark.parametrize("side", [64, 128])
def test_records(side):
    source = Scenes("held_out", 12, side=side, photographs=0.3)
    assert len(source) == 12 and len(list(source)) == 12
    for index, record in enumerate(source):
        made = example("held_out", index, side=side, photographs=0.3)
        assert record.key == source.key(index) == f"held_out-{index:07d}" and record.text == made.text
        np.testing.assert_array_equal(Image.open(io.BytesIO(record.image)), made.pixels)
    for index in (-1, 12):
        with pytest.raises(IndexError):
            source[index]


def test_identity_tells_what_is_drawn():
    options = [{}, {"side": 128}, {"photographs": 0.2}]
    sources = [Scenes("train", 5, **option) for option in options] + [Scenes("held_out", 5), Scenes("train", 6)]
    identities = [repr(source.identity()) for source in sources]
    assert len(set(identities)) == len(sources)
    assert repr(pickle.loads(pickle.dumps(sources[1])).identity()) == identities[1]


def test_grain_reads_scenes_in_worker_processes():
    source = Scenes("train", 9, photographs=0.3)
    dataset = grain.MapDataset.source(source)
    assert list(dataset) == list(source)
    assert list(load_in_workers(dataset.to_iter_dataset(), workers=2, element_bytes=0)) == list(source)
    shuffled = dataset.shuffle(seed=1)
    assert sorted(record.key for record in shuffled) == [source.key(i) for i in range(9)]


def test_the_data_loader_of_grain_reads_scenes():
    source = Scenes("train", 7, photographs=0)
    sampler = grain.samplers.IndexSampler(num_records=7, num_epochs=1, shuffle=False)
    assert list(grain.DataLoader(data_source=source, sampler=sampler)) == list(source)


@pytest.mark.parametrize(
    ("split", "index", "options", "message"),
    [
        ("test", 0, {}, "split 'test': .* train and held_out"),
        ("train", -1, {}, "scene -1 of train: give an index of 0 or more"),
        ("train", 0, {"side": 31}, "scenes of 31 x 31 pixels: give a side of at least 32"),
        ("train", 0, {"photographs": 1.5}, "photographs of 1.5: give a number from 0 to 1"),
        ("train", 0, {"photographs": float("nan")}, "photographs of nan: give a number from 0 to 1"),
    ],
)
def test_what_cannot_be_asked_for(split, index, options, message):
    with pytest.raises(InputError, match=message):
        example(split, index, **options)
    if index >= 0:
        with pytest.raises(InputError, match=message):
            Scenes(split, 3, **options)


def test_no_examples_cannot_be_asked_for():
    with pytest.raises(InputError, match="0 scenes of train: give at least 1"):
        Scenes("train", 0)
