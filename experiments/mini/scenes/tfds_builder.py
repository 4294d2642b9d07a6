"""The scenes as a TensorFlow Datasets builder, prepared and read without TensorFlow.

    import experiments.mini.scenes.tfds_builder
    tfds.data_source("scenes/64px")        or 128px; experiments/mini/render_scenes.py writes other numbers of examples

Record i of a split is example i of the scenes. In addition to image and caption it has every attribute of the scene.
A photograph has no `things`, and its background is -1.
"""

import dataclasses
import io
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from experiments.mini.scenes.examples import COUNTS, SHARE, Example, example, png
from experiments.mini.scenes.render import SIDE
from experiments.mini.scenes.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Split
from ipadapter_jax.errors import InputError

try:
    import tensorflow_datasets as tfds
except ImportError:
    raise InputError(
        "tensorflow-datasets is not installed, which writes scenes: pip install 'ipadapter-jax[scenes,tfds]'"
    ) from None

_NAMES = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES, "place": PLACES}
_LENGTHS = ("x", "y", "radius", "angle")


@dataclasses.dataclass(kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
    counts: Mapping[Split, int] = dataclasses.field(default_factory=lambda: COUNTS)
    side: int = SIDE  # pixels
    photographs: float = SHARE


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Small images of one to three objects, with captions and all that is drawn; photographs among them."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[ScenesConfig]] = [ScenesConfig(name="64px"), ScenesConfig(name="128px", side=128)]
    builder_config: ScenesConfig
    code_path = tfds.core.as_path(__file__)  # otherwise tfds imports importlib_resources, which may be missing

    def _info(self) -> tfds.core.DatasetInfo:
        features, side = tfds.features, self.builder_config.side
        rgb = features.Tensor(shape=(3,), dtype=np.uint8)
        thing = {name: features.ClassLabel(names=list(names)) for name, names in _NAMES.items()}
        thing |= {name: features.Scalar(dtype=np.float32) for name in _LENGTHS} | {"rgb": rgb}
        example = {
            "image": features.Image(shape=(side, side, 3), encoding_format="png"),
            "text": features.Text(),
            "things": features.Sequence(thing),
            "background": features.ClassLabel(names=list(BACKGROUNDS)),
            "rgb": rgb,  # of the background
        }
        # Without disable_shuffling tfds would store records in the order of a hash.
        return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(example), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split, count) for split, count in self.builder_config.counts.items()}

    def _generate_examples(self, split: Split, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for index in range(count):
            yield index, _fields(example(split, index, side=config.side, photographs=config.photographs))


def _fields(made: Example) -> dict[str, Any]:
    fields = {"image": io.BytesIO(png(made.pixels)), "text": made.text}
    if made.scene is None:
        return fields | {"things": [], "background": -1, "rgb": (0, 0, 0)}
    things = [{name: getattr(thing, name) for name in (*_NAMES, *_LENGTHS, "rgb")} for thing in made.scene.things]
    return fields | {"things": things, "background": made.scene.background, "rgb": made.scene.rgb}
