"""Released IP-Adapter files (.safetensors and .bin): which variant one is, what it needs, its two parameter trees."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ipadapter_jax.errors import InputError, WeightFileError, argument, option
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.models.image_projections import example_features, image_projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.ops.fast_params import parameter_shapes
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.weights.formats.safetensors_writer import DIGEST, digest
from ipadapter_jax.weights.formats.tensor_files import open_file
from ipadapter_jax.weights.hub import local_path
from ipadapter_jax.weights.identify import FAMILIES, IP_ADAPTER, identify
from ipadapter_jax.weights.ignored_tensors import report_ignored
from ipadapter_jax.weights.ip_adapter_variant import detect_variant, encoder_name
from ipadapter_jax.weights.key_mapping import torch_layout
from ipadapter_jax.weights.layouts.ip_adapter import adapter_parts
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.load_tree import CheckedTensors, Tree, check_tree


@dataclasses.dataclass(frozen=True)
class IPAdapterFile:
    """An opened adapter: its tensors under the released names; only names and shapes have been read."""

    path: Path
    image_proj: dict[str, Tensor]
    ip_adapter: dict[str, Tensor]
    config: ImageProjConfig
    metadata: dict[str, str]

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        """The widths of the cross-attention layers in file order, from the keys' shapes.

        Raises WeightFileError for keys that are not matrices.
        """
        keys = {name: tensor.shape for name, tensor in self.ip_adapter.items() if name.endswith(".to_k_ip.weight")}
        for name, shape in keys.items():
            if len(shape) != 2 or not all(shape):
                raise WeightFileError(f"{self.path}: {name} has shape {shape}, not that of a matrix; download it again")
        return tuple(keys[name][0] for name in sorted(keys, key=_number))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, as a released file names them."""
        parts = {"image_proj": self.image_proj, "ip_adapter": self.ip_adapter}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _number(name: str) -> int:
    first = name.split(".")[0]
    return int(first) if first.isdecimal() else 0


def open_ip_adapter(path: Path) -> IPAdapterFile:
    """Opens a file of the base, light, plus, plus-face or full-face variant, with any names that
    `layouts.ip_adapter` knows, and finds its variant from keys and shapes.

    Raises WeightFileError for other files, saying what was found, and for one of ours whose bytes have changed.
    """
    path = expand_home(Path(path))
    _, tensors, metadata = open_file(path)
    adapter = to_adapter(path, tensors, metadata)
    if DIGEST in metadata and metadata[DIGEST] != digest(tensors):
        raise WeightFileError(
            f"{path}: its weights are not those that were written with it: damaged, so copy the file again; or another "
            f"program changed them and kept the old {DIGEST} in the metadata, so have it leave that out"
        )
    return adapter


def to_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> IPAdapterFile:
    """The adapter in these tensors of `path`. Raises WeightFileError as `open_ip_adapter`."""
    projection, adapter, others = adapter_parts(str(path), tensors)
    if not projection or not adapter:
        kind = identify(tensors)
        if kind.name == IP_ADAPTER:
            lacking = "an image projection (image_proj.*)" if adapter else "keys and values (ip_adapter.*)"
            raise WeightFileError(f"{path}: half an IP-Adapter, without {lacking}; download it again")
        raise WeightFileError(
            f"{path}: not an IP-Adapter file, which holds image_proj.* and ip_adapter.*; this is {kind}: {kind.advice}"
        )
    report_ignored(others, str(path))  # the released .bin files of plus have a third part
    config = detect_variant(path, projection, adapter)
    return IPAdapterFile(path, projection, adapter, config, dict(metadata))


def check_base(file: IPAdapterFile, cross_attention_dim: int, widths: tuple[int, ...]) -> None:
    """Raises WeightFileError unless the adapter was made for a UNet with this text width and cross-attention layers of
    these widths."""
    made_for = file.config.cross_attention_dim
    if made_for != cross_attention_dim:
        family, this = (FAMILIES.get(width, "no known family") for width in (made_for, cross_attention_dim))
        raise WeightFileError(
            f"{file.path}: made for tokens of width {made_for} ({family}), this base has {cross_attention_dim} "
            f"({this}); give an adapter of this base{option('adapter')}, or its base{option('base')}"
        )
    layers = len(file.ip_adapter) // 2
    if layers != len(widths):
        raise WeightFileError(
            f"{file.path}: made for a UNet with {layers} cross-attention layers, this base has {len(widths)}; "
            f"give an adapter of this base{option('adapter')}"
        )


def check_encoder(file: IPAdapterFile, embedding: int, hidden: int, encoder: str) -> None:
    """Raises WeightFileError unless the image encoder's features have the width that the projection reads."""
    kind, found = (
        ("hidden states", hidden) if file.config.feature_kind.has_positions else ("image embeddings", embedding)
    )
    if found != file.config.feature_dim:
        needed = encoder_name(file.config) or "another encoder"
        raise WeightFileError(
            f"{file.path}: needs {kind} of width {file.config.feature_dim} ({needed}), the image encoder {encoder} "
            f"gives {found}; choose the right one with {argument('image_encoder')}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class CheckedAdapter:
    """The tensors of an adapter that fit its variant and the cross-attention layers of a UNet; nothing is read yet."""

    image_proj: CheckedTensors
    ip_adapter: CheckedTensors

    def load(self, dtype: np.dtype, put: Callable = jax.device_put) -> dict[str, Tree]:
        """The trees {"image_proj", "ip_adapter"} in `dtype`. Raises WeightFileError as `CheckedTensors.load`."""
        return {"image_proj": self.image_proj.load(dtype, put), "ip_adapter": self.ip_adapter.load(dtype, put)}


def check_ip_adapter(file: IPAdapterFile, widths: tuple[int, ...]) -> CheckedAdapter:
    """Checks an adapter for a UNet whose cross-attention layers have these widths, in file order.

    Raises WeightFileError naming a tensor that is missing, left over or of another shape.
    """
    templates, layout = _templates(file.config, widths), torch_layout()
    parts = {"image_proj": file.image_proj, "ip_adapter": file.ip_adapter}
    return CheckedAdapter(
        **{
            part: check_tree(tensors, templates[part], layout, source=f"{file.path} ({part})")
            for part, tensors in parts.items()
        }
    )


def load_ip_adapter(
    file: IPAdapterFile, widths: tuple[int, ...], dtype: np.dtype, put: Callable = jax.device_put
) -> dict[str, Tree]:
    """Checks and reads an adapter: the trees {"image_proj", "ip_adapter"} in `dtype`."""
    return check_ip_adapter(file, widths).load(dtype, put)


@functools.lru_cache(maxsize=8)
def _templates(config: ImageProjConfig, widths: tuple[int, ...]) -> dict[str, Tree]:
    projection, adapter = image_projection(config), IPAdapter(widths)
    tokens = jax.ShapeDtypeStruct((1, 1, config.cross_attention_dim), jnp.float32)
    return {
        "image_proj": parameter_shapes(projection, example_features(config)),
        "ip_adapter": parameter_shapes(adapter, tokens),
    }


def adapter_file(path: str | os.PathLike, revision: str | None = None) -> Path:
    """The local path of an adapter file, downloaded if it is on the Hub. Raises InputError naming it."""
    local = local_path(path, _refuse_folder, what="adapter", revision=revision)
    if local.is_dir():
        _refuse_folder([name.name for name in local.iterdir()])
    return local


def _refuse_folder(names: Sequence[str]) -> Sequence[str]:
    files = ", ".join(name for name in names if name.endswith((".safetensors", ".bin"))) or "none"
    raise InputError(f"the adapter is a folder; name one of its files ({files})")
