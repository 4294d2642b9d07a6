"""How strongly an image prompt acts, layer by layer and step by step: numbers that a person writes, as one table."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.arrays import is_array, to_numpy
from ipadapter_jax.inputs.suggestions import closest_match
from ipadapter_jax.inputs.validation import is_number
from ipadapter_jax.models import families
from ipadapter_jax.models.families import layer_presets
from ipadapter_jax.models.unet_config import CrossAttentionLayer


@dataclasses.dataclass(frozen=True)
class Scale:
    """Weight lambda of an image prompt (arXiv 2308.06721, equation 5): value x the layer's factor x the step's.

    layers: a preset's name (`preset_names`); a mapping of preset names to factors, which are added; diffusers'
    dictionary ({"down": {"block_2": [0, 1]}, "mid": 1, "up": ...}, what is not named is 0); or one factor for each
    layer in the order in which an image passes them (down, mid, up: as ComfyUI numbers them).
    start, end: the part of the steps in which the prompt acts, as diffusers' control_guidance_start and _end.
    steps: factors spread evenly over all steps, linear between them: (1, 0) fades out, (0, 1) in, (1,) is constant.
    """

    value: float = 1.0
    layers: "LayerFactors" = "linear"
    start: float = 0.0
    end: float = 1.0
    steps: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("layers", "steps"):  # arrays do not compare as one
            if is_array(value := getattr(self, name)):
                object.__setattr__(self, name, tuple(to_numpy(value, name).tolist()))


LayerFactors = str | Mapping[str, object] | Sequence[float]
"""A preset's name, a mapping of presets or of blocks, or one factor for each layer, as `Scale` describes them."""

ScaleLike = float | str | Mapping[str, object] | Scale
"""A scale as a caller gives it: a number, a preset's name, diffusers' dictionary or a `Scale`."""


class ScaleTable(NamedTuple):
    """Weights of one image prompt by step and cross-attention layer, both (n, s), with the layers in the order of
    the weight file.

    weight: with which each guidance branch attends to its own image tokens. swapped: where a precise preset takes the
    prompt away from layers, the weight with which the unconditional branch attends to the conditional one's tokens
    there instead, so that guidance steers these layers away from the image; `weight` is 0 there.
    """

    weight: np.ndarray
    swapped: np.ndarray


class Position(NamedTuple):
    """A cross-attention layer as presets see it: its transformer's number `index` of `total` in the order of execution
    (down, mid, up), and the part of the UNet it is in. In SD 1.x and 2.x a transformer has one layer, in SDXL several.
    """

    index: int
    total: int
    part: str  # down, mid or up


class GenericPreset(NamedTuple):
    """Factors for any UNet: one for each part of it, or, where there is a ramp, its values before the first
    transformer, in the middle and after the last, linear between, from 0.05 (0) to 1 (1)."""

    down: float = 1.0
    mid: float = 1.0
    up: float = 1.0
    ramp: tuple[float, float, float] | None = None

    def factor(self, position: Position) -> float:
        """The factor of one layer."""
        if self.ramp is None:
            return {"down": self.down, "mid": self.mid, "up": self.up}[position.part]
        first, middle, last = self.ramp
        twice = 2 * position.index / position.total
        share = first + (middle - first) * twice if twice <= 1 else middle + (last - middle) * (twice - 1)
        return 0.05 + 0.95 * share


# The names and factors of ComfyUI and A1111; models/families.py has the presets that name layers of one family.
PRESETS: Mapping[str, GenericPreset] = MappingProxyType(
    {
        "linear": GenericPreset(),
        "ease in": GenericPreset(ramp=(1, 0.5, 0)),
        "ease out": GenericPreset(ramp=(0, 0.5, 1)),
        "ease in-out": GenericPreset(ramp=(0, 1, 0)),
        "reverse in-out": GenericPreset(ramp=(1, 0, 1)),
        "weak input": GenericPreset(down=0.2),
        "weak middle": GenericPreset(mid=0.2),
        "weak output": GenericPreset(up=0.2),
        "strong middle": GenericPreset(down=0.2, up=0.2),
    }
)


def preset_names() -> list[str]:
    """The names of all presets: those for any UNet, then those of the families for their layers."""
    return [*PRESETS, *layer_presets()]


def scale_table(scale: ScaleLike, cross_attention: Sequence[CrossAttentionLayer], num_steps: int) -> ScaleTable:
    """A number, a preset's name, diffusers' dictionary or a `Scale` as weights. Raises InputError naming the fault."""
    if isinstance(scale, str | Mapping):
        scale = Scale(layers=scale)
    if not isinstance(scale, Scale):
        scale = Scale(_number(scale, "ip_adapter_scale"))
    value = _number(scale.value, "ip_adapter_scale")
    steps = value * _step_factors(scale, num_steps)[:, None]
    layers = _layer_factors(scale.layers, cross_attention)
    weight, swapped = steps * layers, np.zeros((num_steps, len(cross_attention)))
    positions = _positions(cross_attention)
    preset = layer_presets(positions[0].total).get(scale.layers) if isinstance(scale.layers, str) else None
    if preset is not None and preset.swapped:
        swapped = steps * np.array([preset.swapped.get(position.index, 0.0) for position in positions])
    return ScaleTable(weight.astype(np.float32), swapped.astype(np.float32))


def _step_factors(scale: Scale, num_steps: int) -> np.ndarray:
    """(n,), 0 outside of start and end."""
    start, end = _number(scale.start, "start of a scale"), _number(scale.end, "end of a scale")
    if not 0 <= start < end <= 1:
        raise InputError(
            f"{argument('ip_adapter_scale', part='start')}: start={start} and end={end} must be parts of the run, "
            "0 <= start < end <= 1"
        )
    curve = _numbers(scale.steps, "steps of a scale")
    if not len(curve):
        raise InputError(
            f"{argument('ip_adapter_scale', part='steps')}: steps is empty; (1,) is constant, (1, 0) fades out"
        )
    step = np.arange(num_steps)
    active = (step / num_steps >= start) & ((step + 1) / num_steps <= end)
    if not active.any():
        raise InputError(
            f"{argument('ip_adapter_scale', part='start')}: no whole step of {num_steps} lies between start={start} "
            f"and end={end}"
        )
    factors = np.interp(np.linspace(0, len(curve) - 1, num_steps), np.arange(len(curve)), curve)
    return factors * active


def _layer_factors(layers: LayerFactors, cross_attention: Sequence[CrossAttentionLayer]) -> np.ndarray:
    """(s,) in file order."""
    if isinstance(layers, str):
        return _preset(layers, cross_attention)
    if isinstance(layers, Mapping):
        if layers.keys() <= {"down", "mid", "up"}:
            return _blocks(layers, cross_attention)
        if precise := {name for name, preset in layer_presets().items() if preset.swapped} & layers.keys():
            raise InputError(
                f"{argument('ip_adapter_scale', part='layers')}: {min(precise)!r} cannot be a part of a "
                "sum; give it alone"
            )
        pairs = [
            (_preset(name, cross_attention), _number(factor, f"layers[{name!r}]")) for name, factor in layers.items()
        ]
        return sum((factor * preset for preset, factor in pairs), np.zeros(len(cross_attention)))
    factors = _numbers(layers, "layers of a scale")
    positions, layer_count = _positions(cross_attention), len(cross_attention)
    if len(factors) == layer_count:
        return factors[np.argsort(_executed(cross_attention))]
    if len(factors) != positions[0].total:
        several = f" in {positions[0].total} transformers" if positions[0].total < layer_count else ""
        raise InputError(
            f"{argument('ip_adapter_scale', part='layers')}: {len(factors)} factors for {layer_count} layers{several}; "
            f"give one for each{' layer, or for each transformer' if several else ''}"
        )
    return factors[[position.index for position in positions]]


def _executed(cross_attention: Sequence[CrossAttentionLayer]) -> list[int]:
    """The layers in the order of execution, as their places in the weight file."""
    parts = ["down", "mid", "up"]
    return sorted(  # sorting is stable
        range(len(cross_attention)), key=lambda s: parts.index(cross_attention[s].block.partition("_")[0])
    )


def _positions(cross_attention: Sequence[CrossAttentionLayer]) -> list[Position]:
    """The position of each layer, in the order of the weight file (down, up, mid)."""
    places = [(layer.block, layer.attention) for layer in cross_attention]
    transformers = list(dict.fromkeys(places[s] for s in _executed(cross_attention)))
    return [Position(transformers.index(p), len(transformers), p[0].partition("_")[0]) for p in places]


def _preset(name: str, cross_attention: Sequence[CrossAttentionLayer]) -> np.ndarray:
    positions = _positions(cross_attention)
    if name in PRESETS:
        return np.array([PRESETS[name].factor(position) for position in positions])
    if name not in preset_names():
        near = closest_match(str(name), preset_names())
        meant = f"did you mean {near!r}?" if near else f"choose {', '.join(preset_names())}"
        raise InputError(f"{argument('ip_adapter_scale', part='layers')}: no preset {name!r}; {meant}")
    preset = layer_presets(positions[0].total).get(name)
    if preset is None:
        known = [family for family in families.FAMILIES if name in family.layer_presets]
        wanted = " and ".join(f"the {family.transformers} transformers of {family.title}" for family in known)
        raise InputError(
            f"{argument('ip_adapter_scale', part='layers')}: the preset {name!r} is for {wanted}, this UNet has "
            f"{positions[0].total}; give factors for its layers"
        )
    return np.array([preset.weight.get(position.index, 0.0) for position in positions])


def _blocks(tree: Mapping[str, object], cross_attention: Sequence[CrossAttentionLayer]) -> np.ndarray:
    """diffusers' dictionary: a number for a part or a block, or a list with one for each transformer of a block, whose
    layers share it; a list for a part goes to each of its blocks."""
    found = np.zeros(len(cross_attention))
    for part, given in tree.items():
        inside: dict[str, list[int]] = {}
        for s, layer in enumerate(cross_attention):
            if layer.block.startswith(part):
                inside.setdefault(re.sub(rf"^{part}_blocks?", "block", layer.block), []).append(s)
        blocks = given if isinstance(given, Mapping) else dict.fromkeys(inside, given)
        for name, value in blocks.items():
            if name not in inside:
                raise InputError(
                    f"{argument('ip_adapter_scale', part='layers')}: {part}.{name} has no cross-attention "
                    f"here; {part} has "
                    f"{', '.join(sorted(inside))}"
                )
            of_layer = [cross_attention[s].attention for s in inside[name]]
            found[inside[name]] = _spread(value, max(of_layer) + 1, f"{part}.{name}")[of_layer]
    return found


def _spread(value: object, count: int, what: str) -> np.ndarray:
    """A number for all, or as many numbers as transformers."""
    factors = _numbers([value] if isinstance(value, Real) else value, what)
    if len(factors) not in (1, count):
        raise InputError(
            f"{argument('ip_adapter_scale', part='layers')}: {what} has {len(factors)} factors for {count} "
            "transformers; give one for each"
        )
    return np.broadcast_to(factors, count)


def _number(value: object, what: str) -> float:
    if not is_number(value):
        raise InputError(f"{argument(what, value)} is not a finite number; 0 is the base model, 1 the full image")
    return float(value)


def _numbers(values: object, what: str) -> np.ndarray:
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        raise InputError(f"{argument('ip_adapter_scale', part='layers')}: {what}={values!r} is not a list of numbers")
    return np.array([_number(value, what) for value in values])
