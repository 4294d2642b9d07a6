"""Sheets of labelled images: where things lie, and text that is too long."""

import numpy as np
import pytest
from PIL import Image

from ipadapter_jax.images.contact_sheet import GAP, LINE, contact_sheet


def red(width: int = 40, height: int = 20) -> Image.Image:
    return Image.new("RGB", (width, height), "red")


def test_rows_lie_under_their_titles():
    found = np.asarray(
        contact_sheet({"first": [("a", red()), ("b", red())], "second": [("c", red())]}, "note", side=100)
    )
    assert found.shape == (2 * (2 * LINE + 50 + GAP) + LINE + GAP, GAP + 2 * (100 + GAP), 3)
    block = 2 * LINE + 50 + GAP
    is_red = (found == [255, 0, 0]).all(axis=-1)
    for row, columns in ((0, 2), (1, 1)):
        top = row * block + 2 * LINE
        assert is_red[top : top + 50].sum() == columns * 100 * 50
    assert is_red.sum() == 3 * 100 * 50
    for text in (found[:LINE], found[LINE : 2 * LINE], found[block : block + LINE], found[-LINE - GAP :]):
        assert text.min() < 100  # there is something to read


@pytest.mark.parametrize("text", ["a very long caption " * 40, "caf\u00e9\n\U0001f98a", ""])
def test_text_that_is_too_long_is_cut(text):
    """It neither runs over its neighbour nor off the sheet, and any character may come."""
    found = np.asarray(contact_sheet({f"1: {text}": [(text, red()), ("", red())]}, text, side=120))
    assert (found[:, -GAP:] == 255).all()  # nothing runs over the edge
    labels = found[LINE : 2 * LINE]
    assert (labels[:, GAP + 120 :] == 255).all()  # nor over the next column
