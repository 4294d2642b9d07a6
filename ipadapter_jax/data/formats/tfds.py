"""Data sets that TensorFlow Datasets prepared with `file_format="array_record"`, read without TensorFlow."""

from pathlib import Path
from typing import Any, NamedTuple

from ipadapter_jax.data.file_listing import FileListing
from ipadapter_jax.data.formats.array_record import ArrayRecords
from ipadapter_jax.data.formats.column_names import IMAGE, TEXT, ColumnNames, choose_columns
from ipadapter_jax.data.packed_strings import PackedStrings
from ipadapter_jax.data.types import DataIdentity, Record
from ipadapter_jax.data.unused_files import UnusedFiles
from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.text_files import read_json_object

INFO, FEATURES = "dataset_info.json", "features.json"  # the two files that identify such a data set


class TfdsSource:
    """The split `train`, or the only split, in its stored order.

    columns: names of features, if they are not the usual ones.
    Raises InputError: tensorflow-datasets is not installed, another file format, no such feature.
    """

    def __init__(self, files: FileListing, columns: ColumnNames):
        folder = files.root
        _check_format(folder)
        self.unused = UnusedFiles()
        self._features, paths = _open(folder)
        self._columns = choose_columns(columns, _kinds(self._features), str(folder))
        self._files = FileListing(folder, PackedStrings(path.name for path in paths))
        self._records = ArrayRecords([str(path) for path in paths], list(self._files.names))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        key, payload = self.key(index), self._records.read(index)
        try:
            fields = self._features.deserialize_example_np(payload, decoders=_encoded_images(self._features))
            text = fields[self._columns.text].decode("utf-8")
            image, cond_image = fields[self._columns.image], fields.get(self._columns.cond_image)
        except Exception as error:  # the library raises many types
            why = " ".join(str(error).split())[:100]
            raise InputError(f"{key}: not an example with the features of {INFO} ({why})") from None
        return Record(key, image, text, cond_image)

    def key(self, index: int) -> str:
        return self._records.key(index)

    def identity(self) -> DataIdentity:
        return self._files.identity("tfds", len(self))


def _check_format(folder: Path) -> None:
    """Raises InputError unless the records are stored in ArrayRecord files."""
    stored = read_json_object(folder / INFO, "prepare the data set again").get("fileFormat", "tfrecord")
    if stored != "array_record":
        raise InputError(
            f'{folder}: stored as {stored}, which has no random access; prepare it with file_format="array_record", or '
            f"convert it, which needs tensorflow: tfds convert_format --dataset_dir={folder} "
            "--out_file_format=array_record --out_dir=..."
        )


class _Split(NamedTuple):
    features: Any  # of TensorFlow Datasets, a mapping by name
    files: list[Path]


def _open(folder: Path) -> _Split:
    """Opens the data set. Raises InputError if that fails, or if it has several splits and none is `train`."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError(
            f"{folder} is a TensorFlow Datasets folder, and tensorflow-datasets is not installed: "
            "pip install 'ipadapter-jax[tfds]'"
        ) from None
    try:
        info = tfds.builder_from_directory(str(folder)).info
    except Exception as error:  # the library raises many types
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: not readable by tensorflow-datasets ({why}); prepare it again") from None
    names = sorted(info.splits)
    if "train" not in names and len(names) != 1:
        raise InputError(f"{folder}: no split `train` among {', '.join(names) or 'none'}; prepare one of that name")
    split = info.splits["train" if "train" in names else names[0]]
    return _Split(info.features, [Path(path) for path in split.filepaths])


def _kinds(features: Any) -> dict[str, str]:
    import tensorflow_datasets as tfds

    known = {tfds.features.Image: IMAGE, tfds.features.Text: TEXT}
    return {name: known.get(type(feature), type(feature).__name__) for name, feature in features.items()}


def _encoded_images(features: Any) -> dict[str, Any]:
    """Decoders that leave images encoded."""
    import tensorflow_datasets as tfds

    images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    return {name: tfds.decode.SkipDecoding() for name in images}
