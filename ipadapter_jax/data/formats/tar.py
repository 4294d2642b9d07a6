"""Tar shards of img2dataset and WebDataset, with random access without unpacking.

Opening reads only the headers; the index takes 80 bytes and the name of each record.
"""

import os
import tarfile
import warnings
from collections.abc import Iterator
from io import FileIO
from typing import NamedTuple

import numpy as np

from ipadapter_jax.data.file_listing import FileListing, check_size
from ipadapter_jax.data.formats.file_groups import ROLES, TEXTS, group_files, make_record, split_member
from ipadapter_jax.data.packed_strings import PackedStrings
from ipadapter_jax.data.types import DataIdentity, Record
from ipadapter_jax.data.unused_files import NO_CAPTION, SECOND_DOT, UnusedFiles
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.formats import is_image_name
from ipadapter_jax.inputs.strings import replace_surrogates

MEMBER = np.dtype([("offset", np.int64), ("size", np.int64)])  # of the content; size -1: no such member
_MAX_HEADER = 1 << 20
ENTRY = np.dtype([("shard", np.int32), *((role, MEMBER) for role in ROLES)])


class _Headers(FileIO):
    """A tar of which only headers are read. Refuses long ones: extended headers declare their own length, and a sparse
    file can hold one of gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class _ShardIndex(NamedTuple):
    stems: list[str]
    entries: np.ndarray


class _Member(NamedTuple):
    """A complete file in a tar: its content is `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int


class TarSource:
    """Shards in the order of their names, records in the order of their shard; `file_groups` says what a record is.

    Of a shard that is damaged or truncated the complete records are used, with a warning that names it.
    Raises InputError if there are no records.
    """

    def __init__(self, files: FileListing):
        self._files = files
        self.unused = UnusedFiles()
        stems: list[str] = []
        tables = []
        for shard in range(len(files)):
            names, table = self._index(shard)
            stems += names
            tables.append(table)
        self._entries = np.concatenate(tables)
        self._stems = PackedStrings(stems)
        if not stems:
            dotted = next((name for name in self.unused.names(SECOND_DOT) if is_image_name(name)), None)
            why = "a shard holds members such as 000000000.jpg with 000000000.txt; a key ends at the first dot"
            if dotted is not None:
                why = (
                    f"a WebDataset key ends at the first dot, and {dotted} has another: write the shards again with no "
                    "dots in the keys"
                )
            raise InputError(f"{replace_surrogates(files.path(0))}: no images in these tar files; {why}")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Record:
        key, entry = self.key(index), self._entries[index]
        # Opened for each record: that costs microseconds, and threads and pickles share no file.
        try:
            with open(self._files.path(entry["shard"]), "rb", buffering=0) as file:
                roles = [role for role in ROLES if entry[role]["size"] >= 0]
                return make_record(key, {role: _read(file, entry[role], key, role in TEXTS) for role in roles})
        except OSError as error:
            raise InputError(f"{key}: the shard cannot be read ({error.strerror})") from None

    def key(self, index: int) -> str:
        return replace_surrogates(f"{self._files.names[self._entries[index]['shard']]}:{self._stems[index]}")

    def identity(self) -> DataIdentity:
        return self._files.identity("tar", len(self))

    def _index(self, shard: int) -> _ShardIndex:
        """The stems and the index entries (ENTRY) of the records of one shard."""
        names, places, stems, entries = [], [], [], []
        for name, offset, size in _members(self._files.path(shard)):
            names.append(name)
            places.append((offset, size))
        records, unused = group_files(names, split_member, joined=True)
        shown = self._files.names[shard]
        self.unused.extend(unused, f"{shown}:")
        for stem, members in records:
            stems.append(stem)
            entries.append((shard, *(places[members[role]] if role in members else (0, -1) for role in ROLES)))
            if not any(role in members for role in TEXTS):
                self.unused.add(NO_CAPTION, f"{shown}:{names[members['image']]}", is_record=True)
        return _ShardIndex(stems, np.array(entries, ENTRY))


def _members(path: str) -> Iterator[_Member]:
    """All complete files in a tar. Warns if the archive is incomplete."""
    try:
        end = os.stat(path).st_size
        with _Headers(path) as file, tarfile.open(path, "r:", file) as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"] = []  # the library would keep them all, 1.5 kB each
                if member.offset_data + member.size > end:
                    break
                if member.isreg() and not member.issparse():
                    yield _Member(member.name, member.offset_data, member.size)
            # After a damaged header the library simply stops; a complete archive ends in blocks of zeros.
            if tar.fileobj is not None:
                tar.fileobj.seek(tar.offset)
                if member is None and tar.fileobj.read(512) == bytes(512):
                    return
        why = "it is damaged or ends early"
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        why = " ".join(str(error).split())[:100]
    warnings.warn(
        f"{replace_surrogates(path)}: only the whole records of this tar are used ({why}); download it again, "
        "and unpack it if it is compressed",
        stacklevel=2,
    )


def _read(file: FileIO, member: np.void, key: str, is_text: bool) -> bytes:
    offset, size = member.tolist()
    check_size(size, key, is_text)
    file.seek(offset)
    content = file.read(size)
    if len(content) != size:
        raise InputError(f"{key}: its tar has become shorter since it was opened; download it again")
    return content
