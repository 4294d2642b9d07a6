"""Which files of a folder or a repository hold a network's weights, and in which variants ("fp16", "non_ema")."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatch

from ipadapter_jax.errors import InputError, WeightFileError, argument
from ipadapter_jax.inputs.suggestions import sort_by_similarity
from ipadapter_jax.weights.component_files import ComponentFiles

_SHARD = r"-\d+-of-\d+"


def choose_weights(files: ComponentFiles, names: Collection[str], folder: str, variant: str | None) -> str:
    """The weight file to read among the names in a folder: safetensors first, then Flax msgpack, then a PyTorch pickle.

    `variant` selects the files of that variant. Without it they are the last resort: fp16, or the only variant.
    Raises WeightFileError naming what was expected and what the folder holds.
    """
    there = variants(files, names)
    wanted = _plain(files) if variant is None else _marked(files, variant)
    last = _marked(files, "fp16" if "fp16" in there or len(there) != 1 else there[0])
    for name in [*wanted, *([] if variant is not None else [*last, *files.other_files])]:
        if name in names:
            return name
    what = f"{files.title} weights" + (f" of the variant {variant!r}" if variant is not None else "")
    held = ", ".join(sorted(name for name in names if name != "config.json")) or "no files"
    others = f", or one of the variants {', '.join(there)}" if there else ""
    raise WeightFileError(f"{folder}: no {what} (it holds {held}); expected {' or '.join(wanted)}{others}")


def choose_files(
    names: Sequence[str], folders: Mapping[str, ComponentFiles], extras: Sequence[str], variant: str | None
) -> list[str]:
    """The files of a repository that loading needs: configs, `extras`, and per network one weight file or its shards.

    They are of `variant` if the network has it. Raises InputError if none has it.
    """
    chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in extras)]
    names_in: dict[str, list[str]] = {folder: [] for folder in folders}
    for name in names:
        folder, _, last = name.rpartition("/")
        if folder in names_in:
            names_in[folder].append(last)
    picked = pick_variants({folder: (folders[folder], names_in[folder]) for folder in folders}, variant)
    for folder, files in folders.items():
        weights = choose_weights(files, names_in[folder], folder or ".", picked[folder])
        needed = ["config.json", weights, *(name for name in names_in[folder] if is_shard(name, weights))]
        chosen += [f"{folder}/{name}" if folder else name for name in needed]
    return chosen


def pick_variants(
    parts: Mapping[str, tuple[ComponentFiles, Collection[str]]], variant: str | None
) -> dict[str, str | None]:
    """The variant in which each part of a model, its files with the names in its folder, is to be read: `variant`
    where the part has it, and None, its plain files, elsewhere.

    Raises InputError naming the variants there are when no part has this one.
    """
    there = {part: variants(files, names) for part, (files, names) in parts.items()}
    if variant is None or any(variant in found for found in there.values()):
        return {part: variant if variant in found else None for part, found in there.items()}
    known = sort_by_similarity(variant, {name for found in there.values() for name in found})
    remedy = f"choose {' or '.join(known)}, or leave it out" if known else "it has no variants at all, so leave it out"
    raise InputError(f"{argument('variant', variant)}: no part of the model has it; {remedy}")


def variants(files: ComponentFiles, names: Iterable[str]) -> list[str]:
    """The variants in which a folder with these names has the weights of a network, sorted."""
    patterns = [re.escape(name).replace("VARIANT", "([^.]+)") for name in _marked(files, "VARIANT")]
    marked = re.compile("|".join(patterns))
    found = {match[match.lastindex or 0] for name in names if (match := marked.fullmatch(name))}
    return sorted(variant for variant in found if not re.search(_SHARD, variant))


def is_shard(name: str, index: str) -> bool:
    """Whether a file may be a shard of this index, whose name tells the variant: MODEL.fp16-00001-of-00002.safetensors,
    or MODEL-00001-of-00002.fp16.safetensors."""
    stem, *marks = index.removesuffix(".json").split(".")
    mark = "".join(f".{re.escape(part)}" for part in marks if part not in ("safetensors", "index"))
    pattern = rf"{re.escape(stem)}({mark}{_SHARD}|{_SHARD}{mark})\.safetensors"
    return index.endswith(".json") and re.fullmatch(pattern, name) is not None


def _pickle(files: ComponentFiles) -> str:
    return files.torch_stem if "pytorch" in files.torch_stem else "pytorch_model"


def _plain(files: ComponentFiles) -> list[str]:
    stem = files.torch_stem
    return [
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{files.flax_stem}.msgpack",
        f"{_pickle(files)}.bin",
    ]


def _marked(files: ComponentFiles, variant: str) -> list[str]:
    """The names of weight files of a variant; of an index of shards both today's and the older one."""
    stem = files.torch_stem
    return [
        f"{stem}.{variant}.safetensors",
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.{variant}.safetensors.index.json",
        f"{stem}.safetensors.{variant}.index.json",
        f"{files.flax_stem}.{variant}.msgpack",
        f"{_pickle(files)}.{variant}.bin",
    ]
