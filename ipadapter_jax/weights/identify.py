"""Identifies weights by the names and shapes of their tensors, and says where such a file can be used."""

import dataclasses
import re
from collections.abc import Callable, Mapping

from ipadapter_jax.errors import option
from ipadapter_jax.weights.formats.torch_pickle import UNNAMED
from ipadapter_jax.weights.lazy import Tensor

FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of the text states that cross-attention reads
_FOLDERS_ONLY = ("SD 2.x", "SDXL")  # of FAMILIES: their single files are not read yet
_AS_BASE = "give it as the base model{base}"
_AS_ENCODER = "give it as the image encoder{image_encoder}"
_NO_PLACE = "there is no place for it here"
_OTHER = f"{_NO_PLACE}: only SD 1.x, SD 2.x and SDXL are supported"
_TEXT_WIDTHS = (*FAMILIES, 1280)
_SECOND_ENCODER = "a model of text width 1280"
# Names in FaceID adapters except the portrait variant: a resampler after the projection, or a LoRA of the UNet.
_FACE = r"(.*\.)?(perceiver_resampler\.|\d+\.to_(q|k|v|out)_lora\.)"


@dataclasses.dataclass(frozen=True)
class WeightKind:
    """`name` with its article, the `family` of base models it belongs to or "", and what to do with such a file.
    `usable` says whether it can be used for sampling here, as far as names and shapes tell."""

    name: str
    family: str
    advice: str
    usable: bool = True

    def __str__(self) -> str:
        return f"{self.name} of {self.family}" if self.family else self.name


IP_ADAPTER, CHECKPOINT, UNET, VAE = "an IP-Adapter", "a whole Stable Diffusion checkpoint", "a UNet", "a VAE"
TEXT_ENCODER, IMAGE_ENCODER, LORA, CONTROLNET = "a text encoder", "a CLIP image encoder", "a LoRA", "a ControlNet"
OPENCLIP = "a CLIP model in OpenCLIP's layout"
TAESD, INVERSION = "a TAESD, a small approximation of a VAE", "a textual inversion"
IMAGE_EMBEDS = "a set of image embeddings"
UNKNOWN = "no known kind of weights"

# The first pattern that matches the beginning of a name decides, so a kind comes before those that it contains.
_SIGNATURES: tuple[tuple[str, str, str], ...] = (
    (
        r"((module|model|state_dict|model_state_dict)\.)*((image_proj|image_proj_model|ip_adapter|adapter_modules)\.|.*\.to_[kv]_ip\.)",
        IP_ADAPTER,
        "give it as the adapter{adapter}",
    ),
    (
        r"(model\.diffusion_model\.)?double_blocks\.",
        "a Flux model",
        _OTHER,
    ),
    (
        r"(model\.diffusion_model\.)?joint_blocks\.",
        "an SD 3 model",
        _OTHER,
    ),
    (r"model\.diffusion_model\.|model_ema\.diffusion_model", CHECKPOINT, _AS_BASE),
    (r"(.*[._])?(lora|hada|lokr)[._]", LORA, f"{_NO_PLACE}: merge it into a base model with another program first"),
    (r"control_model\.|controlnet_|input_hint_block\.", CONTROLNET, _NO_PLACE),
    (r"(adapter\.)?body\.\d+\.", "a T2I-Adapter", _NO_PLACE),
    (r".*motion_modules\.", "an AnimateDiff motion module", _NO_PLACE),
    (
        r"time_embedding\.",
        UNET,
        "give the folder that holds it as unet/, next to vae/ and text_encoder/, as the base model{base}",
    ),
    (
        r"first_stage_model\.|(vae\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\.",
        VAE,
        "give it as the VAE{vae}, next to a base model",
    ),
    (r"visual\.(conv1|class_embedding)", OPENCLIP, _AS_ENCODER),
    (r"vision_model\.", IMAGE_ENCODER, _AS_ENCODER),
    (
        r"(taesd_)?(encoder|decoder)\.layers\.\d+\.(conv\.\d|weight$|bias$)|(taesd_(en|de)coder\.)?\d+\.conv\.\d\.weight",
        TAESD,
        "it is not supported here; give a whole VAE (AutoencoderKL){vae}",
    ),
    (
        r"(cond_stage_model\.(transformer\.|model\.)?)?(text_model\.)?(embeddings\.token_embedding|encoder\.layers)\.",
        TEXT_ENCODER,
        "give it as the text encoder{text_encoder}, next to a base model",
    ),
    (r"emb_params$|string_to_(param|token)|clip_[lg]$", INVERSION, _NO_PLACE),
    (r"(image_embeds|hidden_states)$", IMAGE_EMBEDS, "give it in place of images{ip_adapter_image_embeds}"),
)


def identify(tensors: Mapping[str, Tensor]) -> WeightKind:
    """The kind of these tensors; for unknown ones UNKNOWN, with some of the names as its advice."""
    for pattern, name, advice in _SIGNATURES:
        if any(re.match(pattern, key) for key in tensors):
            if name == CHECKPOINT:
                return _checkpoint(tensors)
            family = _FAMILY.get(name, lambda _: "")(tensors)
            refusal = _refusal(name, family, tensors)
            return WeightKind(name, family, refusal or _worded(advice), usable=not refusal)
    if _is_inversion(tensors):
        return WeightKind(INVERSION, "", _NO_PLACE, usable=False)
    shown = ", ".join(name[:60] for name in list(tensors)[:3])
    return WeightKind(UNKNOWN, "", f"its tensors are {shown}" if shown else "it has no tensors")


def _worded(advice: str) -> str:
    """The advice with the names of command line options, in a command line."""
    names = ("base", "adapter", "image_encoder", "vae", "text_encoder", "ip_adapter_image_embeds")
    return advice.format_map({name: option(name) for name in names})


def _refusal(name: str, family: str, tensors: Mapping[str, Tensor]) -> str:
    """Why a file of a known kind cannot be used here; empty if it can."""
    if name == IP_ADAPTER and _reads_faces(tensors):
        return "it can be neither sampled with nor converted yet: it reads the face embedding of InsightFace"
    if name == TEXT_ENCODER and family == _SECOND_ENCODER:
        return "it is SDXL's second text encoder, which is read with the folder of the whole model"
    into, out = (_axis(tensors, rf"conv_{end}\.weight", axis) for end, axis in (("in", 1), ("out", 0)))
    if name == UNET and out and into == 2 * out:
        return "it is one of instruct-pix2pix, which is not supported here yet"
    return ""


def _reads_faces(tensors: Mapping[str, Tensor]) -> bool:
    layers = {key.rpartition("image_proj.")[2] for key in tensors} & {"proj.2.weight", "proj.3.weight"}
    return layers == {"proj.2.weight"} or any(re.match(_FACE, key) for key in tensors)


def _is_inversion(tensors: Mapping[str, Tensor]) -> bool:
    """Whether this is diffusers' learned_embeds: vectors of one or a few tokens, of the width of some text encoder."""
    shapes = [tensor.shape for tensor in tensors.values()]
    bare = all("." not in name and name != UNNAMED and not name.isdecimal() for name in tensors)
    return bare and 0 < len(shapes) <= 16 and all(1 <= len(s) <= 2 and s[-1] in _TEXT_WIDTHS for s in shapes)


def _checkpoint(tensors: Mapping[str, Tensor]) -> WeightKind:
    family = _cross_attention(tensors)
    if any(name.startswith("conditioner.embedders.") for name in tensors):
        family = "SDXL"
    into = _axis(tensors, r"model\.diffusion_model\.input_blocks\.0\.0\.weight", 1)
    out = _axis(tensors, r"model\.diffusion_model\.out\.2\.weight", 0)
    known = {2 * out: "instruct-pix2pix", 2 * out + 1: "inpainting"}
    more = "" if not into or not out or into == out else known.get(into, f"{into}-channel")
    name = f"a whole {more} checkpoint" if more else CHECKPOINT
    if more not in ("", "inpainting"):
        advice = "not supported here yet; take one with 4 or 9 input channels"
        return WeightKind(name, family, advice, usable=False)
    if family in _FOLDERS_ONLY:
        advice = "not supported here yet as a single file; give the model's folder in diffusers' layout"
        return WeightKind(name, family, advice, usable=False)
    return WeightKind(name, family, _worded(_AS_BASE))


def _axis(tensors: Mapping[str, Tensor], pattern: str, axis: int) -> int:
    """The length of an axis of the first tensor whose whole name matches, or 0."""
    for name, tensor in tensors.items():
        if re.fullmatch(pattern, name) and len(tensor.shape) > axis:
            return tensor.shape[axis]
    return 0


def _family(width: int) -> str:
    return FAMILIES.get(width, f"a model of text width {width}" if width else "")


def _cross_attention(tensors: Mapping[str, Tensor]) -> str:
    return _family(_axis(tensors, r".*attn2\.to_k\.weight", 1) or _axis(tensors, r".*attn2\.to_k\.kernel", 0))


_FAMILY: dict[str, Callable[[Mapping[str, Tensor]], str]] = {
    IP_ADAPTER: lambda tensors: _family(_axis(tensors, r".*\.to_k_ip(\.\d+)?\.weight", 1)),
    UNET: _cross_attention,
    CONTROLNET: _cross_attention,
    TEXT_ENCODER: lambda tensors: _family(_axis(tensors, r".*token_embedding\.(weight|embedding)", 1)),
}
