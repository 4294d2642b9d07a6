"""CLIP vision encoders in OpenCLIP's layout: the same tree as from transformers' files; sizes told from shapes."""

import collections
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from helpers import IMAGE_ENCODER, TORCH_MODEL
from safetensors.numpy import load_file, save_file
from weight_files import assert_same_tree, refused, write_bin

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.models.clip_config import CLIPVisionConfig
from ipadapter_jax.weights.components import IMAGE_ENCODER as COMPONENT
from ipadapter_jax.weights.image_encoder import open_image_encoder
from ipadapter_jax.weights.layouts.openclip import to_transformers, vision_settings
from ipadapter_jax.weights.lazy import LazyTransform
from ipadapter_jax.weights.open_component import build_component_config

SETTINGS = {
    "model_cfg": {
        "embed_dim": 40,
        "vision_cfg": {"image_size": 224, "layers": 3, "width": 48, "head_width": 12, "patch_size": 32, "mlp_ratio": 2},
        "text_cfg": {"width": 8},
    }
}


def openclip(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers' names -> open_clip's, and some of the text half."""
    vision = {name.removeprefix("vision_model."): array for name, array in tensors.items()}
    found = {
        "visual.class_embedding": vision["embeddings.class_embedding"],
        "visual.positional_embedding": vision["embeddings.position_embedding.weight"],
        "visual.conv1.weight": vision["embeddings.patch_embedding.weight"],
        "visual.proj": np.ascontiguousarray(vision["visual_projection.weight"].T),
        "text_projection": np.zeros((8, 40), np.float16),
        "transformer.resblocks.0.ln_1.weight": np.zeros(8, np.float16),
        "logit_scale": np.zeros(1, np.float16),
    }
    for ours, theirs in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        found |= {f"visual.{theirs}.{end}": vision[f"{ours}.{end}"] for end in ("weight", "bias")}
    for i in range(3):
        layer, block = f"encoder.layers.{i}", f"visual.transformer.resblocks.{i}"
        for end in ("weight", "bias"):
            fused = [vision[f"{layer}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            found[f"{block}.attn.in_proj_{end}"] = np.concatenate(fused)
            found[f"{block}.attn.out_proj.{end}"] = vision[f"{layer}.self_attn.out_proj.{end}"]
            for ours, theirs in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc")):
                found[f"{block}.{theirs}.{end}"] = vision[f"{layer}.{ours}.{end}"]
            found[f"{block}.mlp.c_proj.{end}"] = vision[f"{layer}.mlp.fc2.{end}"]
    return found


def recorded() -> dict[str, np.ndarray]:
    tensors = load_file(IMAGE_ENCODER / "model.safetensors")
    return {name: array for name, array in tensors.items() if "position_ids" not in name}


def loaded(place: Path):
    return open_image_encoder(place).load(np.dtype("float32")).params


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "any.safetensors"])
@pytest.mark.parametrize("settings", ["open_clip_config.json", "config.json"])
def test_the_same_tree(tmp_path, name, settings):
    own = json.dumps(SETTINGS) if settings.startswith("open") else (IMAGE_ENCODER / "config.json").read_text()
    (tmp_path / settings).write_text(own)
    write = write_bin if name.endswith(".bin") else lambda path, content: save_file(content, path)
    write(tmp_path / name, openclip(recorded()))
    assert_same_tree(loaded(tmp_path / name), loaded(IMAGE_ENCODER))
    if not name.startswith("any"):
        assert_same_tree(loaded(tmp_path), loaded(IMAGE_ENCODER))
    recorded_config = open_image_encoder(IMAGE_ENCODER).config
    assert open_image_encoder(tmp_path / name).config == recorded_config


def test_one_file_of_transformers(tmp_path):
    save_file(recorded(), tmp_path / "clip.safetensors")
    refused(lambda: loaded(tmp_path / "clip.safetensors"), "width 48", "put its config.json next to it")
    (tmp_path / "config.json").write_text((IMAGE_ENCODER / "config.json").read_text())
    assert_same_tree(loaded(tmp_path / "clip.safetensors"), loaded(IMAGE_ENCODER))


def test_sizes_of_the_published_encoder_from_its_shapes(data, tmp_path):
    shapes: dict = collections.defaultdict(dict)
    for line in lzma.decompress((data / "published_keys.txt.xz").read_bytes()).decode().splitlines():
        kind, part, key, shape = line.split()
        shapes[kind, part][key] = tuple(int(n) for n in shape.split("x"))
    [published] = [s for (kind, _), s in shapes.items() if kind == "torch" and "visual_projection.weight" in s]
    tensors = {
        name: LazyTransform(shape, np.dtype("float16"), lambda: np.zeros(0)) for name, shape in published.items()
    }
    settings = vision_settings(tmp_path / "clip.safetensors", to_transformers(tensors))
    assert build_component_config(COMPONENT, settings, tmp_path).config == CLIPVisionConfig()


def test_what_is_no_image_encoder(tmp_path):
    unet = TORCH_MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    refused(lambda: loaded(unet), f"image encoder {unet}: this is a UNet", "as the base model", error=WeightFileError)
    (tmp_path / "open_clip_config.json").write_text("{}")
    save_file(openclip(recorded()), tmp_path / "a.safetensors")
    refused(lambda: loaded(tmp_path / "a.safetensors"), "open_clip_config.json cannot be read")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(SETTINGS))
    content = openclip(recorded()) | {"visual.more.weight": np.zeros(1, np.float16)}
    save_file(content, tmp_path / "a.safetensors")
    refused(lambda: loaded(tmp_path / "a.safetensors"), "without a place", "visual.more.weight", error=WeightFileError)
