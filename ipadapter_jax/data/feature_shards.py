"""Encoded samples in ArrayRecord shards: the bytes of a sample, the plan of a cache, and its shards.

Shard s holds the source's records [s * n, (s + 1) * n) and one more, its footer as JSON. For a source record that could
not be read the shard holds an empty record, so that record i of the cache is record i of the source, and training
replaces it as it would without the cache. ArrayRecord stores a 64-bit hash of every record and checks it on reading.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.store import Store
from ipadapter_jax.storage.text_files import parse_json

FORMAT = 1
_WRITE = "group_size:1,uncompressed"  # one record per chunk, so that each is read alone; floats do not compress
_READ = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:65536"  # for random access
_BUFFER = 1 << 17  # bytes
_DTYPES = ("float32", "bfloat16", "float16", "int32")


@dataclasses.dataclass(frozen=True)
class SampleLayout:
    """The layout of a sample in a record: its arrays one after the other, little-endian. One layout for a whole
    cache."""

    arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]]

    @classmethod
    def from_json(cls, raw: Mapping[str, Mapping]) -> "SampleLayout":
        """Raises ValueError, KeyError, TypeError or AttributeError for what `to_json` would not give."""
        if unknown := {entry["dtype"] for entry in raw.values()} - set(_DTYPES):
            raise ValueError(f"dtype {unknown}")
        if not all(isinstance(size, int) and size >= 0 for entry in raw.values() for size in entry["shape"]):
            raise ValueError("a shape that is not one of whole numbers")
        return cls({name: (np.dtype(entry["dtype"]), tuple(entry["shape"])) for name, entry in raw.items()})

    def to_json(self) -> dict[str, object]:
        return {name: {"dtype": dtype.name, "shape": list(shape)} for name, (dtype, shape) in self.arrays.items()}

    @functools.cached_property
    def size(self) -> int:
        """Bytes of a record."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.arrays.values())

    def pack(self, sample: Mapping[str, np.ndarray]) -> bytes:
        parts = [sample[name] for name in self.arrays]
        assert all((a.dtype, a.shape) == spec for a, spec in zip(parts, self.arrays.values(), strict=True))
        return b"".join(part.tobytes() for part in parts)

    def unpack(self, payload: bytes) -> dict[str, np.ndarray]:
        """Views of the payload, read-only."""
        found, offset = {}, 0
        for name, (dtype, shape) in self.arrays.items():
            count = math.prod(shape)
            found[name] = np.frombuffer(payload, dtype, count, offset).reshape(shape)
            offset += count * dtype.itemsize
        return found


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """What a cache holds: a pure function of the data, the encoders and the settings that matter to the result.

    made_from: JSON of all that the content depends on: "resolution", "features", "vae", "image_encoder", "data", ...
    """

    records: int
    records_per_shard: int
    layout: SampleLayout
    made_from: Mapping[str, Any]

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> "CachePlan":
        """Raises ValueError, KeyError, TypeError or AttributeError for what `to_json` would not give."""
        per_shard, records, layout, made_from = (
            raw[name] for name in ("records_per_shard", "records", "layout", "made_from")
        )
        if not isinstance(per_shard, int) or not isinstance(records, int) or per_shard < 1 or records < 0:
            raise ValueError(f"{records} records, {per_shard} in a shard")
        if not isinstance(layout, dict) or not isinstance(made_from, dict):
            raise TypeError("layout and made_from are no objects")
        return cls(records, per_shard, SampleLayout.from_json(layout), made_from)

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self) | {"format": FORMAT, "layout": self.layout.to_json()}

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> int:
        return -(-self.records // self.records_per_shard)

    def shard_records(self, shard: int) -> range:
        """The source's records in a shard."""
        first = shard * self.records_per_shard
        return range(first, min(first + self.records_per_shard, self.records))

    def shard_name(self, shard: int) -> str:
        return f"shard-{shard:05d}-of-{self.shards:05d}.array_record"


class ShardWriter:
    """Writes one shard, which appears under its name when the block ends without an error.

    A part of it is never left behind. Raises InputError naming the file, for example when the disk is full.
    """

    def __init__(self, store: Store, plan: CachePlan, shard: int):
        self._store, self._plan, self._shard = store, plan, shard
        self._name = plan.shard_name(shard)
        self.skipped: list[dict[str, object]] = []

    def add(self, sample: Mapping[str, np.ndarray]) -> None:
        """Writes the next record."""
        self._write(self._plan.layout.pack(sample))

    def skip(self, index: int, key: str, reason: str) -> None:
        """Writes an empty record for one that cannot be read: its number in the source, its key and the error."""
        self.skipped.append({"index": index, "key": key, "reason": reason})
        self._write(b"")

    def _write(self, payload: bytes) -> None:
        try:
            self._writer.write(payload)
        except RuntimeError as error:
            raise _not_written(self._store.path(self._name), error) from None

    def __enter__(self) -> "ShardWriter":
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(self._store.replace(self._name))
            self._writer = ArrayRecordWriter(str(temporary), _WRITE)
            self._replacing = stack.pop_all()
        return self

    def __exit__(self, _: type | None, error: BaseException | None, *__: object) -> None:
        with self._replacing:
            try:
                if error is None:
                    footer = {"plan": self._plan.digest, "shard": self._shard, "skipped": self.skipped}
                    self._write(json.dumps(footer).encode())
                self._writer.close()  # some write errors are raised only here
            except RuntimeError as fault:
                raise error or _not_written(self._store.path(self._name), fault) from None
            if error is not None:
                raise error


def _not_written(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: not written ({str(error).split(';')[0]}); all shards before it are kept: make room, then run the "
        "same command again"
    )


def open_shard(store: Store, plan: CachePlan, shard: int) -> ArrayRecordReader:
    """A reader for all threads: `read([position])` returns [bytes], or raises RuntimeError."""
    return ArrayRecordReader(str(store.path(plan.shard_name(shard))), _READ, file_reader_buffer_size=_BUFFER)


class ShardFooter(NamedTuple):
    """What the last record of a shard says about it: the records that are skipped, each {"index", "key", "reason"}."""

    skipped: list[dict[str, object]]


def read_shard_footer(store: Store, plan: CachePlan, shard: int) -> ShardFooter | None:
    """The footer of a shard; None when the shard is missing, cut off or of another plan."""
    count = len(plan.shard_records(shard))
    try:
        reader = open_shard(store, plan, shard)
        footer = parse_json(reader.read([count])[0], "its footer") if reader.num_records() == count + 1 else {}
    except (RuntimeError, InputError):
        return None
    if not isinstance(footer, dict) or (footer.get("plan"), footer.get("shard")) != (plan.digest, shard):
        return None
    return ShardFooter(footer["skipped"])
