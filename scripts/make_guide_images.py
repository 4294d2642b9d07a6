"""Makes every image of docs/guide.md: draws the reference images, then runs the commands in the guide.

python -m scripts.make_guide_images
"""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.mini.scenes.render import SIDE, render
from experiments.mini.scenes.scene import COLOURS, Scene, Thing
from ipadapter_jax.cli import main as run
from ipadapter_jax.weights.bundled import REFERENCE

GUIDE = Path("docs/guide.md")
FOLDER = Path("docs/guide")


def main() -> int:
    """Returns the exit code of the first command that fails, else 0. To be run in the repository's root."""
    FOLDER.mkdir(exist_ok=True)
    before = set(FOLDER.iterdir())
    Image.open(REFERENCE).convert("RGB").save(FOLDER / "heart.png")
    star = Thing("star", "orange", "plain", "large", "centre", 0.5, 0.5, 0.34, 0.1, COLOURS["orange"])
    pair = [_on_cyan("circle", "red", "dotted"), _on_cyan("square", "green", "plain")]
    Image.fromarray(render(Scene((star,), "cyan", (140, 215, 225)))).save(FOLDER / "star.png")
    Image.fromarray(np.concatenate(pair, axis=1)).save(FOLDER / "wide.png")
    for name, white, width in (("left", 0, SIDE), ("right", 1, SIDE), ("wide-left", 0, 2 * SIDE)):
        mask = np.zeros((SIDE, width), np.uint8)
        np.split(mask, 2, axis=1)[white][:] = 255
        Image.fromarray(mask).save(FOLDER / f"{name}.png")
    for words in commands(GUIDE.read_text(encoding="utf-8")):
        print("ipadapter-jax", shlex.join(words), flush=True)
        if code := run(words):
            return code
    for file in set(FOLDER.iterdir()) - before:
        if file.name not in shown(GUIDE.read_text(encoding="utf-8")):
            file.unlink()
    return 0


def _on_cyan(shape: str, color: str, texture: str) -> np.ndarray:
    thing = Thing(shape, color, texture, "large", "centre", 0.5, 0.5, 0.33, 0.0, COLOURS[color])
    return render(Scene((thing,), "cyan", (140, 215, 225)))


def commands(text: str) -> list[list[str]]:
    """The words after `ipadapter-jax` of every command that makes an image of the guide."""
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("ipadapter-jax generate ")]


def shown(text: str) -> set[str]:
    """The files that the guide shows."""
    return set(re.findall(r"guide/([\w-]+\.png)[)\"]", text))


if __name__ == "__main__":
    sys.exit(main())
