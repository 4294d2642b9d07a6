"""Adapters under other names than the released ones: every spelling gives the same trees bit for bit."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers import ADAPTERS, TORCH_MODEL
from safetensors.numpy import load_file, save_file
from weight_files import assert_same_tree, refused, write_bin

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.ip_adapter_file import IPAdapterFile, load_ip_adapter, open_ip_adapter

FILES = {
    variant: ADAPTERS / f"ip-adapter{mark}_tiny.safetensors"
    for variant, mark in (("base", ""), ("plus", "-plus"), ("full", "-full-face"))
}
every_variant = pytest.mark.parametrize("variant", FILES)

# The number of a cross-attention in a released file, and its place in the UNet.
PLACES = {
    **{1: "down_blocks.0.attentions.0", 3: "down_blocks.0.attentions.1", 5: "down_blocks.1.attentions.0"},
    **{7: "down_blocks.1.attentions.1", 9: "down_blocks.2.attentions.0", 11: "down_blocks.2.attentions.1"},
    **{13: "up_blocks.1.attentions.0", 15: "up_blocks.1.attentions.1", 17: "up_blocks.1.attentions.2"},
    **{19: "up_blocks.2.attentions.0", 21: "up_blocks.2.attentions.1", 23: "up_blocks.2.attentions.2"},
    **{25: "up_blocks.3.attentions.0", 27: "up_blocks.3.attentions.1", 29: "up_blocks.3.attentions.2"},
    31: "mid_block.attentions.0",
}


def released(variant: str) -> dict[str, np.ndarray]:
    return load_file(FILES[variant])


def trees(file: IPAdapterFile) -> dict:
    return load_ip_adapter(file, file.widths, np.dtype("float32"), put=lambda array: array)


def accelerate(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """pytorch_model.bin of a training: all modules, the adapter's layers twice."""
    named = {
        name.replace("image_proj.", "image_proj_model.").replace("ip_adapter.", "adapter_modules."): array
        for name, array in tensors.items()
    }
    return named | in_unet(tensors) | {"unet.conv_in.weight": np.ones((4, 4, 3, 3), np.float16)}


def in_unet(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name, array in tensors.items():
        part, number, *rest = name.split(".")
        if part == "ip_adapter":
            found[f"unet.{PLACES[int(number)]}.transformer_blocks.0.attn2.processor.{'.'.join(rest)}"] = array
    return found


def deduplicated(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """model.safetensors of the same: of what is shared only one name is left."""
    return {name: array for name, array in accelerate(tensors).items() if not name.startswith("adapter_modules.")}


def deepspeed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"module.{name}": array for name, array in accelerate(tensors).items()}


@every_variant
@pytest.mark.parametrize("spell", [accelerate, deduplicated, deepspeed])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_every_spelling(tmp_path, variant, spell, suffix):
    path = tmp_path / f"a{suffix}"
    content = dict(reversed(list(spell(released(variant)).items())))
    save_file(content, path) if suffix == ".safetensors" else write_bin(path, content)
    found = open_ip_adapter(path)
    assert_same_tree(trees(found), trees(open_ip_adapter(FILES[variant])))
    assert found.tensors.keys() == released(variant).keys()


@every_variant
def test_dicts_of_a_raw_checkpoint(tmp_path, variant):
    content: dict = {"image_proj_model": {}, "adapter_modules": {}, "latents": {"x": np.zeros(3, np.float32)}}
    for name, array in released(variant).items():
        part, _, rest = name.partition(".")
        content["image_proj_model" if part == "image_proj" else "adapter_modules"][rest] = array
    assert_same_tree(
        trees(open_ip_adapter(write_bin(tmp_path / "a.bin", content))), trees(open_ip_adapter(FILES[variant]))
    )


@every_variant
def test_a_unet_of_diffusers_with_the_adapter_in_it(tmp_path, variant):
    """The names are diffusers' own: it loads the adapter, and its UNet is saved."""
    pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file as save_torch

    unet = UNet2DConditionModel.from_pretrained(TORCH_MODEL, subfolder="unet")
    content: dict[str, dict] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in _torch(FILES[variant]).items():
        part, _, rest = name.partition(".")
        content[part][rest] = tensor.float()
    unet._load_ip_adapter_weights([content])
    for prefix in ("", "unet."):
        state = {f"{prefix}{name}": tensor.contiguous() for name, tensor in unet.state_dict().items()}
        save_torch(state, tmp_path / "unet.safetensors")
        assert_same_tree(trees(open_ip_adapter(tmp_path / "unet.safetensors")), trees(open_ip_adapter(FILES[variant])))
    unet._load_ip_adapter_weights([content, content])
    save_torch({name: t.contiguous() for name, t in unet.state_dict().items()}, tmp_path / "unet.safetensors")
    refused(lambda: open_ip_adapter(tmp_path / "unet.safetensors"), "2 adapters in it", error=WeightFileError)


def _torch(path: Path) -> dict:
    from safetensors.torch import load_file as load_torch

    return load_torch(path)


def test_the_released_name_wins(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "a.safetensors"
    save_file(released("base") | {"image_proj_model.norm.weight": np.zeros(32, np.float16)}, path)
    assert_same_tree(trees(open_ip_adapter(path)), trees(open_ip_adapter(FILES["base"])))
    assert "ignored image_proj_model.norm.weight" in caplog.text


@pytest.mark.parametrize(
    "missing",
    [
        "up_blocks.3.attentions.2",
        "down_blocks.0.attentions.1",
        "up_blocks.1.attentions.1",
        "up_blocks.1",
        "mid_block",
        "down_blocks.0",
        "up_blocks.2.attentions.0",
    ],
)
def test_a_part_of_a_checkpoint_is_not_renumbered(tmp_path, missing):
    content = {name: array for name, array in deduplicated(released("base")).items() if f"unet.{missing}" not in name}
    save_file(content, tmp_path / "a.safetensors")
    refused(lambda: open_ip_adapter(tmp_path / "a.safetensors"), "some layers", "missing", error=WeightFileError)


def test_layers_that_are_there_twice(tmp_path):
    content = deduplicated(released("base"))
    content |= {name.removeprefix("unet."): array for name, array in content.items() if ".attn2." in name}
    save_file(content, tmp_path / "a.safetensors")
    refused(lambda: open_ip_adapter(tmp_path / "a.safetensors"), "in it twice", error=WeightFileError)


def test_face_id_in_a_unet_of_diffusers_is_not_taken_for_full(tmp_path):
    shapes = {"ff.net.0.proj.weight": (16, 8), "ff.net.2.weight": (128, 16), "norm.weight": (32,)}
    projection = {f"encoder_hid_proj.image_projection_layers.0.{key}": s for key, s in shapes.items()}
    content = {name: np.zeros(shape, np.float16) for name, shape in projection.items()}
    save_file(content | in_unet(released("base")), tmp_path / "a.safetensors")
    refused(lambda: open_ip_adapter(tmp_path / "a.safetensors"), "a FaceID adapter", error=WeightFileError)
