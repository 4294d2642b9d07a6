"""A base model as files: one .safetensors file, or a folder in diffusers' layout."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.models.families import SD1
from ipadapter_jax.storage.atomic_files import atomic_replace, remove_partial_files_of, write_atomically
from ipadapter_jax.weights.base_model import BaseModel, check_one_text_encoder
from ipadapter_jax.weights.component_export import class_name, convert_component, lazy_leaves, to_state_dict
from ipadapter_jax.weights.formats.safetensors_writer import safetensors_chunks
from ipadapter_jax.weights.key_mapping import torch_layout
from ipadapter_jax.weights.layouts import single_file
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.open_component import read_json
from ipadapter_jax.weights.verified_write import write_verified


def save_base_model(base: BaseModel, out: Path, dtype: np.dtype | None, *, flax: bool) -> None:
    """Writes a base model as one .safetensors file or, if `out` has no such ending, as a folder in diffusers' layout.

    Tensors are cast to `dtype`; None keeps theirs. Raises InputError naming what does not fit or cannot be written.
    """
    base.check()
    check_one_text_encoder("base model", base.source.model, base.family)
    if out.suffix == ".safetensors" and base.family is not SD1:
        raise InputError(f"{out}: {base.family.title} is written as a folder; give a name without .safetensors")
    if out.suffix == ".safetensors":
        if flax:
            raise InputError(f"{out}: {argument('flax')} writes a folder; give a name without .safetensors")
        tensors = _single_file(base, dtype)
        write_verified(out, safetensors_chunks(tensors, {"format": "pt"}), tensors)
    elif out.suffix == ".bin":
        raise InputError(f"{out}: a base model is written as one .safetensors or as a folder; give such a name")
    else:
        with new_folder(out) as folder:
            _save_folder(base, folder, dtype, flax)


def _single_file(base: BaseModel, dtype: np.dtype | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, prefix in single_file.prefixes(base.family).items():
        part = base.part(name)
        layout = single_file.layout_of(part.config) or torch_layout()
        tensors |= to_state_dict(lazy_leaves(part), layout, dtype, part.component_config.component.files.title, prefix)
    return tensors


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`, which gets its name at the end of the block. Raises InputError where `out` has
    the ending of a file."""
    if out.suffix in (".safetensors", ".bin"):
        raise InputError(f"{out}: this becomes a folder; give a name without {out.suffix}")
    remove_partial_files_of(out)
    with atomic_replace(out, folder=True) as folder:
        yield folder


def _save_folder(base: BaseModel, folder: Path, dtype: np.dtype | None, flax: bool) -> None:
    for name in base.components:
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


def _index(scheduler: str, flax: bool, inpainting: bool) -> dict[str, object]:
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


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")
