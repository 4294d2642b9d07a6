"""Real photographs: the same from every format of training data, and (slow) a model and an adapter learnt from them."""

import json
import os
import subprocess
import sys

import pytest

from examples.skimage_images import NAMES, photographs, records, write_formats
from examples.train_on_images import nearest
from ipadapter_jax.data.open_dataset import open_dataset


def test_every_format_gives_the_same_records_in_the_same_order(tmp_path):
    written = records(photographs(side=16))
    assert [record.key for record in written] == NAMES
    for name, path in write_formats(tmp_path, written).items():
        source = open_dataset(str(path))
        read = [source[i] for i in range(len(source))]
        assert [(r.image, r.text) for r in read] == [(r.image, r.text) for r in written], name


def test_a_coarse_photograph_is_nearest_to_itself():
    images = list(photographs(side=64).values())
    squares = [image.crop((0, 0, 64, 64)) for image in images]
    coarse = [square.resize((16, 16)).resize((64, 64)) for square in squares]
    assert [nearest(image, squares) for image in coarse] == list(range(len(squares)))


@pytest.mark.slow
def test_an_adapter_asks_for_each_photograph(tmp_path):
    one_device = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}  # 18 photographs in a batch
    subprocess.run(
        [sys.executable, "-m", "examples.train_on_images", "--out", str(tmp_path)], check=True, env=one_device
    )
    results = json.loads((tmp_path / "results.json").read_text())  # the script fails where a goal is missed
    assert results["nearest_to_own"] >= 0.8 and results["same_losses_from_every_format"]
