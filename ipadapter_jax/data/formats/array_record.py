"""ArrayRecord files (Google's array_record, as Grain reads them) with one msgpack map per record:

    {"image": bytes, "text": str, "cond_image": bytes}       # cond_image only where it differs from the image

To write them:
    writer = array_record_module.ArrayRecordWriter("train-00000.array_record", "group_size:1")
    writer.write(pack(record)); ...; writer.close()
group_size:1 stores each record in its own chunk, for fast random access.
"""

from typing import NamedTuple

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from ipadapter_jax.data.file_listing import FileListing, allow_open_files
from ipadapter_jax.data.types import DataIdentity, Record
from ipadapter_jax.data.unused_files import UnusedFiles
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.strings import replace_surrogates
from ipadapter_jax.storage.paths import check_utf8


def pack(record: Record) -> bytes:
    """The payload of a record, without its key."""
    fields: dict[str, bytes | str] = {"image": record.image, "text": record.text}
    if record.cond_image is not None:
        fields["cond_image"] = record.cond_image
    return msgpack.Packer().pack(fields)


def unpack(payload: bytes, key: str) -> Record:
    """The record of a payload from `pack`. Raises InputError naming the key for any other payload."""
    try:
        fields = msgpack.unpackb(payload)  # refuses lengths beyond the payload
        image, text, cond_image = fields["image"], fields["text"], fields.get("cond_image")
        if not (isinstance(image, bytes) and isinstance(text, str) and isinstance(cond_image, bytes | None)):
            raise TypeError
    except Exception:  # the library raises many types
        raise InputError(f'{key}: not a msgpack map {{"image": bytes, "text": str}}; write records so') from None
    return Record(key, image, text, cond_image)


class _Location(NamedTuple):
    shard: int
    position: int


class ArrayRecords:
    """The payloads of several ArrayRecord files, in the given order. Raises InputError naming a file of another format.

    paths: the files; names: what keys call them.
    """

    def __init__(self, paths: list[str], names: list[str]):
        allow_open_files(len(paths))
        self._names = names
        self._shards = [
            _open(path) for path in paths
        ]  # each opens its file on the first read, and is pickled without it
        self._starts = np.cumsum([0, *map(len, self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> bytes:
        shard, position = self._locate(index)
        try:
            return self._shards[shard][position]
        except Exception as error:  # the library raises bare exceptions
            why = " ".join(str(error).split())[:100]
            raise InputError(f"{self.key(index)}: the file is damaged ({why}); copy it again") from None

    def key(self, index: int) -> str:
        shard, position = self._locate(index)
        return replace_surrogates(f"{self._names[shard]}:{position}")

    def _locate(self, index: int) -> _Location:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, "right")) - 1
        return _Location(shard, int(index - self._starts[shard]))


class ArrayRecordSource:
    """Records in the order of their files' names."""

    def __init__(self, files: FileListing):
        self._files, self.unused = files, UnusedFiles()
        self._records = ArrayRecords([files.path(i) for i in range(len(files))], list(files.names))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return unpack(self._records.read(index), self.key(index))

    def key(self, index: int) -> str:
        return self._records.key(index)

    def identity(self) -> DataIdentity:
        return self._files.identity("array_record", len(self))


def _open(path: str) -> ArrayRecordDataSource:
    check_utf8(path, "the reader of ArrayRecord")
    try:
        return ArrayRecordDataSource(path)
    except Exception as error:  # the library raises bare exceptions
        why = " ".join(str(error).split())[:100]
        raise InputError(f"{replace_surrogates(path)}: not a whole ArrayRecord file ({why}); copy it again") from None
