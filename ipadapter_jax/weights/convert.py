"""From any format of weights that is read to any that is written: adapters, base models, single networks."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ipadapter_jax.errors import InputError, WeightFileError, argument
from ipadapter_jax.inputs.suggestions import is_slip
from ipadapter_jax.inputs.validation import check_dtype
from ipadapter_jax.storage.atomic_files import atomic_replace, remove_partial_files_of, write_atomically
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.weights import identify
from ipadapter_jax.weights.base_model import BASE_COMPONENTS, BaseModel, Reference, open_base, single_file_layout
from ipadapter_jax.weights.component_export import class_name, convert_component, lazy_leaves, spelled
from ipadapter_jax.weights.components import IMAGE_ENCODER
from ipadapter_jax.weights.formats.safetensors_writer import DTYPES, safetensors_chunks
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.hub import SUFFIXES, local_path, path_here
from ipadapter_jax.weights.image_encoder import open_image_encoder
from ipadapter_jax.weights.ip_adapter_export import adapter_metadata, save_adapter_tensors
from ipadapter_jax.weights.ip_adapter_file import IPAdapterFile, check_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.key_mapping import torch_layout
from ipadapter_jax.weights.layouts import single_file
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.open_component import open_component, read_json
from ipadapter_jax.weights.verified_write import write_verified
from ipadapter_jax.weights.weight_files import choose_files, choose_weights


def convert(
    source: Reference,
    out: Path,
    *,
    dtype: str | None = None,
    flax: bool = False,
    config: Reference | None = None,
    vae: Reference | None = None,
    text_encoder: Reference | None = None,
    extract_ema: bool = False,
    variant: str | None = None,
) -> None:
    """Writes `source` as `out`, by what `source` holds and what `out` is called.

    An IP-Adapter (released file, raw checkpoint of a training with accelerate, UNet of diffusers with one in it)
    becomes a released file, .safetensors or .bin; a base model (diffusers folder, Flax folder, single file) one
    .safetensors or, without such an ending, a folder in diffusers' layout, with `flax` of msgpack files; a CLIP image
    encoder a folder. `dtype` rounds; by default everything stays as it is stored. The rest is as for `open_base`.

    Raises InputError or WeightFileError naming what is wrong; nothing is left under the name of `out` then.
    """
    if dtype is not None:
        dtype = check_dtype(dtype, DTYPES)
    out = expand_home(out)
    if out.exists():
        raise InputError(f"{out} exists; choose another name, or remove it first")
    _check_ending(out)
    options = {"config": config, "vae": vae, "text_encoder": text_encoder, "extract_ema": extract_ema}
    options |= {"variant": variant}
    if _is_repository(source):
        return _convert_base(open_base(source, **options), out, dtype, flax)  # pyright: ignore[reportArgumentType]
    place = local_path(source, _of_a_folder, what="source")
    kind = _kind(place)
    if kind == identify.CHECKPOINT:
        return _convert_base(open_base(place, **options), out, dtype, flax)  # pyright: ignore[reportArgumentType]
    if kind == identify.IP_ADAPTER:
        only(kind, {"flax": flax, **options})
        return save_adapter(out, open_ip_adapter(place), dtype)
    only(kind, options | ({"variant": None} if place.is_dir() else {}))
    component = next(component for component in _NETWORKS if component.kind == kind)
    plain = component is IMAGE_ENCODER and variant is None
    opened = open_image_encoder(place) if plain else open_component(component, place, variant)
    return _as_folder(out, lambda folder: convert_component(opened, folder, _numpy(dtype), flax=flax))


def _check_ending(out: Path) -> None:
    """Raises InputError for a name with the ending of a file that is not written, or with a slip in one, which would
    become a folder. All other endings are parts of names (rv.v5, sd15.fp16)."""
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
_NOT_WRITTEN = (  # but by other programs
    *(".ckpt", ".pt", ".pth", ".pt2", ".sft", ".pkl", ".pickle", ".msgpack", ".npy", ".npz"),
    *(".h5", ".hdf5", ".onnx", ".gguf", ".ggml", ".tflite"),
)
_NETWORKS = (*BASE_COMPONENTS.values(), IMAGE_ENCODER)


def _is_repository(source: Reference) -> bool:
    """Whether this can only be a repository of the Hub: a base model."""
    weights = str(source).endswith(SUFFIXES)
    return path_here(source, "source") is None and len(PurePosixPath(source).parts) == 2 and not weights


def _of_a_folder(names: Sequence[str]) -> Sequence[str]:
    """What is needed of a folder inside a repository, which holds an image encoder or nothing for us."""
    return choose_files(names, {"": IMAGE_ENCODER}, ("open_clip_config.json",), None)


def save_adapter(out: Path, file: IPAdapterFile, dtype: str | None) -> None:
    """Writes an adapter, whole and known, with what its file said of itself. Raises InputError as `convert`."""
    check_ip_adapter(file, file.widths)
    save_adapter_tensors(out, file.tensors, dtype, {**file.metadata, **adapter_metadata(file.config)})


def _kind(place: Path) -> str:
    """IP_ADAPTER, CHECKPOINT for every base model, or the kind of a network in a folder. Raises WeightFileError for
    everything else."""
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
            f"{place}: {found} by itself is not converted; give an IP-Adapter, a base model, a CLIP image encoder or a "
            f"network's folder with its config.json ({found.advice})"
        )
    return found.name


def _kind_of_folder(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    for component in _NETWORKS:
        try:
            weights = choose_weights(component, names, str(folder), None)
        except WeightFileError:  # no file of this network's name
            continue
        found = identify.identify(open_tensors(folder / weights)).name
        if found == component.kind or (found == identify.OPENCLIP and component is IMAGE_ENCODER):
            return component.kind
    held = ", ".join(names[:5]) or "nothing"
    raise WeightFileError(
        f"{folder}: no base model (it has no unet/config.json), no network's folder and no run of training (no "
        f"checkpoints/); it holds {held}: name one of its files"
    )


def only(kind: str, options: Mapping[str, Any]) -> None:
    """Raises InputError for an argument that is given and has no meaning for this kind of source."""
    for name, value in options.items():
        if value:
            raise InputError(f"{argument(name)} has no meaning for {kind}; leave it out")


def _numpy(dtype: str | None) -> Any:
    return None if dtype is None else np.dtype(dtype)


def _convert_base(base: BaseModel, out: Path, dtype: str | None, flax: bool) -> None:
    base.check()
    if out.suffix == ".safetensors":
        if flax:
            raise InputError(f"{out}: {argument('flax')} writes a folder; give a name without .safetensors")
        tensors = _single_file(base, _numpy(dtype))
        write_verified(out, safetensors_chunks(tensors, {"format": "pt"}), tensors)
    elif out.suffix in _ENDINGS:
        raise InputError(f"{out}: a base model is written as one .safetensors or as a folder; give such a name")
    else:
        _as_folder(out, lambda folder: _save_base(base, folder, _numpy(dtype), flax))


def _single_file(base: BaseModel, dtype: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, prefix in single_file.PREFIXES.items():
        part = base.part(name)
        spelling = single_file_layout(name, part.config) or torch_layout()
        tensors |= spelled(lazy_leaves(part), spelling, dtype, part.component_config.component.title, prefix)
    return tensors


def _as_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Has the folder written under another name beside `out`, and gives it its own when it is whole."""
    if out.suffix in _ENDINGS:
        raise InputError(f"{out}: this becomes a folder; give a name without {out.suffix}")
    remove_partial_files_of(out)
    with atomic_replace(out, folder=True) as folder:
        write(folder)


def _save_base(base: BaseModel, folder: Path, dtype: Any, flax: bool) -> None:
    for name in BASE_COMPONENTS:
        convert_component(base.part(name), folder / name, dtype, flax=flax)
    tokenizer = base.folder / "tokenizer"
    for file in sorted(path for path in tokenizer.rglob("*") if not path.is_dir()):
        write_atomically(folder / "tokenizer" / file.relative_to(tokenizer), _content(file))
    scheduler = dict(read_json(base.folder / "scheduler" / "scheduler_config.json"))
    name = str(scheduler.get("_class_name", "")).removeprefix("Flax")
    if not name.endswith("Scheduler") or (flax and name not in _FLAX_SCHEDULERS):
        name = "PNDMScheduler"
    scheduler["_class_name"] = class_name(name, flax)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    inpainting = base.config("unet").in_channels != base.config("unet").out_channels
    _write_json(folder / "model_index.json", _index(scheduler["_class_name"], flax, inpainting))


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None


_FLAX_SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    "DPMSolverMultistepScheduler",
)


def _index(scheduler: str, flax: bool, inpainting: bool) -> dict[str, Any]:
    """The model_index.json of a whole model without a safety checker."""
    classes = {
        "feature_extractor": (None, None),
        "safety_checker": (None, None),
        "scheduler": ("diffusers", scheduler),
        "text_encoder": ("transformers", class_name("CLIPTextModel", flax)),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", class_name("UNet2DConditionModel", flax)),
        "vae": ("diffusers", class_name("AutoencoderKL", flax)),
    }
    whole = class_name("StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline", flax)
    return {"_class_name": whole, "_diffusers_version": "0.35.0", "requires_safety_checker": False, **classes}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")
