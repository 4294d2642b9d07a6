"""Crops of the photographs that other libraries bring."""

import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.mini.scenes.photographs import CAPTIONS, NAMES, crop, photograph
from ipadapter_jax.errors import InputError

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "mini.md"


@pytest.mark.parametrize("name", NAMES)
def test_photographs(name):
    found = photograph(name)
    assert found.mode == "RGB" and min(found.size) >= 128
    assert f"| {name.removesuffix('.jpg')} |" in DOCUMENT.read_text(encoding="utf-8"), "credit it"


@pytest.mark.parametrize("side", [64, 128])
def test_crops_are_squares_with_captions(side):
    for seed in range(20):
        pixels, text = crop(np.random.default_rng(seed), side)
        assert pixels.shape == (side, side, 3) and pixels.dtype == np.uint8
        assert any(text.endswith(words) for words in CAPTIONS.values())


def test_a_crop_follows_from_its_random_numbers():
    first, second = (crop(np.random.default_rng(7), 64) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]


@pytest.mark.parametrize(("name", "library"), [("coffee", "skimage"), ("china.jpg", "sklearn")])
def test_without_its_library(name, library, monkeypatch):
    for module in [module for module in sys.modules if module.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"{library}.* pip install 'ipadapter-jax\[scenes\]'$"):
        photograph(name)
