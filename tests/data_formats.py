"""The same few images written in every format of training data that is read."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from ipadapter_jax.data.formats.array_record import pack
from ipadapter_jax.data.types import Record


def jpeg(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG")
        return file.getvalue()


def images(count: int = 6) -> list[Record]:
    """Images and captions, each with an image prompt of its own; keys are stems."""
    return [Record(f"{i:09d}", jpeg(i), f"caption {i}, ein Füchslein", jpeg(100 + i)) for i in range(count)]


def write_json(folder: Path, records: list[Record]) -> Path:
    (folder / "images").mkdir(parents=True)
    entries = []
    for record in records:
        names = {"image_file": f"images/{record.key}.jpg", "cond_image_file": f"images/{record.key}_prompt.jpg"}
        (folder / names["image_file"]).write_bytes(record.image)
        (folder / names["cond_image_file"]).write_bytes(record.cond_image or b"")
        entries.append(names | {"text": record.text})
    (folder / "list.json").write_text(json.dumps(entries))
    return folder / "list.json"


def write_json_lines(folder: Path, records: list[Record]) -> Path:
    entries = json.loads(write_json(folder, records).read_text())
    (folder / "list.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder / "list.json"


def members(record: Record) -> dict[str, bytes]:
    """The files of one record in the folders and tars of img2dataset."""
    files = {f"{record.key}.jpg": record.image, f"{record.key}.txt": record.text.encode()}
    files[f"{record.key}.json"] = json.dumps({"caption": record.text, "url": "https://example.com"}).encode()
    return files | ({} if record.cond_image is None else {f"{record.key}.cond.jpg": record.cond_image})


def write_folder(folder: Path, records: list[Record]) -> Path:
    for shard, record in enumerate(records):
        place = folder / f"{shard // 2:05d}"
        place.mkdir(parents=True, exist_ok=True)
        for name, content in members(record).items():
            (place / name).write_bytes(content)
    (folder / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"url": ["https://example.com"], "status": ["success"]}), folder / "00000.parquet")
    return folder


def write_tar(folder: Path, records: list[Record]) -> Path:
    """Two shards, with the other files of img2dataset beside them."""
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for record in records[shard * 3 : shard * 3 + 3]:
                for name, content in members(record).items():
                    add(tar, name, content)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        pq.write_table(pa.table({"url": ["https://example.com"]}), folder / f"{shard:05d}.parquet")
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write_parquet(folder: Path, records: list[Record]) -> Path:
    """Two files in row groups of 2, images as plain bytes."""
    folder.mkdir(parents=True)
    for part in range(2):
        few = records[part * 4 : part * 4 + 4]
        columns = {"jpg": [r.image for r in few], "caption": [r.text for r in few]}
        columns["cond_image"] = [r.cond_image for r in few]
        pq.write_table(
            pa.table(columns | {"width": [24] * len(few)}), folder / f"part-{part}.parquet", row_group_size=2
        )
    return folder


def write_hugging_face(folder: Path, records: list[Record]) -> Path:
    """As datasets.to_parquet does it: images are structs of bytes and path."""
    folder.mkdir(parents=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = {
        name: pa.array([{"bytes": getattr(r, name), "path": f"{r.key}.jpg"} for r in records], image)
        for name in ("image", "cond_image")
    }
    pq.write_table(pa.table(table | {"text": [r.text for r in records]}), folder / "train.parquet")
    return folder / "train.parquet"


def write_array_record(folder: Path, records: list[Record]) -> Path:
    folder.mkdir(parents=True)
    for shard in range(2):
        writer = ArrayRecordWriter(str(folder / f"train-{shard:05d}.array_record"), "group_size:1")
        for record in records[shard * 4 : shard * 4 + 4]:
            writer.write(pack(record))
        writer.close()
    return folder


def write_tfds(folder: Path, records: list[Record]) -> Path:
    """Stored in an order of its own, which a hash of the keys gives."""
    import tensorflow_datasets as tfds

    class Images(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3))
            features = {"image": image, "caption": tfds.features.Text(), "cond_image": image}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for r in records:
                prompt = io.BytesIO(r.cond_image or b"")
                yield r.key, {"image": io.BytesIO(r.image), "caption": r.text, "cond_image": prompt}

    tfds.disable_progress_bar()
    Images(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder / "images" / "1.0.0"


WRITERS: dict[str, Callable[[Path, list[Record]], Path]] = {
    "json": write_json,
    "json lines": write_json_lines,
    "folder": write_folder,
    "tar": write_tar,
    "parquet": write_parquet,
    "hugging face": write_hugging_face,
    "array_record": write_array_record,
    "tfds": write_tfds,
}
