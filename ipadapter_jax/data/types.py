"""One training example as it lies in a data set, and what every kind of data set can do."""

from dataclasses import dataclass
from typing import Any, Protocol

from ipadapter_jax.data.unused_files import UnusedFiles


@dataclass(frozen=True)
class Record:
    """An image, its caption, and the image prompt where that is another image. Images stay encoded."""

    key: str  # names it for a person: "images/1.png", "00003.tar:000031234", "part-0.parquet:17"
    image: bytes
    text: str  # may be ""
    cond_image: bytes | None = None


class RecordSource(Protocol):
    """Random access to records, in an order that depends on the data alone.

    Sources hold no open file that matters: they pickle into worker processes and are read from several threads at once.
    `unused` is what lies there and is in no record.
    """

    unused: UnusedFiles

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`, 0 <= index < len. Raises InputError naming its key when this one cannot be read."""
        ...

    def key(self, index: int) -> str:
        """The key of record `index`, without reading its bytes."""
        ...

    def identity(self) -> dict[str, Any]:
        """What is data and not place, as JSON: {"kind", "records", "files", "digest"}, with the sha256 over the sorted
        relative names and sizes of the files. The same after the data was moved, another once a file changed its size.
        """
        ...
