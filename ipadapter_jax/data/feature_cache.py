"""The feature cache: what the frozen encoders computed from a data set, stored so that training reads it in any order.

Its store holds `plan.json` (what is encoded, and by which networks), shards, and, once all of them are there,
`manifest.json`.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from safetensors.numpy import save

from ipadapter_jax.data.feature_shards import FORMAT, CachePlan, open_shard, read_shard_footer
from ipadapter_jax.data.file_listing import allow_open_files
from ipadapter_jax.data.types import DataIdentity
from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.paths import check_utf8
from ipadapter_jax.storage.store import Store
from ipadapter_jax.weights.dtype_cast import all_finite
from ipadapter_jax.weights.formats.tensor_files import open_tensors

_PLAN, _MANIFEST, _SKIPPED, _ZERO = "plan.json", "manifest.json", "skipped.jsonl", "zero_features.safetensors"


def start_cache(store: Store, plan: CachePlan) -> CachePlan:
    """Writes the plan unless there is one. Returns the plan that is there: another one if the cache was started with
    other data or settings."""
    if store.size(_PLAN) is None:
        store.write(_PLAN, _json(plan.to_json()))
    return _read_plan(store, _PLAN)


def finish_cache(store: Store, plan: CachePlan, zero_features: np.ndarray | None) -> int | None:
    """Writes the manifest, which makes the cache complete, if all shards are there.

    zero_features: (L, F), the features of zero pixels, where training needs them for dropped images; else None.
    Returns how many records were skipped; None if shards are missing.
    """
    footers = [read_shard_footer(store, plan, shard) for shard in range(plan.shards)]
    if any(footer is None for footer in footers):
        return None
    skipped = [entry for footer in footers if footer is not None for entry in footer.skipped]
    store.write(_SKIPPED, b"".join(json.dumps(entry).encode() + b"\n" for entry in skipped))
    zero = None
    if zero_features is not None:
        content = save({"features": np.ascontiguousarray(zero_features)})
        store.write(_ZERO, content)
        zero = hashlib.sha256(content).hexdigest()
    sizes = [store.size(plan.shard_name(shard)) for shard in range(plan.shards)]
    manifest = plan.to_json() | {"skipped": len(skipped), "zero_features": zero, "shard_bytes": sizes}
    store.write(_MANIFEST, _json(manifest))
    return len(skipped)


def is_cache(store: Store) -> bool:
    """Whether a store holds a cache, complete or not."""
    return store.size(_PLAN) is not None or store.size(_MANIFEST) is not None


class CachedSamples:
    """Random access to the samples of a complete cache: "mean" and "logvar" (h, w, 4), "features" (F,) or (L, F) in
    the dtype that they were computed in, "input_ids" (77,) int32. Several threads may read; it can be pickled.

    Raises InputError naming the store when the cache is not complete, of another format, or lacks a part.
    """

    def __init__(self, store: Store):
        self.store = store
        check_utf8(store.path(""), "the reader of ArrayRecord")
        self.plan = _read_manifest_plan(store)
        self._manifest = _read_manifest(store, self.plan)
        for shard, expected in enumerate(self._manifest.shard_bytes):
            name = self.plan.shard_name(shard)
            if (size := store.size(name)) != expected:
                what = "is missing" if size is None else "is cut off"
                raise InputError(f"{store.path(name)} {what}: copy it again, or run the encoding command again")
        allow_open_files(self.plan.shards)
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_readers": {}, "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def __len__(self) -> int:
        return self.plan.records

    def key(self, index: int) -> str:
        shard, position = divmod(index, self.plan.records_per_shard)
        return f"{self.plan.shard_name(shard)}:{position}"

    def identity(self) -> DataIdentity:
        return {"kind": "encoded", "records": len(self), "files": self.plan.shards, "digest": self.plan.digest}

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`. Raises InputError naming it when it is damaged or could not be read in the source."""
        shard, position = divmod(index, self.plan.records_per_shard)
        try:
            payload = self._reader(shard).read([position])[0]
        except RuntimeError as error:
            raise InputError(
                f"{self.key(index)}: damaged ({str(error).split(';')[0]}); copy the shard again, or remove it and run "
                "the encoding command again"
            ) from None
        if not payload:
            raise InputError(f"{self.key(index)}: could not be read when it was to be encoded (see {_SKIPPED} there)")
        if len(payload) != self.plan.layout.size:
            raise InputError(f"{self.key(index)}: holds {len(payload)} bytes instead of {self.plan.layout.size}")
        found = self.plan.layout.unpack(payload)
        for name, array in found.items():
            if array.dtype.kind != "i" and not all_finite(array):
                raise InputError(f"{self.key(index)}: its {name} are not finite: encode the data again")
        return found

    def _reader(self, shard: int) -> ArrayRecordReader:
        """The reader of a shard, for all threads, opened on first use."""
        if shard not in self._readers:
            with self._lock:
                if shard not in self._readers:
                    self._readers[shard] = open_shard(self.store, self.plan, shard)
        return self._readers[shard]

    def account(self) -> str:
        """In one line: the number of records, and how many could not be encoded."""
        skipped = self._manifest.skipped
        where = f"; {skipped} more could not be encoded, see {self.store.path(_SKIPPED)}" if skipped else ""
        return f"{len(self) - skipped} records, 0 files not used{where}"

    def zero_features(self) -> np.ndarray | None:
        """(L, F), the features of zero pixels; None where the features of a dropped image are zero."""
        if self._manifest.zero_features is None:
            return None
        path = self.store.path(_ZERO)
        if self.store.size(_ZERO) is None or self.store.sha256(_ZERO) != self._manifest.zero_features:
            raise InputError(f"{path} is missing or damaged: copy it again, or encode again")
        return open_tensors(path)["features"].read()


class _Manifest(NamedTuple):
    """What the manifest adds to the plan."""

    skipped: int  # records
    zero_features: str | None  # the sha256 of their file
    shard_bytes: list[int]


def _read_manifest_plan(store: Store) -> CachePlan:
    """The plan in the manifest of a complete cache. Raises InputError for what is not one."""
    if store.size(_MANIFEST) is None:
        if store.size(_PLAN) is not None:
            raise InputError(f"{store} is not complete: rerun the command that started it to resume")
        raise InputError(f"{store} holds no encoded samples (it has no {_MANIFEST}); `ipadapter-jax encode` makes them")
    return _read_plan(store, _MANIFEST)


def _read_manifest(store: Store, plan: CachePlan) -> _Manifest:
    raw = store.read_json_object(_MANIFEST)
    zero, sizes, skipped = raw.get("zero_features"), raw.get("shard_bytes"), raw.get("skipped")
    if not isinstance(zero, str | None) or not isinstance(skipped, int) or not isinstance(sizes, list):
        raise _damaged_manifest(store)
    if len(sizes) != plan.shards:
        raise _damaged_manifest(store)
    return _Manifest(skipped, zero, sizes)


def _damaged_manifest(store: Store) -> InputError:
    path = store.path(_MANIFEST)
    return InputError(f"{path} is damaged; copy it again, or remove it and run the encoding command again")


def _read_plan(store: Store, name: str) -> CachePlan:
    path = store.path(name)
    try:
        raw = store.read_json_object(name)
        found = raw["format"]
        plan = CachePlan.from_json(raw) if found == FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); copy it or encode again") from None
    if plan is None:
        raise InputError(f"{path} has format {found!r}, this version reads {FORMAT}; encode again")
    return plan


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
