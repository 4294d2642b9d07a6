"""A trained adapter as one safetensors file in the authors' spelling, which diffusers, ComfyUI and others read."""

import contextlib
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from ipadapter_jax.errors import InputError
from ipadapter_jax.files import sha256, write_whole
from ipadapter_jax.models.projections import ImageProjConfig
from ipadapter_jax.weights.ip_adapter_file import encoder_name, load_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.names import to_torch, torch_key
from ipadapter_jax.weights.safetensors_bytes import DTYPES, safetensors_bytes
from ipadapter_jax.weights.tree import Tree, leaves, nest


def adapter_metadata(config: ImageProjConfig, *, step: int) -> dict[str, str]:
    """What an exported file says about itself: what cannot be told from its tensors, and what can, in words.

    variant        base, plus or full
    image_encoder  the CLIP vision model that feeds it, such as ViT-H/14
    features       image_embeds (the projected embedding) or penultimate_states, and their width
    num_tokens     image tokens per picture
    base           the family of the base model: SD 1.x
    step           training steps behind these weights
    ipadapter_jax  the version that wrote the file
    """
    features = "penultimate_states" if config.uses_patches else "image_embeds"
    width = config.cross_attention_dim
    return {
        "variant": config.variant,
        "image_encoder": encoder_name(config) or "custom",
        "features": f"{features} {config.feature_dim}",
        "num_tokens": str(config.num_tokens),
        "base": "SD 1.x" if width == 768 else f"custom, text width {width}",
        "step": str(step),
        "ipadapter_jax": importlib.metadata.version("ipadapter-jax"),
    }


def save_ip_adapter(
    path: Path, params: Mapping[str, Any], *, dtype: str = "float16", metadata: Mapping[str, str]
) -> str:
    """Writes the trees {"image_proj", "ip_adapter"}, rounded to `dtype`, and returns the file's sha256.

    The file gets its name only after our own reader has given back every bit of it: until then, and when that fails, an
    older file of this name stays. Equal arguments give equal bytes. Raises InputError naming the tensor that is not
    finite or does not fit `dtype`, or the file that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: an adapter is saved as .safetensors; give it such a name")
    if dtype not in DTYPES:
        raise InputError(f"adapter dtype {dtype!r}: choose {', '.join(DTYPES)}")
    arrays = {place: _rounded(torch_key(place), leaf, np.dtype(dtype)) for place, leaf in leaves(params).items()}
    tensors = {torch_key(place): to_torch(place, array) for place, array in arrays.items()}
    unproven = path.with_name(f".unproven-{path.name}")
    try:
        write_whole(unproven, safetensors_bytes(tensors, {"format": "pt", **metadata}))
        _prove(unproven, nest(arrays), np.dtype(dtype))
        digest = sha256(unproven)
        os.replace(unproven, path)
    except OSError as error:
        raise InputError(f"{path}: not written ({error.strerror}); choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            unproven.unlink()
    return digest


def _rounded(name: str, leaf: ArrayLike, dtype: np.dtype) -> np.ndarray:
    array = np.asarray(leaf)
    if not np.isfinite(array).all():
        raise InputError(f"adapter: {name} holds NaN or infinity; training has diverged, take an earlier checkpoint")
    with np.errstate(over="ignore"):  # reported just below, with the tensor's name
        rounded = array.astype(dtype)
    if not np.isfinite(rounded).all():
        largest = float(np.abs(array).max())
        raise InputError(f"adapter: {name} reaches {largest:.3g}, too much for {dtype}; save it as float32")
    return rounded


def _prove(path: Path, expected: Tree, dtype: np.dtype) -> None:
    """Raises InputError unless the file is an adapter whose trees are bit for bit the expected ones."""
    sites = sorted(expected["ip_adapter"], key=int)
    widths = tuple(expected["ip_adapter"][site]["to_k_ip"]["kernel"].shape[1] for site in sites)
    found = leaves(load_ip_adapter(open_ip_adapter(path), widths, dtype, put=lambda array: array))
    wanted = leaves(expected)
    differing = [place for place in wanted if found[place].tobytes() != wanted[place].tobytes()]
    if differing:
        raise InputError(
            f"{path}: {torch_key(differing[0])} comes back from the disk with other bits than were written; "
            "save to another disk"
        )
