"""What a file or folder of weights is and what it needs, told without reading the weights."""

import collections
import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipadapter_jax.base_model import BASE_COMPONENTS
from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.files import sha256
from ipadapter_jax.weights.adapter_names import adapter_parts
from ipadapter_jax.weights.components import IMAGE_ENCODER
from ipadapter_jax.weights.ip_adapter_file import DIGEST, describe_adapter
from ipadapter_jax.weights.kinds import IP_ADAPTER, identify
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.safetensors_bytes import digest
from ipadapter_jax.weights.tensors import files_of, open_file
from ipadapter_jax.weights.weight_files import choose_weights


def describe(path: Path) -> dict[str, Any]:
    """Facts about a file of weights by name: kind, container, base (the family), for an adapter variant, image_encoder,
    features and tokens, then dtype, parameters, tensors, sha256 and metadata. A folder gives such facts for every
    network below "parts".

    Raises InputError or WeightFileError for what holds no weights or is damaged.
    """
    return _describe_folder(path) if path.is_dir() else _describe_file(path)


def _describe_folder(folder: Path) -> dict[str, Any]:
    parts = {}
    places = {name: (component, folder / name) for name, component in BASE_COMPONENTS.items()}
    places |= {"image_encoder": (IMAGE_ENCODER, folder / "image_encoder")}
    for name, (component, place) in places.items():
        if place.is_dir():
            parts[name] = _describe_file(place / choose_weights(component, _names(place), str(place), None))
    if not parts:
        held = _names(folder)
        for component in (*BASE_COMPONENTS.values(), IMAGE_ENCODER):  # one network, perhaps in several formats
            with contextlib.suppress(WeightFileError):
                return _describe_file(folder / choose_weights(component, held, str(folder), None))
        files = [name for name in held if name.endswith(".index.json")]
        files = files or [name for name in held if name.endswith((".safetensors", ".bin", ".msgpack", ".ckpt"))]
        if len(files) != 1:
            here = "no weights here" if not files else "several files of weights; name one"
            raise InputError(f"{folder}: {here} (it holds {', '.join(held[:5]) or 'nothing'})")
        return _describe_file(folder / files[0])
    return {"path": str(folder), "kind": "a base model in diffusers' layout", "parts": parts}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _describe_file(path: Path) -> dict[str, Any]:
    container, tensors, metadata = open_file(path)
    kind = identify(tensors)
    facts: dict[str, Any] = {"path": str(path), "kind": kind.name, "container": container}
    if kind.family:
        facts["base"] = kind.family
    if kind.name == IP_ADAPTER:
        projection, adapter, _ = adapter_parts(str(path), tensors)
        facts |= describe_adapter(projection, adapter)
    use = kind.advice
    if kind.name == IP_ADAPTER and kind.family in ("SDXL", "SD 2.x"):
        use = "it can be converted, not sampled with"
    if "not supported" in facts.get("variant", ""):
        use = "none here yet"
    facts |= {"use": use, **_numbers(tensors)}
    facts["bytes"] = sum(file.stat().st_size for file in files_of(path))
    facts["sha256"] = {file.name: sha256(file) for file in files_of(path)}
    if DIGEST in metadata:
        facts["intact"] = metadata[DIGEST] == digest(tensors)
    return facts | {"metadata": dict(sorted(metadata.items()))}


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype.name] += math.prod(tensor.shape)
    dtypes = ", ".join(name for name, _ in sizes.most_common())
    return {"dtype": dtypes, "parameters": sum(sizes.values()), "tensors": len(tensors)}
