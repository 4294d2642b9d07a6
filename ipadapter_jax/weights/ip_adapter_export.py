"""Writes an adapter as one file under the released names, which diffusers, ComfyUI and others read."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.suggestions import did_you_mean
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.weights.component_export import to_state_dict
from ipadapter_jax.weights.dtype_cast import cast_tensor
from ipadapter_jax.weights.formats.safetensors_writer import DIGEST, DTYPES, digest, safetensors_chunks
from ipadapter_jax.weights.formats.torch_writer import torch_bytes
from ipadapter_jax.weights.identify import FAMILIES
from ipadapter_jax.weights.ip_adapter_variant import encoder_name
from ipadapter_jax.weights.key_mapping import torch_layout
from ipadapter_jax.weights.lazy import Tensor, in_memory
from ipadapter_jax.weights.load_tree import Tree, leaves
from ipadapter_jax.weights.verified_write import write_verified


def adapter_metadata(config: ImageProjConfig, *, step: int | None = None) -> dict[str, str]:
    """The metadata of an exported file.

    variant        base, plus or full
    image_encoder  the CLIP vision model that feeds it, such as ViT-H/14
    features       image_embeds (the projected embedding) or penultimate_states, and their width
    num_tokens     image tokens per image
    base           the family of the base model: SD 1.x
    step           number of training steps, if known
    ipadapter_jax  the version that wrote the file
    """
    features = config.feature_kind.value
    width = config.cross_attention_dim
    known = {} if step is None else {"step": str(step)}
    if config.num_tokens:  # a file of the full variant does not determine it
        known["num_tokens"] = str(config.num_tokens)
    return {
        "variant": config.variant,
        "image_encoder": encoder_name(config) or "custom",
        "features": f"{features} {config.feature_dim}",
        "base": FAMILIES.get(width, f"custom, text width {width}"),
        **known,
        "ipadapter_jax": importlib.metadata.version("ipadapter-jax"),
    }


def save_ip_adapter(
    path: Path, params: Mapping[str, Tree], *, dtype: str = "float16", metadata: Mapping[str, str]
) -> str:
    """Writes the trees {"image_proj", "ip_adapter"}, rounded to `dtype`, and returns the file's sha256.

    The file gets its name only after our own reader has given back every bit of it: until then, and when that fails, an
    older file of this name stays. Equal arguments give equal bytes. Raises InputError naming the tensor that is not
    finite or does not fit `dtype`, or the file that cannot be written.
    """
    if dtype not in DTYPES:
        raise InputError(f"adapter dtype {dtype!r}: choose {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    ours = {place: in_memory(np.asarray(leaf)) for place, leaf in leaves(params).items()}
    return _write(expand_home(Path(path)), to_state_dict(ours, torch_layout(), np.dtype(dtype), "adapter"), metadata)


def save_adapter_tensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: str | None, metadata: Mapping[str, str]
) -> str:
    """The same from tensors under the released names, cast to `dtype`; None keeps theirs."""
    target = None if dtype is None else np.dtype(dtype)
    return _write(path, {name: cast_tensor(t, target, f"adapter: {name}") for name, t in tensors.items()}, metadata)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    if path.suffix == ".bin":  # it has no place for metadata
        tree: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in tensors.items():
            part, _, inner = name.partition(".")
            tree[part][inner] = tensor
        return write_verified(path, [torch_bytes(tree)], tensors)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: an adapter is saved as .safetensors or .bin; give it such a name")
    # Other programs may be strict: no tensors beyond the two parts. Metadata may hold anything.
    about = {**metadata, "format": "pt", DIGEST: digest(tensors)}
    return write_verified(path, safetensors_chunks(tensors, about), tensors)
