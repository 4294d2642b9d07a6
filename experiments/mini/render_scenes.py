"""Writes the scenes as a data set of TensorFlow Datasets, which `ipadapter-jax train --data.path` reads.

    python -m experiments.mini.render_scenes --out data    about 400 examples a second; needs the extras scenes and tfds

The data set appears under its name when it is complete; an existing one is not written again. OUT/scenes.png shows the
first examples.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import absl.logging
import tyro
from PIL import Image

from experiments.mini.scenes.examples import COUNTS, SHARE, Scenes, example
from experiments.mini.scenes.render import SIDE
from experiments.mini.scenes.scene import Split
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.preprocess import image_grid

SHOWN: dict[Split, int] = {"train": 30, "held_out": 10}


def render_scenes(out: Path, counts: Mapping[Split, int], *, side: int = SIDE, photographs: float = SHARE) -> Path:
    """Writes the first counts[split] examples of each split. Returns the folder, for --data.path.

    Raises InputError as `Scenes` does, without tensorflow-datasets, and if the folder cannot be written.
    """
    from experiments.mini.scenes import tfds_builder

    for split, count in counts.items():
        Scenes(split, count, side=side, photographs=photographs)
    numbers = "-".join(f"{split}{count}" for split, count in counts.items())
    config = tfds_builder.ScenesConfig(
        name=f"{numbers}-{side}px-photographs{photographs:g}",
        counts=counts,
        side=side,
        photographs=photographs,
    )
    try:
        builder = tfds_builder.Scenes(data_dir=str(out), config=config, file_format="array_record")
        builder.download_and_prepare()
    except (OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{out}: not written ({why}); make room or choose another place") from None
    return Path(builder.data_dir)


def first_examples(side: int = SIDE, photographs: float = SHARE) -> Image.Image:
    """A grid of the first SHOWN[split] examples of each split, ten in a row."""
    images = [
        Image.fromarray(example(split, index, side=side, photographs=photographs).pixels)
        for split, count in SHOWN.items()
        for index in range(count)
    ]
    return image_grid(images, columns=10)


def main(
    out: Annotated[Path, tyro.conf.arg(help="folder of the data set")],
    train: Annotated[int, tyro.conf.arg(help="examples to train on")] = COUNTS["train"],
    held_out: Annotated[int, tyro.conf.arg(help="examples of combinations not in train")] = COUNTS["held_out"],
    side: Annotated[int, tyro.conf.arg(help="of an image, in pixels")] = SIDE,
    photographs: Annotated[float, tyro.conf.arg(help="share of the examples that are photographs")] = SHARE,
) -> int:
    """Writes the data set and prints its folder. Returns the exit code: 2 after an InputError, which is printed."""
    absl.logging.set_verbosity(absl.logging.ERROR)  # tfds warns that these scenes are not a data set of its own
    try:
        place = render_scenes(out, {"train": train, "held_out": held_out}, side=side, photographs=photographs)
    except InputError as error:
        print(f"render_scenes: {error}", file=sys.stderr)
        return 2
    first_examples(side, photographs).save(out / "scenes.png")
    print(f"ipadapter-jax train ... --data.path {place}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
