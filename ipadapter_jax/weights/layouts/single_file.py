"""Checkpoints of one file in the layout of the first Stable Diffusion code ("LDM"): UNet, VAE and text encoder under
prefixes, with blocks numbered consecutively. The arrays are PyTorch's."""

import re
from collections.abc import Mapping

import numpy as np

from ipadapter_jax.errors import WeightFileError, argument
from ipadapter_jax.models import families
from ipadapter_jax.models.families import Family
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.models.vae import VAEConfig
from ipadapter_jax.weights.identify import identify
from ipadapter_jax.weights.ignored_tensors import drop_ignored, report_ignored
from ipadapter_jax.weights.key_mapping import Path, StateDictLayout, from_torch, to_torch, torch_key, torch_shape
from ipadapter_jax.weights.lazy import Tensor

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
# Tensors under these prefixes that are not weights of the networks.
_IGNORED = r"loss\..*|model_ema\..*|.*position_ids|logit_scale|text_projection.*"
_EMA = "model_ema.diffusion_model"


def prefixes(family: Family) -> dict[str, str]:
    """Of the tensors of every part of a base model: "unet", "vae" and the family's text encoders."""
    return {"unet": UNET_PREFIX, "vae": VAE_PREFIX} | {files.part: files.prefix for files in family.text_encoders}


def family_of_file(source: str, tensors: Mapping[str, Tensor]) -> Family:
    """Of a checkpoint. Raises WeightFileError saying which it is when it is not supported."""
    kind = identify(tensors)
    if not kind.usable:
        raise WeightFileError(f"{source}: {kind}; {kind.advice}")
    return families.SD1


def split(
    source: str, tensors: Mapping[str, Tensor], family: Family, *, extract_ema: bool = False
) -> dict[str, dict[str, Tensor]]:
    """The tensors of every part under their names without the prefix, {} where the file has none. `extract_ema` takes
    the moving average of the UNet, which long trainings save in addition.

    Raises WeightFileError for a checkpoint of a family that is not supported, and where there is no moving average.
    """
    family_of_file(source, tensors)
    parts = {
        part: {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        for part, prefix in prefixes(family).items()
    }
    if not parts["vae"]:  # some files of VAEs
        parts["vae"] = {name.removeprefix("vae."): tensors[name] for name in tensors if name.startswith("vae.")}
    inside = (*prefixes(family).values(), "vae.", *([_EMA] if extract_ema else []))
    report_ignored([name for name in tensors if not name.startswith(inside)], source)
    if extract_ema:
        averages = {name: f"{_EMA}{name.replace('.', '')}" for name in parts["unet"]}
        missing = [average for average in averages.values() if average not in tensors]
        if missing or not averages:
            raise WeightFileError(
                f"{source}: it holds no moving average of the UNet (it lacks {(missing or [_EMA])[0]}); "
                f"leave {argument('extract_ema')} out"
            )
        parts["unet"] = {name: tensors[average] for name, average in averages.items()}
    return {part: drop_ignored(found, _IGNORED, source) for part, found in parts.items()}


def is_single_file(tensors: Mapping[str, Tensor]) -> bool:
    of_text = {files.prefix for family in families.FAMILIES for files in family.text_encoders}
    return any(name.startswith((UNET_PREFIX, VAE_PREFIX, *of_text, _EMA)) for name in tensors)


def input_channels(unet: Mapping[str, Tensor]) -> int:
    """The input channels of a UNet below its prefix: 9 for inpainting; 0 if its first convolution is missing."""
    first = unet.get("input_blocks.0.0.weight")
    return first.shape[1] if first is not None and len(first.shape) == 4 else 0


# Names in a residual block: ours -> the single file's.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_layout(config: UNetConfig) -> StateDictLayout:
    """The layout of the UNet below its prefix."""
    return StateDictLayout(lambda path: _unet_key(torch_key(path), config), torch_shape, from_torch, to_torch)


def _unet_key(key: str, config: UNetConfig) -> str:
    place, last = key.rsplit(".", 1)
    if place in _OUTER:
        return f"{_OUTER[place]}.{last}"
    side, *numbers, rest = re.fullmatch(
        r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    ).groups()  # pyright: ignore[reportOptionalMemberAccess]  # all other keys of the network look so
    block, what, index = int(numbers[0] or 0), numbers[1], int(numbers[2])
    if what == "resnets":
        inner, _, leaf = rest.rpartition(".")
        rest = f"{_RESNET[inner]}.{leaf}"
    per_block = config.layers_per_block + 1
    if side == "mid":
        return f"middle_block.{2 * index if what == 'resnets' else 1}.{rest}"
    if what == "downsamplers":
        return f"input_blocks.{per_block * (block + 1)}.0.{rest.replace('conv.', 'op.')}"
    if what == "upsamplers":
        attention = config.up_block_types[block] == "CrossAttnUpBlock2D"
        return f"output_blocks.{per_block * (block + 1) - 1}.{2 if attention else 1}.{rest}"
    number = per_block * block + index + (side == "down")
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{0 if what == 'resnets' else 1}.{rest}"


_VAE_ATTENTION = {"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}


def vae_layout(config: VAEConfig) -> StateDictLayout:
    """The layout of the VAE below its prefix. Its attention's matrices are 1x1 convolutions there."""

    def shape(path: Path, ours: tuple[int, ...]) -> tuple[int, ...]:
        return torch_shape(path, ours) + ((1, 1) if _is_matrix(path) else ())

    def read(path: Path, array: np.ndarray) -> np.ndarray:
        return from_torch(path, array[:, :, 0, 0] if _is_matrix(path) else array)

    def write(path: Path, array: np.ndarray) -> np.ndarray:
        return to_torch(path, array)[:, :, None, None] if _is_matrix(path) else to_torch(path, array)

    levels = len(config.block_out_channels)
    return StateDictLayout(lambda path: _vae_key(path, levels), shape, read, write)


def _is_matrix(path: Path) -> bool:
    return path[-2] in _VAE_ATTENTION and path[-1] == "kernel"


def _vae_key(path: Path, levels: int) -> str:
    path = tuple(_VAE_ATTENTION.get(part, part) if "attentions_0" in path else part for part in path)
    key = torch_key(path)
    key = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", key)
    key = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", key)
    key = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda found: f"mid.block_{int(found[1]) + 1}.", key)
    key = key.replace("mid_block.attentions.0.", "mid.attn_1.").replace(".resnets.", ".block.")
    key = key.replace("downsamplers.0.conv", "downsample.conv").replace("upsamplers.0.conv", "upsample.conv")
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def layout_of(config: object) -> StateDictLayout | None:
    """The layout in a single file of the network with this configuration; None where it is PyTorch's usual one."""
    if isinstance(config, UNetConfig):
        return unet_layout(config)
    return vae_layout(config) if isinstance(config, VAEConfig) else None
