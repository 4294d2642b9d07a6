"""Released IP-Adapter files (.safetensors and .bin): which variant one is, what it needs, its two parameter trees."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.models.adapter import IPAdapter
from ipadapter_jax.models.projections import HEAD_DIM, ImageProjConfig, example_features, image_projection
from ipadapter_jax.weights.components import drop_ignored
from ipadapter_jax.weights.names import torch_spelling
from ipadapter_jax.weights.tensors import Tensor, open_tensors
from ipadapter_jax.weights.tree import Tree, load_tree

_MAX_DEPTH = 64  # the released Resamplers have 4 layers; what a file has beyond is reported as left over
_BASES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


@dataclasses.dataclass(frozen=True)
class IPAdapterFile:
    """An opened adapter file: nothing but names and shapes has been read."""

    path: Path
    image_proj: dict[str, Tensor]
    ip_adapter: dict[str, Tensor]
    config: ImageProjConfig


def open_ip_adapter(path: Path) -> IPAdapterFile:
    """Opens a file of the base, light, plus, plus-face or full-face kind and finds its variant from keys and shapes.

    Raises WeightFileError for other files, saying what was found.
    """
    tensors = open_tensors(path)
    groups = {
        prefix: {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
        for prefix in ("image_proj", "ip_adapter")
    }
    if not groups["image_proj"] or not groups["ip_adapter"]:
        raise WeightFileError(
            f"{path}: not an IP-Adapter file, which holds image_proj.* and ip_adapter.*; {_guess(tensors)}"
        )
    drop_ignored(tensors, r"(?!image_proj\.|ip_adapter\.).*", str(path))  # the released .bin of plus hold a third part
    config = _detect(path, groups["image_proj"], groups["ip_adapter"])
    return IPAdapterFile(Path(path), groups["image_proj"], groups["ip_adapter"], config)


def _guess(tensors: Mapping[str, Tensor]) -> str:
    known = {
        r"model\.diffusion_model\.|first_stage_model\.": "a whole Stable Diffusion checkpoint, a base model",
        r"controlnet_cond_embedding\.|controlnet_down_blocks\.": "a ControlNet",
        r"time_embedding\.": "a UNet: give the folder that holds its folder unet as the base model",
        r"encoder\.conv_in\.|decoder\.conv_in\.": "a VAE",
        r"(.*[._])?lora[._]": "a LoRA",
        r"vision_model\.|text_model\.": "a CLIP model: give it as the image encoder (image_encoder)",
    }
    for pattern, guess in known.items():
        if any(re.match(pattern, name) for name in tensors):
            return f"it looks like {guess}"
    return f"its tensors are {', '.join(name[:60] for name in list(tensors)[:3]) or 'none'}"


def _detect(path: Path, proj: Mapping[str, Tensor], ip: Mapping[str, Tensor]) -> ImageProjConfig:
    face_id = "perceiver_resampler.proj_in.weight" in proj or {"proj.2.weight", "norm.weight"} <= proj.keys()
    if face_id or any("_lora." in name for name in ip):
        raise WeightFileError(
            f"{path}: a FaceID adapter, which is not supported; use a base, plus or full-face adapter"
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
        return ImageProjConfig("base", features, width, num_tokens=_ratio(rows, width))
    if "proj.3.weight" in proj:
        return ImageProjConfig("full", proj["proj.0.weight"].shape[1], width, num_tokens=0)
    if "latents" in proj:
        _, tokens, hidden = proj["latents"].shape
        return ImageProjConfig(
            "plus",
            feature_dim=proj["proj_in.weight"].shape[1],
            cross_attention_dim=width,
            num_tokens=_ratio(tokens, 1),
            hidden_dim=hidden,
            heads=_ratio(proj["layers.0.0.to_q.weight"].shape[0], HEAD_DIM),
            depth=min(_MAX_DEPTH, len({name.split(".")[1] for name in proj if name.startswith("layers.")})),
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
    return (patches if config.uses_patches else embeddings).get(config.feature_dim)


def check_base(file: IPAdapterFile, cross_attention_dim: int, widths: tuple[int, ...]) -> None:
    """Raises WeightFileError unless the adapter was made for a UNet with this text width and these cross-attentions."""
    made_for = file.config.cross_attention_dim
    if made_for != cross_attention_dim:
        family, this = (_BASES.get(width, "no known family") for width in (made_for, cross_attention_dim))
        raise WeightFileError(
            f"{file.path}: made for tokens of width {made_for} ({family}), this base has {cross_attention_dim} "
            f"({this}); take the adapter of this base"
        )
    sites = len(file.ip_adapter) // 2
    if sites != len(widths):
        raise WeightFileError(
            f"{file.path}: made for a UNet with {sites} cross-attentions, this base has {len(widths)}; "
            "take the adapter of this base"
        )


def check_encoder(file: IPAdapterFile, embedding: int, hidden: int, encoder: str) -> None:
    """Raises WeightFileError unless the image encoder's features have the width that the projection reads."""
    kind, found = ("hidden states", hidden) if file.config.uses_patches else ("image embeddings", embedding)
    if found != file.config.feature_dim:
        needed = encoder_name(file.config) or "another encoder"
        raise WeightFileError(
            f"{file.path}: needs {kind} of width {file.config.feature_dim} ({needed}), the image encoder {encoder} "
            f"gives {found}; choose the right one with image_encoder"
        )


def load_ip_adapter(
    file: IPAdapterFile, widths: tuple[int, ...], dtype: np.dtype, put: Callable = jax.device_put
) -> dict[str, Tree]:
    """The trees {"image_proj", "ip_adapter"} in `dtype`; `widths` are the cross-attentions' widths in file order."""
    projection, adapter = image_projection(file.config, dtype), IPAdapter(widths, dtype)
    tokens = jax.ShapeDtypeStruct((1, 1, file.config.cross_attention_dim), jnp.float32)
    templates = {
        "image_proj": jax.eval_shape(projection.init, jax.random.key(0), example_features(file.config))["params"],
        "ip_adapter": jax.eval_shape(adapter.init, jax.random.key(0), tokens)["params"],
    }
    tensors = {"image_proj": file.image_proj, "ip_adapter": file.ip_adapter}
    spelling = torch_spelling()
    return {
        part: load_tree(tensors[part], template, spelling, source=f"{file.path} ({part})", dtype=dtype, put=put)
        for part, template in templates.items()
    }
