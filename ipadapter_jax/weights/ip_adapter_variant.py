"""Which variant an IP-Adapter is, what it reads and what it gives, from the names and shapes of its tensors."""

from collections.abc import Mapping
from pathlib import Path

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.models.image_proj_config import HEAD_DIM, ImageProjConfig
from ipadapter_jax.weights.lazy import Tensor

_MAX_LAYERS = 64  # the released Resamplers have 4; tensors of further layers are reported as left over


def face_id(proj: Mapping[str, Tensor], ip: Mapping[str, Tensor]) -> str | None:
    """The name of a FaceID variant, which reads the embedding of a face recognizer; None for every other adapter."""
    if "perceiver_resampler.proj_in.weight" in proj:
        return "FaceID Plus"
    if {"proj.2.weight", "norm.weight"} <= proj.keys():
        rows, width = proj["proj.2.weight"].shape[:1], proj["norm.weight"].shape[:1]
        portrait = rows and width and width[0] and rows[0] // width[0] > 4
        return "FaceID portrait" if portrait else "FaceID"
    return "FaceID" if any("_lora." in name for name in ip) else None


def detect_variant(path: Path, proj: Mapping[str, Tensor], ip: Mapping[str, Tensor]) -> ImageProjConfig:
    """The variant and sizes of the adapter in `path`. Raises WeightFileError for one that is not known, not whole or
    not supported."""
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
