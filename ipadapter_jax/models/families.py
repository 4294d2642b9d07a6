"""The families of base models that are supported, as data.

`FAMILIES` is the registry: what differs by family is a field here, and code elsewhere asks the registry. Another family
is another entry.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple


class FamilyTextEncoder(NamedTuple):
    """Where a text encoder of a family lies in a base model, and what of it conditions the UNet."""

    part: str  # the folder of the network, and the name of this part everywhere
    tokenizer: str  # the folder of its tokenizer
    prefix: str  # of its tensors in a single file
    penultimate: bool = False  # states before the last layer, without the final norm; else the last ones after it
    pooled: bool = False  # whether its pooled state, projected, conditions the time embedding


class LayerPreset(NamedTuple):
    """Weights of an image prompt by the number of a transformer in the order of execution (down, mid, up), which its
    cross-attention layers share. A transformer that is not named has weight 0."""

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
    transformers: of its published UNets that have cross-attention, for which `layer_presets` are written.
    layer_presets: scale presets by name; names and weights as ComfyUI and A1111 have them.
    """

    title: str
    pipelines: tuple[str, ...]
    recognizes: Callable[[Mapping[str, object]], bool]
    text_encoders: tuple[FamilyTextEncoder, ...]
    transformers: int
    layer_presets: Mapping[str, LayerPreset]


def _is(settings: Mapping[str, object], *, added: str | None = None, linear: bool = False) -> bool:
    """Whether a UNet has this added conditioning, linear or convolutional projections, no conditioning on a class, and
    4 input channels, or 9 for inpainting."""
    of_class = settings.get("class_embed_type"), settings.get("num_class_embeds")
    return (
        settings.get("addition_embed_type") == added
        and bool(settings.get("use_linear_projection")) == linear
        and of_class == (None, None)
        and settings.get("in_channels", 4) in (4, 9)
    )


REFINER_WIDTH = 1280
"""Width of the text that SDXL's refiner reads: that of the second text encoder alone."""


_SD1_COMPOSITION = {4: 0.25, 5: 1.0}
_SD1_STYLE = dict.fromkeys((*range(4), *range(9, 16)), 1.0)
_SD1_ALL_BUT_COMPOSITION = dict.fromkeys((layer for layer in range(16) if layer not in _SD1_COMPOSITION), 1.0)

SD1 = Family(
    title="SD 1.x",
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    recognizes=_is,
    text_encoders=(FamilyTextEncoder("text_encoder", "tokenizer", "cond_stage_model.transformer."),),
    transformers=16,
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

SD2 = Family(
    title="SD 2.x",
    pipelines=SD1.pipelines,
    recognizes=lambda settings: _is(settings, linear=True),
    text_encoders=(FamilyTextEncoder("text_encoder", "tokenizer", "cond_stage_model.model."),),
    transformers=16,
    layer_presets=SD1.layer_presets,
)

_SDXL_COMPOSITION, _SDXL_STYLE = {3: 1.0}, {6: 1.0}  # as InstantStyle found (arXiv 2404.02733)

SDXL = Family(
    title="SDXL",
    pipelines=(*("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),),
    recognizes=lambda settings: (
        _is(settings, added="text_time", linear=True) and settings.get("cross_attention_dim") != REFINER_WIDTH
    ),
    text_encoders=(
        FamilyTextEncoder("text_encoder", "tokenizer", "conditioner.embedders.0.transformer.", penultimate=True),
        FamilyTextEncoder(
            *("text_encoder_2", "tokenizer_2", "conditioner.embedders.1.model."), penultimate=True, pooled=True
        ),
    ),
    transformers=11,
    layer_presets=MappingProxyType(
        {
            "style": LayerPreset(_SDXL_STYLE),
            "composition": LayerPreset(_SDXL_COMPOSITION),
            "strong style": LayerPreset(dict.fromkeys((i for i in range(11) if i not in _SDXL_COMPOSITION), 1.0)),
            "style+composition": LayerPreset(_SDXL_STYLE | _SDXL_COMPOSITION),
            "precise style": LayerPreset(_SDXL_STYLE, swapped=_SDXL_COMPOSITION),
            "precise composition": LayerPreset(_SDXL_COMPOSITION, swapped=_SDXL_STYLE),
        }
    ),
)

FAMILIES: tuple[Family, ...] = (SD1, SD2, SDXL)


def family_of(settings: Mapping[str, object]) -> Family | None:
    """The family whose UNets have these settings (unet/config.json), or None for one that is not supported."""
    return next((family for family in FAMILIES if family.recognizes(settings)), None)


def layer_presets(transformers: int | None = None) -> dict[str, LayerPreset]:
    """The presets by layer of all families, or of those whose UNets have so many transformers with cross-attention."""
    chosen = [family for family in FAMILIES if transformers in (None, family.transformers)]
    return {name: preset for family in chosen for name, preset in family.layer_presets.items()}
