"""What the frozen encoders make of a data set, on disk: a folder that training reads in any order.

It holds `plan.json` (what is encoded and by what), shards, and, once all of them are there, `manifest.json`.
"""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors.numpy import save

from ipadapter_jax.data.feature_shards import FORMAT, CachePlan, open_shard, read_shard_footer
from ipadapter_jax.data.file_listing import allow_open_files
from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.atomic_files import sha256, write_atomically
from ipadapter_jax.storage.paths import check_utf8
from ipadapter_jax.storage.text_files import read_json_object
from ipadapter_jax.weights.dtype_cast import all_finite
from ipadapter_jax.weights.formats.tensor_files import open_tensors

_PLAN, _MANIFEST, _SKIPPED, _ZERO = "plan.json", "manifest.json", "skipped.jsonl", "zero_features.safetensors"


def start_cache(folder: Path, plan: CachePlan) -> CachePlan:
    """Writes the plan unless there is one, and returns what is there: another one if the folder was begun otherwise."""
    path = folder / _PLAN
    if not path.exists():
        write_atomically(path, _json(plan.to_json()))
    return _read_plan(path)


def finish_cache(folder: Path, plan: CachePlan, zero_features: np.ndarray | None) -> int | None:
    """Writes the manifest, which makes the cache complete, when all shards are there. zero_features (L, F): what the
    image encoder makes of zero pixels, where training needs it for dropped images.

    Returns how many records were skipped, None when shards are missing.
    """
    facts = [read_shard_footer(folder, plan, shard) for shard in range(plan.shards)]
    if any(found is None for found in facts):
        return None
    skipped = [entry for found in facts if found is not None for entry in found["skipped"]]
    write_atomically(folder / _SKIPPED, b"".join(json.dumps(entry).encode() + b"\n" for entry in skipped))
    zero = None
    if zero_features is not None:
        content = save({"features": np.ascontiguousarray(zero_features)})
        write_atomically(folder / _ZERO, content)
        zero = hashlib.sha256(content).hexdigest()
    sizes = [(folder / plan.shard_name(shard)).stat().st_size for shard in range(plan.shards)]
    manifest = plan.to_json() | {"skipped": len(skipped), "zero_features": zero, "shard_bytes": sizes}
    write_atomically(folder / _MANIFEST, _json(manifest))
    return len(skipped)


def is_cache(path: Path) -> bool:
    """Whether this is the folder of a cache, complete or not."""
    return (path / _PLAN).is_file() or (path / _MANIFEST).is_file()


class CachedSamples:
    """Random access to the samples of a complete cache: "mean" and "logvar" (h, w, 4), "features" (F,) or (L, F) in
    the dtype that they were computed in, "input_ids" (77,) int32. For threads, and to pickle into other processes.

    Raises InputError naming the folder when the cache is not complete, of another format, or lacks a part.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        check_utf8(self.folder, "the reader of ArrayRecord")
        self.plan, self._manifest = _read_manifest(self.folder)
        for shard, size in enumerate(self._manifest["shard_bytes"]):
            path = self.folder / self.plan.shard_name(shard)
            if not path.is_file() or path.stat().st_size != size:
                what = "is cut off" if path.is_file() else "is missing"
                raise InputError(f"{path} {what}: copy it again, or run the encoding command again")
        allow_open_files(self.plan.shards)
        self._readers, self._lock = {}, threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def __len__(self) -> int:
        return self.plan.records

    def key(self, index: int) -> str:
        shard, position = divmod(index, self.plan.records_per_shard)
        return f"{self.plan.shard_name(shard)}:{position}"

    def identity(self) -> dict[str, Any]:
        return {"kind": "encoded", "records": len(self), "files": self.plan.shards, "digest": self.plan.digest}

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`. Raises InputError naming it when it is damaged or was unusable in the source."""
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

    def _reader(self, shard: int) -> Any:
        """Opened on demand; one serves all threads."""
        if shard not in self._readers:
            with self._lock:
                if shard not in self._readers:
                    self._readers[shard] = open_shard(self.folder, self.plan, shard)
        return self._readers[shard]

    def account(self) -> str:
        """How many records there are, and how many could not be encoded, in one line."""
        skipped = self._manifest["skipped"]
        where = f"; {skipped} more could not be encoded, see {self.folder / _SKIPPED}" if skipped else ""
        return f"{len(self) - skipped} records, 0 files not used{where}"

    def zero_features(self) -> np.ndarray | None:
        """(L, F), what the image encoder makes of zero pixels; None where a dropped image is a zero embedding."""
        if self._manifest["zero_features"] is None:
            return None
        path = self.folder / _ZERO
        if not path.is_file() or sha256(path) != self._manifest["zero_features"]:
            raise InputError(f"{path} is missing or damaged: copy it again, or encode again")
        return open_tensors(path)["features"].read()


def _read_manifest(folder: Path) -> tuple[CachePlan, dict[str, Any]]:
    path = folder / _MANIFEST
    if not path.is_file():
        if (folder / _PLAN).is_file():
            raise InputError(f"{folder} is not complete: run the command that began it again, it goes on")
        raise InputError(
            f"{folder} holds no encoded samples (it has no {_MANIFEST}); `ipadapter-jax encode` makes them"
        )
    plan, raw = _read_plan(path), read_json_object(path)
    zero, sizes, skipped = raw.get("zero_features"), raw.get("shard_bytes"), raw.get("skipped")
    known = isinstance(zero, str | None) and isinstance(skipped, int)
    if not known or not isinstance(sizes, list) or len(sizes) != plan.shards:
        raise InputError(f"{path} is damaged; copy it again, or remove it and run the encoding command again")
    return plan, {"zero_features": zero, "shard_bytes": sizes, "skipped": skipped}


def _read_plan(path: Path) -> CachePlan:
    try:
        raw = read_json_object(path)
        found = raw["format"]
        plan = CachePlan.from_json(raw) if found == FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); copy it or encode again") from None
    if plan is None:
        raise InputError(f"{path} has format {found!r}, this version reads {FORMAT}; encode again")
    return plan


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
