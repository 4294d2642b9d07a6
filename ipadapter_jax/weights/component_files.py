"""How the weights of each network are stored, as data: the names of its files and of the tensors in them.

What is built from them stands in components.py; a file can be recognized and described without it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from ipadapter_jax.weights import identify
from ipadapter_jax.weights.key_mapping import VAE_RENAMES
from ipadapter_jax.weights.layouts.openclip import to_transformers
from ipadapter_jax.weights.lazy import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class ComponentFiles:
    """How the weights of one network are stored.

    `kind` is the name that `identify` gives to a file of such weights. `translate` maps the tensors of another layout
    to PyTorch's, and `modern_key` maps an old PyTorch key to the one used today. Keys that match `ignored` are not
    weights of this network (buffers, or the other half of a whole CLIP); they are left out and reported.
    """

    title: str
    kind: str
    classes: tuple[str, ...]  # of diffusers or transformers, as config.json names them
    torch_stem: str
    flax_stem: str
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    other_files: tuple[str, ...] = ()  # other names under which its weights are found
    translate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    modern_key: Callable[[str], str] = lambda key: key
    ignored: str = r"(?!)"


def _old_vae_key(key: str) -> str:
    return re.sub(
        r"(mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda found: f"{found[1]}.{VAE_RENAMES[found[2]]}.",
        key,
    )


def _old_text_key(key: str) -> str:
    return (
        key
        if key.startswith(("text_model.", "vision_", "visual_", "text_projection", "logit"))
        else f"text_model.{key}"
    )


UNET_FILES = ComponentFiles(
    title="UNet",
    kind=identify.UNET,
    classes=("UNet2DConditionModel",),
    torch_stem="diffusion_pytorch_model",
    flax_stem="diffusion_flax_model",
)
VAE_FILES = ComponentFiles(
    title="VAE",
    kind=identify.VAE,
    classes=("AutoencoderKL",),
    torch_stem="diffusion_pytorch_model",
    flax_stem="diffusion_flax_model",
    renames=VAE_RENAMES,
    modern_key=_old_vae_key,
)
TEXT_ENCODER_FILES = ComponentFiles(
    title="text encoder",
    kind=identify.TEXT_ENCODER,
    classes=("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"),
    torch_stem="model",
    flax_stem="flax_model",
    modern_key=_old_text_key,
    ignored=r".*position_ids|text_projection\..*|logit_scale|vision_model\..*|visual_projection\..*",
)
TEXT_ENCODER_WITH_PROJECTION_FILES = dataclasses.replace(
    TEXT_ENCODER_FILES,
    classes=("CLIPTextModelWithProjection", "CLIPModel"),
    ignored=r".*position_ids|logit_scale|vision_model\..*|visual_projection\..*",
)
IMAGE_ENCODER_FILES = ComponentFiles(
    title="image encoder",
    kind=identify.IMAGE_ENCODER,
    classes=("CLIPVisionModelWithProjection", "CLIPVisionModel", "CLIPModel"),
    torch_stem="model",
    flax_stem="flax_model",
    other_files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    translate=to_transformers,
    ignored=r".*position_ids|text_projection\..*|logit_scale|text_model\..*",
)
WHOLE_CLIP_FILES = ComponentFiles(
    title="CLIP model",
    kind=identify.IMAGE_ENCODER,  # `identify` sees its vision half first
    classes=("CLIPModel",),
    torch_stem="model",
    flax_stem="flax_model",
    ignored=r".*position_ids|logit_scale",
)
