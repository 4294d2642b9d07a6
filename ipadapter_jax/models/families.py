"""The families of base models that are supported, as data.

`FAMILIES` is the registry: what differs by family is a field here, and code elsewhere asks the registry. Another family
is another entry.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple


class TextEncoderFiles(NamedTuple):
    """Where a text encoder of a family lies in a base model."""

    part: str  # the folder of the network, and the name of this part everywhere
    tokenizer: str  # the folder of its tokenizer
    prefix: str  # of its tensors in a single file


class LayerPreset(NamedTuple):
    """Weights of an image prompt by the number of a cross-attention layer in the order of execution (down, mid, up). A
    layer that is not named has weight 0."""

    weight: Mapping[int, float]
    swapped: Mapping[int, float] = MappingProxyType({})
    """Weights with which the unconditional branch attends to the conditional image instead, so that guidance steers
    these layers away from it."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of base models.

    pipelines: its pipeline classes in a model_index.json.
    recognizes: whether the settings in a unet/config.json are those of this family.
    text_encoders: in the order in which the UNet's text states are concatenated.
    num_layers: cross-attention layers of its published UNets, for which `layer_presets` are written.
    layer_presets: scale presets by name; names and weights as ComfyUI and A1111 have them.
    """

    title: str
    pipelines: tuple[str, ...]
    recognizes: Callable[[Mapping[str, object]], bool]
    text_encoders: tuple[TextEncoderFiles, ...]
    num_layers: int
    layer_presets: Mapping[str, LayerPreset]


def _is_sd1(settings: Mapping[str, object]) -> bool:
    """SD 1.x has no added conditioning, convolutional projections, and 4 input channels, or 9 for inpainting."""
    added, linear = settings.get("addition_embed_type"), settings.get("use_linear_projection")
    return added is None and not linear and settings.get("in_channels", 4) in (4, 9)


_SD1_COMPOSITION = {4: 0.25, 5: 1.0}
_SD1_STYLE = dict.fromkeys((*range(4), *range(9, 16)), 1.0)
_SD1_ALL_BUT_COMPOSITION = dict.fromkeys((layer for layer in range(16) if layer not in _SD1_COMPOSITION), 1.0)

SD1 = Family(
    title="Stable Diffusion 1.x",
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    recognizes=_is_sd1,
    text_encoders=(TextEncoderFiles("text_encoder", "tokenizer", "cond_stage_model.transformer."),),
    num_layers=16,
    layer_presets=MappingProxyType(
        {
            "style": LayerPreset(_SD1_STYLE),
            "composition": LayerPreset(_SD1_COMPOSITION),
            "strong style": LayerPreset(_SD1_ALL_BUT_COMPOSITION),
            "style+composition": LayerPreset(_SD1_STYLE | _SD1_COMPOSITION),
            "precise style": LayerPreset(_SD1_STYLE, swapped=_SD1_COMPOSITION),
            "precise composition": LayerPreset(_SD1_COMPOSITION, swapped=_SD1_STYLE | dict.fromkeys((6, 7, 8), 0.1)),
        }
    ),
)

FAMILIES: tuple[Family, ...] = (SD1,)


def family_of(settings: Mapping[str, object]) -> Family | None:
    """The family whose UNets have these settings (unet/config.json), or None for one that is not supported."""
    return next((family for family in FAMILIES if family.recognizes(settings)), None)


def layer_presets(num_layers: int | None = None) -> dict[str, LayerPreset]:
    """The presets by layer of all families, or of those whose UNets have so many cross-attention layers."""
    chosen = [family for family in FAMILIES if num_layers in (None, family.num_layers)]
    return {name: preset for family in chosen for name, preset in family.layer_presets.items()}
