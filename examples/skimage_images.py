"""The photographs in scikit-image, written in every format of training data that is read.

docs/mini.md credits each.
"""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from experiments.mini.scenes.examples import png
from experiments.mini.scenes.photographs import CAPTIONS, photograph
from ipadapter_jax.data.formats.array_record import pack
from ipadapter_jax.data.types import Record

NAMES = [name for name in CAPTIONS if not name.endswith(".jpg")]  # the others are of scikit-learn


def photographs(side: int = 128) -> dict[str, Image.Image]:
    """By name, RGB (gray ones too), scaled so that the shorter side has `side` pixels."""
    return {name: _scaled(photograph(name), side) for name in NAMES}


def _scaled(image: Image.Image, side: int) -> Image.Image:
    factor = side / min(image.size)
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR)


def records(images: dict[str, Image.Image]) -> list[Record]:
    """PNG files with their names as captions."""
    return [Record(name, png(np.asarray(image)), name.replace("_", " ")) for name, image in images.items()]


# Every format keeps the order of the records, so that a seed gives the same batches from each.


def write_json(folder: Path, records: Sequence[Record]) -> Path:
    for record in records:
        (folder / f"{record.key}.png").write_bytes(record.image)
    entries = [{"image_file": f"{record.key}.png", "text": record.text} for record in records]
    (folder / "list.json").write_text(json.dumps(entries))
    return folder / "list.json"


def write_folder(folder: Path, records: Sequence[Record]) -> Path:
    for record in records:
        (folder / f"{record.key}.png").write_bytes(record.image)
        (folder / f"{record.key}.txt").write_text(record.text)
    return folder


def write_tars(folder: Path, records: Sequence[Record]) -> Path:
    """Two shards in the layout of img2dataset."""
    half = len(records) // 2
    for shard, part in enumerate((records[:half], records[half:])):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for record in part:
                for suffix, content in (("png", record.image), ("txt", record.text.encode())):
                    entry = tarfile.TarInfo(f"{record.key}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def write_parquet(folder: Path, records: Sequence[Record]) -> Path:
    columns = {"image": [record.image for record in records], "text": [record.text for record in records]}
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=4)
    return folder


def write_array_record(folder: Path, records: Sequence[Record]) -> Path:
    writer = ArrayRecordWriter(str(folder / "train.array_record"), "group_size:1")
    for record in records:
        writer.write(pack(record))
    writer.close()
    return folder


def write_tfds(folder: Path, records: Sequence[Record]) -> Path:
    import tensorflow_datasets as tfds

    class Photographs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = tfds.core.as_path(__file__)  # else tfds would import importlib_resources, which it does not bring

        def _info(self):
            features = {"image": tfds.features.Image(shape=(None, None, 3)), "text": tfds.features.Text()}
            # Without this, tfds would store them in the order of a hash.
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, record in enumerate(records):
                yield i, {"image": io.BytesIO(record.image), "text": record.text}

    tfds.disable_progress_bar()
    Photographs(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder / "photographs" / "1.0.0"


WRITERS: dict[str, Callable[[Path, Sequence[Record]], Path]] = {
    "json": write_json,
    "folder": write_folder,
    "tars": write_tars,
    "parquet": write_parquet,
    "array_record": write_array_record,
    "tfds": write_tfds,
}


def write_formats(root: Path, records: Sequence[Record]) -> dict[str, Path]:
    """The same records in every format, each in a folder of its own; gives what --data.path takes."""
    found = {}
    for name, write in WRITERS.items():
        (root / name).mkdir(parents=True)
        found[name] = write(root / name, records)
    return found
