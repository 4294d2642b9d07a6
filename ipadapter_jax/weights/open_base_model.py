"""Opens a base model: a folder in diffusers' layout, a checkpoint of one file, or either on the Hugging Face Hub."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ipadapter_jax.errors import InputError, WeightFileError, argument
from ipadapter_jax.models.families import FAMILIES, Family
from ipadapter_jax.weights.base_model import BaseModel, components_of
from ipadapter_jax.weights.component_files import ComponentFiles
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.hub import check_revision, local_path, path_here
from ipadapter_jax.weights.identify import identify
from ipadapter_jax.weights.layouts import single_file
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.model_source import ModelSource, StrPath, model_source
from ipadapter_jax.weights.unsupported_families import family_in, unsupported
from ipadapter_jax.weights.weight_files import choose_files, pick_variants

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # its settings are the default for a single file
_EXTRAS = (
    *("model_index.json", "scheduler/*.json"),
    *{f"{role.tokenizer}/*": None for family in FAMILIES for role in family.text_encoders},
)


def open_base(source: ModelSource | StrPath) -> BaseModel:
    """Opens a base model, reading no weights; a path or Hub id alone stands for a `ModelSource` without options.

    Raises InputError naming what is missing, what does not fit, or which option has no effect.
    """
    source = model_source(source)
    extras = (*_EXTRAS, *(f"{name}/config.json" for name in source.replacements))

    def choose(names: Sequence[str]) -> Sequence[str]:
        held = _needed([family for family in FAMILIES if _has_parts_of(family, names)] or FAMILIES[:1], source)
        return choose_files(names, held, extras, source.variant)

    check_revision(source.model, source.revision, "base model")
    root = local_path(source.model, choose, what="base model", revision=source.revision)
    if root.is_file():
        return _open_file(source, root)
    family = _family("base model", source.model, root)
    if not (root / "unet").is_dir():
        held = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise InputError(
            f"base model {source.model}: not a folder in diffusers' layout (it has no unet/config.json but {held}); "
            "give such a folder, or one checkpoint file"
        )
    for name, value in (("config", source.config), ("extract_ema", source.extract_ema)):
        if value:
            raise InputError(f"{argument(name)} is for a checkpoint of one file; {source.model} is a folder")
    return BaseModel(source, root, family, _variants(source, root, _needed([family], source)))


def _has_parts_of(family: Family, names: Sequence[str]) -> bool:
    """Whether these files of a repository have all text encoders of a family."""
    return all(any(name.startswith(f"{role.part}/") for name in names) for role in family.text_encoders)


def _needed(families: Iterable[Family], source: ModelSource) -> dict[str, ComponentFiles]:
    """The files of all networks that base models of these families have and the source does not replace, by part."""
    parts = {name: part.files for family in families for name, part in components_of(family).items()}
    return {name: files for name, files in parts.items() if name not in source.replacements}


def _family(what: str, reference: StrPath, root: Path) -> Family:
    """Of a folder in diffusers' layout; the first of all where its UNet's settings tell none, which those who read the
    settings refuse."""
    if other := unsupported(root):
        families = " or ".join(family.title for family in FAMILIES)
        raise InputError(f"{what} {reference}: {other}, which is not supported here yet; give one of {families}")
    return family_in(root) or FAMILIES[0]


def _variants(source: ModelSource, root: Path, needed: Mapping[str, ComponentFiles]) -> dict[str, str | None]:
    """The variant in which each part of a folder is read. Warns of the parts that lack the requested one."""
    variant = source.variant
    held = {name: [path.name for path in (root / name).glob("*")] for name in needed}
    try:
        found = pick_variants({name: (files, held[name]) for name, files in needed.items()}, variant)
    except InputError as error:
        raise InputError(f"base model {source.model}: {error}") from None
    plain = [needed[name].title for name, picked in found.items() if picked is None]
    if variant is not None and plain:
        warnings.warn(
            f"base model {source.model}: the variant {variant!r} is read where there is one; {' and '.join(plain)} "
            f"{'has' if len(plain) == 1 else 'have'} none, so the plain weights are read",
            stacklevel=2,  # this file, whoever calls: one place warns once
        )
    return found


def open_base_folder(folder: StrPath, variant: str | None) -> BaseModel:
    """A base model that is a folder, for training, which reads it at every start. Raises InputError for a single file,
    saying how to make a folder of it."""
    here = path_here(folder, "base model")
    if here is not None and here.is_file():
        _open_checkpoint(here)
        raise InputError(
            f"base model {folder}: a single file; make a folder of it first, `ipadapter-jax convert {folder} "
            f"{here.name.partition('.')[0]}`, and give that"
        )
    return open_base(ModelSource(folder, variant=variant))


def _open_file(source: ModelSource, file: Path) -> BaseModel:
    if source.variant is not None:
        raise InputError(f"{argument('variant')} is for a folder in diffusers' layout; {source.model} is a single file")
    tensors = _open_checkpoint(file)
    family = single_file.family_of_file(str(file), tensors)
    parts = single_file.split(str(file), tensors, family, extract_ema=source.extract_ema)
    return BaseModel(source, _settings_folder(file, source.config), family, file=file, parts=parts)


def _open_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a single file. Raises WeightFileError saying what it is when it is something else."""
    tensors = open_tensors(file)
    if not single_file.is_single_file(tensors):
        kind = identify(tensors)
        raise WeightFileError(f"base model {file}: this is {kind}, not a base model; {kind.advice}")
    return tensors


def _settings_folder(file: Path, config: StrPath | None) -> Path:
    def choose(names: Sequence[str]) -> Sequence[str]:
        return [name for name in names if name.endswith(("/config.json", "_config.json")) or name.startswith("token")]

    try:
        folder = local_path(config or STABLE_DIFFUSION, choose, what="config")
    except InputError as error:
        if config is not None:
            raise
        raise InputError(
            f"base model {file}: a single file has no tokenizer and no settings; name a folder or Hub id of the same "
            f"family with {argument('config')} ({error})"
        ) from None
    _family("config", config or STABLE_DIFFUSION, folder)
    if not (folder / "unet" / "config.json").is_file():
        given = config or STABLE_DIFFUSION
        raise InputError(f"config {given}: not a folder in diffusers' layout (it has no unet/config.json)")
    return folder
