"""docs/guide.md: its commands are commands, and it shows what they write."""

from pathlib import Path

import pytest
from PIL import Image

from ipadapter_jax.cli import parse
from scripts.make_guide_images import commands, shown

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", commands(TEXT), ids=lambda words: Path(words[-1]).stem)
def test_commands(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = parse(words)
    command.check()
    assert (command.attention_maps or command.out).name in shown(TEXT)


def test_images():
    files = {path.name for path in (ROOT / "docs" / "guide").iterdir()}
    assert files == shown(TEXT) and len(files) > 18
    for name in files:
        with Image.open(ROOT / "docs" / "guide" / name) as image:
            assert min(image.size) >= 64
