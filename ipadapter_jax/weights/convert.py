"""Converts weights between formats: adapters, base models, and single networks."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ipadapter_jax.errors import InputError, WeightFileError, argument
from ipadapter_jax.inputs.suggestions import is_slip
from ipadapter_jax.inputs.validation import check_dtype
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.weights import identify
from ipadapter_jax.weights.base_model_export import new_folder, save_base_model
from ipadapter_jax.weights.component_export import convert_component
from ipadapter_jax.weights.components import IMAGE_ENCODER, TEXT_ENCODER, UNET, VAE_COMPONENT
from ipadapter_jax.weights.formats.safetensors_writer import DTYPES
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.hub import SUFFIXES, check_revision, local_path, path_here
from ipadapter_jax.weights.image_encoder import open_image_encoder
from ipadapter_jax.weights.ip_adapter_export import adapter_metadata, save_adapter_tensors
from ipadapter_jax.weights.ip_adapter_file import IPAdapterFile, check_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.layouts import single_file
from ipadapter_jax.weights.model_source import ModelSource, StrPath, model_source
from ipadapter_jax.weights.open_base_model import open_base
from ipadapter_jax.weights.open_component import open_component
from ipadapter_jax.weights.weight_files import choose_files, choose_weights


def convert(source: ModelSource | StrPath, out: Path, *, dtype: str | None = None, flax: bool = False) -> None:
    """Writes the weights in `source` as `out`; what they become follows from their kind and from the name `out`.

    An IP-Adapter (released file, raw checkpoint of a training with accelerate, UNet of diffusers that contains one)
    becomes a released file, .safetensors or .bin. A base model (diffusers folder, Flax folder, single file) becomes one
    .safetensors file or, if `out` has no such ending, a folder in diffusers' layout, with `flax` of msgpack files. A
    CLIP image encoder becomes a folder. Tensors are cast to `dtype`; None keeps theirs. The options of a `ModelSource`
    are for base models, `variant` also for the folder of a network.

    Raises InputError or WeightFileError naming what is wrong; then nothing is left under the name `out`.
    """
    if dtype is not None:
        dtype = check_dtype(dtype, DTYPES)
    out = expand_home(out)
    if out.exists():
        raise InputError(f"{out} exists; choose another name, or remove it first")
    _check_ending(out)
    source = model_source(source)
    target = None if dtype is None else np.dtype(dtype)
    if _is_repository(source.model):
        return save_base_model(open_base(source), out, target, flax=flax)
    check_revision(source.model, source.revision, "source")
    place = local_path(source.model, _needed_of_folder, what="source", revision=source.revision)
    kind = _kind(place)
    if kind == identify.CHECKPOINT:
        source = dataclasses.replace(source, model=place, revision=None)
        return save_base_model(open_base(source), out, target, flax=flax)
    options = {name: value for name, value in source.options().items() if name != "revision"}
    if kind == identify.IP_ADAPTER:
        refuse_options(kind, {"flax": flax, **options})
        return save_adapter(out, open_ip_adapter(place), dtype)
    refuse_options(kind, options | ({"variant": None} if place.is_dir() else {}))
    component = next(component for component in _NETWORKS if component.files.kind == kind)
    if component is IMAGE_ENCODER and source.variant is None:
        opened = open_image_encoder(place)
    else:
        opened = open_component(component, place, source.variant)
    with new_folder(out) as folder:
        convert_component(opened, folder, target, flax=flax)


def _check_ending(out: Path) -> None:
    """Raises InputError for the ending of a format that is not written, or a misspelled one: either would silently name
    a folder. All other endings are parts of names (rv.v5, sd15.fp16)."""
    ending = out.suffix
    slips = [known for known in (*_ENDINGS, ".ckpt") if is_slip(ending, known)]
    if ending in _ENDINGS or not (slips or ending.lower() in _NOT_WRITTEN):
        return
    meant = f" (did you mean {out.stem}{slips[0]}?)" if slips and slips[0] in _ENDINGS else ""
    raise InputError(
        f"{out}: nothing is written as {ending}{meant}; an adapter is saved as .safetensors or .bin, a base model "
        "as one .safetensors or as a folder, whose name has no such ending"
    )


_ENDINGS = (".safetensors", ".bin")
_NOT_WRITTEN = (  # formats of other programs
    *(".ckpt", ".pt", ".pth", ".pt2", ".sft", ".pkl", ".pickle", ".msgpack", ".npy", ".npz"),
    *(".h5", ".hdf5", ".onnx", ".gguf", ".ggml", ".tflite"),
)
_NETWORKS = (UNET, VAE_COMPONENT, TEXT_ENCODER, IMAGE_ENCODER)


def _is_repository(source: StrPath) -> bool:
    """Whether this can only be a repository on the Hub, which is a base model."""
    weights = str(source).endswith(SUFFIXES)
    return path_here(source, "source") is None and len(PurePosixPath(source).parts) == 2 and not weights


def _needed_of_folder(names: Sequence[str]) -> Sequence[str]:
    """The files to download of a folder inside a repository, which can only be an image encoder."""
    return choose_files(names, {"": IMAGE_ENCODER.files}, ("open_clip_config.json",), None)


def save_adapter(out: Path, file: IPAdapterFile, dtype: str | None) -> None:
    """Writes an adapter with the metadata of its file. Raises InputError as `convert`."""
    check_ip_adapter(file, file.widths)
    save_adapter_tensors(out, file.tensors, dtype, {**file.metadata, **adapter_metadata(file.config)})


def _kind(place: Path) -> str:
    """IP_ADAPTER, CHECKPOINT for every base model, or the kind of the network in a folder. Raises WeightFileError for
    all other weights."""
    if place.is_dir():
        return identify.CHECKPOINT if (place / "unet").is_dir() else _kind_of_folder(place)
    tensors = open_tensors(place)
    if single_file.is_single_file(tensors):
        return identify.CHECKPOINT
    found = identify.identify(tensors)
    if found.name == identify.OPENCLIP:
        return identify.IMAGE_ENCODER
    if found.name not in (identify.IP_ADAPTER, identify.IMAGE_ENCODER):
        raise WeightFileError(
            f"{place}: {found} alone is not converted; give an IP-Adapter, a base model, a CLIP image encoder or a "
            f"network's folder with its config.json ({found.advice})"
        )
    return found.name


def _kind_of_folder(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    for component in _NETWORKS:
        try:
            weights = choose_weights(component.files, names, str(folder), None)
        except WeightFileError:  # no file of this network's name
            continue
        found = identify.identify(open_tensors(folder / weights)).name
        if found == component.files.kind or (found == identify.OPENCLIP and component is IMAGE_ENCODER):
            return component.files.kind
    held = ", ".join(names[:5]) or "nothing"
    raise WeightFileError(
        f"{folder}: not a base model (it has no unet/config.json), not the folder of a network, and not a training run "
        f"(no checkpoints/); it holds {held}: name one of its files"
    )


def refuse_options(kind: str, options: Mapping[str, StrPath | bool | None]) -> None:
    """Raises InputError for an option that is given and has no meaning for this kind of source."""
    for name, value in options.items():
        if value:
            raise InputError(f"{argument(name)} has no meaning for {kind}; leave it out")
