"""Describes a file or folder of weights: what it is and what it needs, without reading the weights."""

import collections
import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ipadapter_jax.errors import InputError, WeightFileError, option
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.weights.component_files import IMAGE_ENCODER_FILES, TEXT_ENCODER_FILES, UNET_FILES, VAE_FILES
from ipadapter_jax.weights.formats.safetensors_writer import DIGEST, digest
from ipadapter_jax.weights.formats.shard_index import files_of
from ipadapter_jax.weights.formats.tensor_files import open_file
from ipadapter_jax.weights.hub import SUFFIXES, local_path
from ipadapter_jax.weights.identify import IP_ADAPTER, identify
from ipadapter_jax.weights.ip_adapter_variant import describe_adapter
from ipadapter_jax.weights.layouts.ip_adapter import adapter_parts
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.unsupported_families import family_in, unsupported
from ipadapter_jax.weights.weight_files import choose_files, choose_weights

_PARTS = {  # by the name of the folder
    "unet": UNET_FILES,
    "vae": VAE_FILES,
    "text_encoder": TEXT_ENCODER_FILES,
    "image_encoder": IMAGE_ENCODER_FILES,
}
Facts = dict[str, object]  # strings, numbers, booleans, or facts in turn, by name


def inspect_weights(path: str | os.PathLike) -> Facts:
    """Facts by name about a file of weights, a path, a place on the Hub, "mini" or "mini-plus": kind, container, base
    (the family), for an adapter variant, image_encoder, features and tokens, then dtype, parameters, tensors, sha256
    and metadata. A folder gives such facts for every network below "parts".

    Raises InputError or WeightFileError for what holds no weights or is damaged.
    """
    path = local_path(path, _needed, what="weights")
    return _describe_folder(path) if path.is_dir() else _describe_file(path)


def _needed(names: Sequence[str]) -> Sequence[str]:
    """Of a repository's files, or of a folder's in one, those that `_describe_folder` looks at."""
    parts = {name: files for name, files in _PARTS.items() if any(n.startswith(f"{name}/") for n in names)}
    if parts:
        return choose_files(names, parts, ("model_index.json",), None)
    for files in _PARTS.values():
        with contextlib.suppress(WeightFileError):
            return choose_files(names, {"": files}, (), None)
    found = [name for name in names if name.endswith(SUFFIXES)]
    if len(found) != 1:
        raise InputError(f"weights: {_no_one_file(found, names)}")
    return found


def _no_one_file(files: Sequence[str], names: Sequence[str]) -> str:
    """Why a folder with these weight files, none or several, cannot be described."""
    if not files:
        return f"no weights here (it holds {', '.join(names[:5]) or 'nothing'})"
    return f"several files of weights; name one of {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}"


def _describe_folder(folder: Path) -> Facts:
    parts: dict[str, Facts] = {}
    for name, files in _PARTS.items():
        place = folder / name
        if place.is_dir():
            parts[name] = _describe_file(place / choose_weights(files, _names(place), str(place), None))
    if not parts:
        held = _names(folder)
        for files in _PARTS.values():  # one network, perhaps in several formats
            with contextlib.suppress(WeightFileError):
                return _describe_file(folder / choose_weights(files, held, str(folder), None))
        found = [name for name in held if name.endswith(".index.json")]
        found = found or [name for name in held if name.endswith(SUFFIXES)]
        if len(found) != 1:
            raise InputError(f"{folder}: {_no_one_file(found, held)}")
        return _describe_file(folder / found[0])
    family = unsupported(folder)
    use = f"{family} is not supported here yet" if family else f"give it as the base model{option('base')}"
    kind = f"{family or 'a base model'} in diffusers' layout"
    known = family_in(folder)
    base = {"base": known.title} if known is not None and not family else {}
    return {"path": str(folder), "kind": kind, **base, "use": use, "parts": parts}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _describe_file(path: Path) -> Facts:
    container, tensors, metadata = open_file(path)
    kind = identify(tensors)
    facts: Facts = {"path": str(path), "kind": kind.name, "container": container}
    if kind.family:
        facts["base"] = kind.family
    if kind.name == IP_ADAPTER:
        parts = adapter_parts(str(path), tensors)
        facts |= describe_adapter(parts.image_proj, parts.ip_adapter)
    use = "none here yet" if "not supported" in str(facts.get("variant", "")) else kind.advice
    facts |= {"use": use, **_numbers(tensors)}
    facts["bytes"] = sum(file.stat().st_size for file in files_of(path))
    facts["sha256"] = {file.name: sha256(file) for file in files_of(path)}
    if DIGEST in metadata:
        facts["intact"] = metadata[DIGEST] == digest(tensors)
    return facts | {"metadata": dict(sorted(metadata.items()))}


def _numbers(tensors: Mapping[str, Tensor]) -> Facts:
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype.name] += math.prod(tensor.shape)
    dtypes = ", ".join(name for name, _ in sizes.most_common())
    return {"dtype": dtypes, "parameters": sum(sizes.values()), "tensors": len(tensors)}
