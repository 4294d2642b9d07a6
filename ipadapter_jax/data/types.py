"""A record of a data set, and the interface of all data set formats."""

from dataclasses import dataclass
from typing import Protocol, TypedDict

from ipadapter_jax.data.unused_files import UnusedFiles


@dataclass(frozen=True)
class Record:
    """An image, its caption, and the image prompt where that is another image. Images stay encoded."""

    key: str  # what messages call it: "images/1.png", "00003.tar:000031234", "part-0.parquet:17"
    image: bytes
    text: str  # may be ""
    cond_image: bytes | None = None


class DataIdentity(TypedDict):
    """Identifies data, not their location: moving them changes nothing, another size of a file does."""

    kind: str
    records: int
    files: int
    digest: str  # sha256 over the sorted relative names and the sizes of the files


class RecordSource(Protocol):
    """Random access to records, in an order that depends on the data alone.

    Sources can be pickled into worker processes and read from several threads. `unused` counts the files and entries
    that are in no record.
    """

    unused: UnusedFiles

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`, 0 <= index < len. Raises InputError naming its key when this one cannot be read."""
        ...

    def key(self, index: int) -> str:
        """The key of record `index`, without reading its bytes."""
        ...

    def identity(self) -> DataIdentity: ...
