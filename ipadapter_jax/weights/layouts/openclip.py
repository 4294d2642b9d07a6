"""CLIP vision encoders in OpenCLIP's layout: their tensors under transformers' names, and their sizes."""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.text_files import read_json_object
from ipadapter_jax.weights.lazy import Tensor, sliced, transposed

log = logging.getLogger("ipadapter_jax")

# OpenCLIP's name -> transformers'. Its fused projection to queries, keys and values is split below.
_RENAMES = {
    r"class_embedding": "vision_model.embeddings.class_embedding",
    r"positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"conv1\.weight": "vision_model.embeddings.patch_embedding.weight",
    r"ln_pre\.(.*)": r"vision_model.pre_layrnorm.\1",
    r"ln_post\.(.*)": r"vision_model.post_layernorm.\1",
    r"transformer\.resblocks\.(\d+)\.ln_([12])\.(.*)": r"vision_model.encoder.layers.\1.layer_norm\2.\3",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(.*)": r"vision_model.encoder.layers.\1.self_attn.out_proj.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(.*)": r"vision_model.encoder.layers.\1.mlp.fc1.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(.*)": r"vision_model.encoder.layers.\1.mlp.fc2.\2",
}
_MAX_LAYERS, _MAX_SIDE = 128, 4096  # far above any encoder
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def is_openclip(tensors: Mapping[str, Tensor]) -> bool:
    return "visual.class_embedding" in tensors


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image half of a model in OpenCLIP's layout under transformers' names; any other file unchanged."""
    if not is_openclip(tensors):
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for whole, tensor in tensors.items():
        name = whole.removeprefix("visual.")
        if name == whole:  # the text half
            continue
        fused = _FUSED.fullmatch(name)
        if fused and tensor.shape and tensor.shape[0] % 3 == 0:
            third, place = tensor.shape[0] // 3, f"vision_model.encoder.layers.{fused[1]}.self_attn"
            for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
                found[f"{place}.{part}.{fused[2]}"] = sliced(tensor, i * third, (i + 1) * third)
        elif name == "proj":
            found["visual_projection.weight"] = transposed(tensor)
        else:
            rule = next((pattern for pattern in _RENAMES if re.fullmatch(pattern, name)), None)
            found[re.sub(rule, _RENAMES[rule], name) if rule else whole] = tensor
    return found


def vision_settings(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """The settings of an image encoder, as in a config.json: the one next to its file, or OpenCLIP's there, or for the
    published ViT-H/14 and ViT-bigG/14 from the shapes. `tensors` have transformers' names.

    Raises InputError if the number of heads and the activation are not known.
    """
    for name, read in (("config.json", dict), ("open_clip_config.json", _from_openclip)):
        if (file.parent / name).is_file():
            settings = read_json_object(file.parent / name, "download it again")
            try:
                return read(settings)
            except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError):
                raise InputError(f"{file.parent / name} cannot be read; download it again") from None
    sizes = _from_shapes(file, tensors)
    if sizes["num_hidden_layers"] > _MAX_LAYERS or sizes["image_size"] > _MAX_SIDE:
        raise InputError(f"{file}: an image encoder of impossible sizes; download it again")
    heads = {1280: 16, 1664: 16}.get(sizes["hidden_size"])
    if heads is None:
        raise InputError(
            f"{file}: an image encoder of width {sizes['hidden_size']}, whose number of heads no tensor tells; "
            "put its config.json next to it, or give its folder"
        )
    log.info("%s: no config.json next to it: read as OpenCLIP's own of this width, with gelu", file)
    return {**sizes, "num_attention_heads": heads, "hidden_act": "gelu"}


def _from_openclip(raw: Mapping[str, object]) -> dict[str, object]:
    model = _section(raw, "model_cfg")
    vision = _section(model, "vision_cfg")
    width = vision["width"]
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "projection_dim": model["embed_dim"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": width // vision.get("head_width", 64),
        "image_size": vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 16),
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }


def _section(settings: Mapping[str, object], name: str) -> dict:
    """The settings in a setting. Raises TypeError for another value."""
    found = settings[name]
    if not isinstance(found, dict):
        raise TypeError(name)
    return found


class _Sizes(TypedDict):
    """What the shapes tell of the settings in a config.json."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    projection_dim: int
    num_hidden_layers: int
    image_size: int
    patch_size: int
    layer_norm_eps: float


def _from_shapes(file: Path, tensors: Mapping[str, Tensor]) -> _Sizes:
    place = "vision_model.embeddings"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layers = {name.split(".")[3] for name in shapes if re.match(r"vision_model\.encoder\.layers\.\d+\.", name)}
    try:
        width, _, patch, _ = shapes[f"{place}.patch_embedding.weight"]
        positions = shapes[f"{place}.position_embedding.weight"][0]
        return {
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
            "projection_dim": shapes["visual_projection.weight"][0],
            "num_hidden_layers": len(layers),
            "image_size": math.isqrt(positions - 1) * patch,
            "patch_size": patch,
            "layer_norm_eps": 1e-5,
        }
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"{file}: not a whole CLIP image encoder ({error} is missing or malformed); download it again"
        ) from None
