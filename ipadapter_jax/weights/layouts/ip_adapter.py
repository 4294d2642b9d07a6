"""The names of an IP-Adapter's tensors in different programs' files, mapped to those of the released files.

Released files hold `image_proj.*` and `ip_adapter.N.to_k_ip.weight`. Training with accelerate leaves
`image_proj_model.*` and `adapter_modules.N.*`; as safetensors it drops the latter, which are the same memory as the
UNet's own `unet.<module>.attn2.processor.to_k_ip.weight`. A saved UNet of diffusers with an adapter in it has those
with a number behind, and the projection under names of its own. DeepSpeed puts `module.` before all, others `model.`.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.lazy import Tensor, concatenated

Tensors = dict[str, Tensor]

_WRAPPERS = ("module.", "model.", "state_dict.", "model_state_dict.")
_PROJECTION = ("image_proj.", "image_proj_model.")
_ADAPTER = ("ip_adapter.", "adapter_modules.")
_IN_UNET = re.compile(
    r"(?:unet\.)?(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?attentions\.(\d+)\.transformer_blocks\.(\d+)"
    r"\.attn2\.processor\.(to_[kv]_ip)(?:\.(\d+))?\.weight"
)
_PROJECTION_IN_UNET = re.compile(r"(?:unet\.)?encoder_hid_proj\.(?:image_projection_layers\.(\d+)\.)?(.*)")


class AdapterParts(NamedTuple):
    """The tensors of an adapter under their released names; a part that a file lacks is empty."""

    image_proj: Tensors
    ip_adapter: Tensors  # keys and values of the cross-attention layers
    others: list[str]  # names of the tensors that are neither


def adapter_parts(source: str, tensors: Mapping[str, Tensor]) -> AdapterParts:
    """The parts of an adapter under any of its names; of a part that a file has under several, the released one.

    Raises WeightFileError naming `source` when it holds several adapters, or only some of the layers of one.
    """
    while wrapper := next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in tensors)), None):
        if not tensors:
            break
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    used: set[str] = set()
    projection = _group(tensors, _PROJECTION, used) or _projection_in_unet(source, tensors, used)
    adapter = _group(tensors, _ADAPTER, used) or _adapter_in_unet(source, tensors, used)
    return AdapterParts(projection, adapter, [name for name in tensors if name not in used])


def _group(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...], used: set[str]) -> Tensors:
    found = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in tensors)]
    names = [name for name in tensors if found and name.startswith(found[0])]
    used.update(names)
    return {name.removeprefix(found[0]): tensors[name] for name in names}


def _adapter_in_unet(source: str, tensors: Mapping[str, Tensor], used: set[str]) -> Tensors:
    """Numbers layers as diffusers registers its processors: down, up, then mid; self-attention has the even numbers."""
    found = {name: match for name in tensors if (match := _IN_UNET.fullmatch(name))}
    _check_one(source, {match[6] for match in found.values()})
    order = ("down_blocks", "up_blocks", "mid_block")
    places = {name: (order.index(m[1]), int(m[2] or 0), int(m[3]), int(m[4])) for name, m in found.items()}
    _check_whole(source, set(places.values()))
    numbers = {place: 2 * i + 1 for i, place in enumerate(sorted(set(places.values())))}
    used.update(found)
    named = {f"{numbers[places[name]]}.{match[5]}.weight": tensors[name] for name, match in found.items()}
    if len(named) < len(found):
        raise WeightFileError(f"{source}: the layers of its adapter are in it twice; save them once")
    return named


def _check_whole(source: str, places: set[tuple[int, int, int, int]]) -> None:
    """Refuses an adapter that lacks layers, which would shift the numbers of all layers after them.

    The UNet is not known here, but its cross-attention layers have no gaps, and are in as many down as up blocks and in
    the middle block."""
    sides = [{block for side, block, *_ in places if side == wanted} for wanted in (0, 1, 2)]
    gaps = any(blocks and len(blocks) != max(blocks) - min(blocks) + 1 for blocks in sides)
    for side, block, attention, layer in places:
        before = (side, block, attention, layer - 1) if layer else (side, block, attention - 1, 0)
        gaps |= before[2] >= 0 and before not in places
    per_block = {(side, block): 0 for side, block, *_ in places}
    for place in {(side, block, attention) for side, block, attention, _ in places}:
        per_block[place[:2]] += 1
    on_the_way = [{count for (side, _), count in per_block.items() if side == wanted} for wanted in (0, 1)]
    gaps |= len(on_the_way[0]) > 1 or on_the_way[1] != {count + 1 for count in on_the_way[0]}
    if places and (gaps or len(sides[0]) != len(sides[1]) or not sides[2]):
        raise WeightFileError(f"{source}: some layers of its adapter are missing; give the whole checkpoint")


def _projection_in_unet(source: str, tensors: Mapping[str, Tensor], used: set[str]) -> Tensors:
    found = {name: match for name in tensors if (match := _PROJECTION_IN_UNET.fullmatch(name))}
    _check_one(source, {match[1] for match in found.values()})
    used.update(found)
    return _released({match[2]: tensors[name] for name, match in found.items()})


def _check_one(source: str, numbers: set[str | None]) -> None:
    if len(numbers) > 1:
        raise WeightFileError(f"{source}: a UNet with {len(numbers)} adapters in it; save it with one")


# diffusers' name of a projection's tensor -> the released one.
_RENAMES = {
    r"image_embeds\.(.*)": r"proj.\1",
    r"ff\.net\.0\.proj\.(.*)": r"proj.0.\1",
    r"ff\.net\.2\.(.*)": r"proj.2.\1",
    r"layers\.(\d+)\.ln0\.(.*)": r"layers.\1.0.norm1.\2",
    r"layers\.(\d+)\.ln1\.(.*)": r"layers.\1.0.norm2.\2",
    r"layers\.(\d+)\.attn\.to_out\.0\.(.*)": r"layers.\1.0.to_out.\2",
    r"layers\.(\d+)\.attn\.(.*)": r"layers.\1.0.\2",
    r"layers\.(\d+)\.ff\.0\.(.*)": r"layers.\1.1.0.\2",
    r"layers\.(\d+)\.ff\.1\.net\.0\.proj\.(.*)": r"layers.\1.1.1.\2",
    r"layers\.(\d+)\.ff\.1\.net\.2\.(.*)": r"layers.\1.1.3.\2",
}


def _released(tensors: Tensors) -> Tensors:
    """diffusers' names of a projection -> the released ones."""
    named: Tensors = {}
    for name, tensor in tensors.items():
        rule = next((pattern for pattern in _RENAMES if re.fullmatch(pattern, name)), None)
        named[re.sub(rule, _RENAMES[rule], name) if rule else name] = tensor
    for name in [name for name in named if name.endswith(".to_k.weight")]:
        keys, values = named[name], named.get(name.replace("to_k", "to_v"))
        if values is not None and (keys.shape, keys.dtype) == (values.shape, values.dtype) and len(keys.shape) == 2:
            del named[name], named[name.replace("to_k", "to_v")]  # released files hold them as one, keys first
            named[name.replace("to_k", "to_kv")] = concatenated([keys, values])
    if "proj.2.weight" in named and "norm.weight" in named:
        one_token = named["proj.2.weight"].shape[:1] == named["norm.weight"].shape
        if one_token:  # full-face; a FaceID projection has more tokens and keeps the name
            named |= {f"proj.3.{end}": named.pop(f"norm.{end}") for end in ("weight", "bias") if f"norm.{end}" in named}
    return named
