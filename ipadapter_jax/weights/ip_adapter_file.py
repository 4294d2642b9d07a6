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
from ipadapter_jax.models.image_projections import HEAD_DIM, ImageProjConfig, example_features, image_projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.ops.fast_params import parameter_shapes
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.weights.formats.safetensors_writer import digest
from ipadapter_jax.weights.formats.tensor_files import open_file
from ipadapter_jax.weights.hub import local_path
from ipadapter_jax.weights.identify import FAMILIES, IP_ADAPTER, UNSUPPORTED, identify
from ipadapter_jax.weights.ignored_tensors import report_ignored
from ipadapter_jax.weights.key_mapping import torch_layout
from ipadapter_jax.weights.layouts.ip_adapter import adapter_parts
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.load_tree import CheckedTensors, Tree, check_tree

_MAX_LAYERS = 64  # the released Resamplers have 4; tensors of further layers are reported as left over
DIGEST = "tensors_sha256"  # a key in the metadata of our files: over names, dtypes, shapes and bytes


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
    config = _detect(path, projection, adapter)
    return IPAdapterFile(path, projection, adapter, config, dict(metadata))


def face_id(proj: Mapping[str, Tensor], ip: Mapping[str, Tensor]) -> str | None:
    """The name of a FaceID variant, which reads the embedding of a face recognizer; None for every other adapter."""
    if "perceiver_resampler.proj_in.weight" in proj:
        return "FaceID Plus"
    if {"proj.2.weight", "norm.weight"} <= proj.keys():
        rows, width = proj["proj.2.weight"].shape[:1], proj["norm.weight"].shape[:1]
        portrait = rows and width and width[0] and rows[0] // width[0] > 4
        return "FaceID portrait" if portrait else "FaceID"
    return "FaceID" if any("_lora." in name for name in ip) else None


def _detect(path: Path, proj: Mapping[str, Tensor], ip: Mapping[str, Tensor]) -> ImageProjConfig:
    if face := face_id(proj, ip):
        lora = " and brings a LoRA of the UNet" if any("_lora." in name for name in ip) else ""
        raise WeightFileError(
            f"{path}: a {face} adapter: it needs the face embedding of InsightFace{lora}, which is not supported; "
            "use a base, plus or full-face adapter"
        )
    try:
        config = _projection(proj, width=ip["1.to_k_ip.weight"].shape[1])
    except KeyError as error:
        raise WeightFileError(f"{path}: not a whole IP-Adapter file, {error} is missing; download it again") from None
    except (ValueError, IndexError):
        raise WeightFileError(
            f"{path}: not a known IP-Adapter, its shapes do not fit together; download it again"
        ) from None
    if config is None:
        raise WeightFileError(f"{path}: an unknown image projection with {', '.join(sorted(proj)[:3])}")
    return config


def _projection(proj: Mapping[str, Tensor], width: int) -> ImageProjConfig | None:
    """The variant and sizes of a projection to tokens of this width; KeyError, ValueError and so on if incomplete."""
    if "proj.weight" in proj:
        rows, features = proj["proj.weight"].shape
        return ImageProjConfig("base", _ratio(features, 1), width, num_tokens=_ratio(rows, width))
    if "proj.3.weight" in proj:
        return ImageProjConfig("full", _ratio(proj["proj.0.weight"].shape[1], 1), width, num_tokens=0)
    if "latents" in proj:
        _, tokens, hidden = proj["latents"].shape
        return ImageProjConfig(
            "plus",
            feature_dim=_ratio(proj["proj_in.weight"].shape[1], 1),
            cross_attention_dim=width,
            num_tokens=_ratio(tokens, 1),
            hidden_dim=hidden,
            heads=_ratio(proj["layers.0.0.to_q.weight"].shape[0], HEAD_DIM),
            depth=min(_MAX_LAYERS, len({name.split(".")[1] for name in proj if name.startswith("layers.")})),
            ff_mult=_ratio(proj["layers.0.1.1.weight"].shape[0], hidden),
        )
    return None


def _ratio(whole: int, part: int) -> int:
    if part < 1 or whole < part or whole % part:
        raise ValueError(f"{part} does not divide {whole}")
    return whole // part


def encoder_name(config: ImageProjConfig) -> str | None:
    """The published encoder whose features have the width that a projection reads, or None."""
    patches = {1024: "ViT-L/14", 1280: "ViT-H/14", 1664: "ViT-bigG/14"}
    embeddings = {768: "ViT-L/14", 1024: "ViT-H/14", 1280: "ViT-bigG/14"}
    return (patches if config.feature_kind.has_positions else embeddings).get(config.feature_dim)


def describe_adapter(proj: Mapping[str, Tensor], ip: Mapping[str, Tensor]) -> dict[str, str | int]:
    """What can be said of any adapter, supported or not: variant, tokens, image_encoder, features."""
    if face := face_id(proj, ip):
        encoder = "InsightFace" + (" and ViT-H/14" if face == "FaceID Plus" else "")
        return {"variant": f"{face} (not supported)", "image_encoder": encoder}
    try:
        config = _projection(proj, width=ip["1.to_k_ip.weight"].shape[1])
    except (KeyError, ValueError, IndexError):
        config = None
    if config is None:
        return {"variant": "not a whole one, or unknown"}
    return {
        "variant": config.variant,
        "image_encoder": encoder_name(config) or "custom",
        "features": f"{config.feature_kind.value} {config.feature_dim}",
        "tokens": config.num_tokens or "one per position of the encoder (257 of ViT-H/14)",
    }


def check_base(file: IPAdapterFile, cross_attention_dim: int, widths: tuple[int, ...]) -> None:
    """Raises WeightFileError unless the adapter was made for a UNet with this text width and cross-attention layers of
    these widths."""
    made_for = file.config.cross_attention_dim
    if made_for != cross_attention_dim:
        family, this = (FAMILIES.get(width, "no known family") for width in (made_for, cross_attention_dim))
        its_base = "" if family in UNSUPPORTED else f", or its base{option('base')}"
        raise WeightFileError(
            f"{file.path}: made for tokens of width {made_for} ({family}), this base has {cross_attention_dim} "
            f"({this}); give an adapter of this base{option('adapter')}{its_base}"
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
