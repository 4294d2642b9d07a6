"""From any format of weights that is read to any that is written: adapters, base models, single networks."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ipadapter_jax.adapters import open_image_encoder
from ipadapter_jax.base_model import BASE_COMPONENTS, BaseModel, Reference, open_base, single_file_spelling
from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.files import write_whole
from ipadapter_jax.weights import kinds, single_file
from ipadapter_jax.weights.component_export import our_tensors, save_opened, spelled
from ipadapter_jax.weights.components import read_json
from ipadapter_jax.weights.hub import local_path, path_here
from ipadapter_jax.weights.ip_adapter_export import adapter_metadata, save_adapter_tensors
from ipadapter_jax.weights.ip_adapter_file import IPAdapterFile, check_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.names import torch_spelling
from ipadapter_jax.weights.safetensors_bytes import DTYPES, safetensors_chunks
from ipadapter_jax.weights.tensors import open_tensors
from ipadapter_jax.weights.written import write_proved


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
) -> None:
    """Writes `source` as `out`, by what `source` holds and what `out` is called.

    An IP-Adapter (released file, raw checkpoint of a training with accelerate, UNet of diffusers with one in it)
    becomes a released file, .safetensors or .bin; a base model (diffusers folder, Flax folder, single file) one
    .safetensors or, without such an ending, a folder in diffusers' layout, with `flax` of msgpack files; a CLIP image
    encoder a folder. `dtype` rounds; by default everything stays as it is stored. The rest is as for `open_base`.

    Raises InputError or WeightFileError naming what is wrong; nothing is left under the name of `out` then.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
    if out.exists():
        raise InputError(f"{out} exists; choose another name, or remove it first")
    options = {"config": config, "vae": vae, "text_encoder": text_encoder, "extract_ema": extract_ema}
    on_hub = path_here(source, "source") is None and len(PurePosixPath(source).parts) == 2  # a repository: a base model
    place = Path(source) if on_hub else local_path(source, lambda names: names, what="source")
    kind = kinds.CHECKPOINT if on_hub else _kind(place)
    if kind == kinds.IP_ADAPTER:
        _only(kind, {"flax": flax, **options})
        save_adapter(out, open_ip_adapter(place), dtype)
    elif kind == kinds.IMAGE_ENCODER:
        _only(kind, options)
        opened = open_image_encoder(place)
        _as_folder(out, lambda folder: save_opened(opened, folder, _numpy(dtype), flax=flax))
    else:
        base = open_base(source if on_hub else place, **options)  # pyright: ignore[reportArgumentType]
        _convert_base(base, out, dtype, flax)


def save_adapter(out: Path, file: IPAdapterFile, dtype: str | None) -> None:
    """Writes an adapter, whole and known, with what its file said of itself. Raises InputError as `convert`."""
    check_ip_adapter(file, file.widths)
    known = adapter_metadata(file.config)
    save_adapter_tensors(out, file.tensors, dtype, {**known, **file.metadata})


def _kind(place: Path) -> str:
    """IP_ADAPTER, CHECKPOINT for every base model, or IMAGE_ENCODER. Raises WeightFileError for everything else."""
    if place.is_dir():
        if (place / "unet").is_dir():
            return kinds.CHECKPOINT
        if any(place.glob("*config.json")):
            return kinds.IMAGE_ENCODER
        held = ", ".join(sorted(path.name for path in place.iterdir())[:5]) or "nothing"
        raise WeightFileError(
            f"{place}: no base model (it has no unet/config.json), image encoder (no config.json) or run of training "
            f"(no checkpoints/); it holds {held}: name one of its files"
        )
    tensors = open_tensors(place)
    if single_file.is_single_file(tensors):
        return kinds.CHECKPOINT
    found = kinds.identify(tensors)
    if found.name == kinds.OPENCLIP:
        return kinds.IMAGE_ENCODER
    if found.name not in (kinds.IP_ADAPTER, kinds.IMAGE_ENCODER):
        raise WeightFileError(
            f"{place}: {found} is not converted; give an IP-Adapter, a base model or a CLIP image encoder "
            f"({found.advice})"
        )
    return found.name


def _only(kind: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value:
            raise InputError(f"--{name.replace('_', '-')} has no meaning for {kind}")


def _numpy(dtype: str | None) -> Any:
    return None if dtype is None else np.dtype(dtype)


def _convert_base(base: BaseModel, out: Path, dtype: str | None, flax: bool) -> None:
    base.check()
    if out.suffix == ".safetensors":
        if flax:
            raise InputError(f"{out}: --flax writes a folder; give a name without .safetensors")
        tensors = _single_file(base, _numpy(dtype))
        write_proved(out, safetensors_chunks(tensors, {"format": "pt"}), tensors)
    elif out.suffix in (".ckpt", ".bin", ".pt", ".msgpack"):
        raise InputError(f"{out}: a base model is written as one .safetensors or as a folder; give such a name")
    else:
        _as_folder(out, lambda folder: _save_base(base, folder, _numpy(dtype), flax))


def _single_file(base: BaseModel, dtype: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, prefix in single_file.PREFIXES.items():
        part = base.part(name)
        spelling = single_file_spelling(name, part.config) or torch_spelling()
        tensors |= spelled(our_tensors(part), spelling, dtype, part.blueprint.component.title, prefix)
    return tensors


def _as_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Has the folder written under another name beside `out`, and gives it its own when it is whole."""
    if out.suffix in (".safetensors", ".bin", ".msgpack"):
        raise InputError(f"{out}: this becomes a folder; give a name without {out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=out.parent) as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            write(folder)
            os.rename(folder, out)
    except OSError as error:
        raise InputError(f"{out}: not written ({error.strerror}); make room or choose another place") from None


def _save_base(base: BaseModel, folder: Path, dtype: Any, flax: bool) -> None:
    for name in BASE_COMPONENTS:
        save_opened(base.part(name), folder / name, dtype, flax=flax)
    shutil.copytree(base.folder / "tokenizer", folder / "tokenizer", copy_function=shutil.copyfile)
    scheduler = read_json(base.folder / "scheduler" / "scheduler_config.json")
    named = {**scheduler, "_class_name": _class_name(scheduler.get("_class_name", "PNDMScheduler"), flax)}
    _write_json(folder / "scheduler" / "scheduler_config.json", named)
    _write_json(folder / "model_index.json", _index(named["_class_name"], flax))


def _index(scheduler: str, flax: bool) -> dict[str, Any]:
    """The model_index.json of a whole model without a safety checker."""
    classes = {
        "feature_extractor": (None, None),
        "safety_checker": (None, None),
        "scheduler": ("diffusers", scheduler),
        "text_encoder": ("transformers", _class_name("CLIPTextModel", flax)),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", _class_name("UNet2DConditionModel", flax)),
        "vae": ("diffusers", _class_name("AutoencoderKL", flax)),
    }
    whole = _class_name("StableDiffusionPipeline", flax)
    return {"_class_name": whole, "_diffusers_version": "0.35.0", "requires_safety_checker": False, **classes}


def _class_name(name: str, flax: bool) -> str:
    return ("Flax" if flax else "") + name.removeprefix("Flax")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2).encode() + b"\n")
