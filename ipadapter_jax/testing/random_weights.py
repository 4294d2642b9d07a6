"""Writes a Stable Diffusion 1.x folder of random weights in diffusers' layout, with image encoder and base adapter.

    python -m ipadapter_jax.testing.random_weights --size micro --out weights/micro   1 MB: 32 px, compiles in seconds
    python -m ipadapter_jax.testing.random_weights --size tiny --out weights/tiny     2 MB, seconds
    python -m ipadapter_jax.testing.random_weights --size full --out weights/full     SD 1.5 + ViT-H/14, 3.3 GB

For parity tests and for benchmarks, where trained weights would show nothing more: every number is drawn by numpy's
PCG64 seeded with (150015, crc32 of the tensor's name), scaled to keep activations of order 1 and rounded to float16,
so that float16 and float32 files hold the same numbers. The generated images are abstract textures.
"""

import argparse
import dataclasses
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

from ipadapter_jax.models.clip import CLIPText, CLIPVision
from ipadapter_jax.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.models.image_projections import example_features, image_projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.models.vae import VAE, VAEConfig
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.testing.sizes import SIZES, ModelConfigs
from ipadapter_jax.weights.components import (
    IMAGE_ENCODER,
    TEXT_ENCODER,
    UNET,
    VAE_COMPONENT,
    Component,
    abstract_params,
)
from ipadapter_jax.weights.key_mapping import torch_key, torch_shape
from ipadapter_jax.weights.load_tree import Tree, leaves

SEED = 150015
# Below a model's folder, as in the authors' repository.
ADAPTER = Path("ip_adapter", "models", "ip-adapter_sd15.safetensors")

SCHEDULER: Mapping[str, object] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def draw(part: str, name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """One tensor of a part ("unet") in PyTorch's layout, float32 with values that float16 holds exactly. `kind` is the
    name of the leaf in our tree."""
    z = np.random.default_rng([SEED, zlib.crc32(f"{part}.{name}".encode())]).standard_normal(shape, np.float32)
    if kind == "bias":
        z *= 0.05
    elif kind == "scale":
        z = 1 + 0.1 * z
    elif kind == "embedding" or z.ndim == 1:
        z *= 0.4
    else:  # queries and keys larger, so that attention has preferences; residual branches smaller
        sharp = re.search(r"(to_q|to_k|q_proj|k_proj|to_k_ip)\.weight$", name)
        branch = re.search(r"conv2|net\.2|fc2\.weight$|to_out\.0|out_proj", name)
        z *= (1.4 if sharp else 0.5 if branch else 1.0) / np.sqrt(np.prod(shape[1:]))
    z = z.astype(np.float16)
    return np.where(np.abs(z) < 6.2e-5, np.float16(0), z).astype(np.float32)  # no subnormals: slow on some processors


def tensors(
    part: str, template: Tree, dtype: np.dtype, prefix: str = "", renames: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Draws every leaf of a tree of shapes; the keys are `prefix` and the tensor's name in PyTorch."""
    found = {}
    for path, leaf in leaves(template).items():
        name = torch_key(path, renames or {})
        found[prefix + name] = draw(part, name, torch_shape(path, leaf.shape), path[-1]).astype(dtype)
    return found


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a file of JSON, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def write_tokenizer(folder: Path, vocab_size: int, merges: Sequence[tuple[str, str]] = (), length: int = 77) -> None:
    """Writes a CLIP tokenizer of CLIP's byte alphabet and these merges, filled up to `vocab_size` with tokens that no
    text produces. `length` is the number of tokens of a text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    words = symbols + [f"{symbol}</w>" for symbol in symbols]
    words += ["".join(pair) for pair in merges]
    words += [f"<filler-{i}>" for i in range(vocab_size - 2 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    special = {**ends, "unk_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json", {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    )


def public_config(
    config: UNetConfig | VAEConfig | CLIPTextConfig | CLIPVisionConfig, class_name: str
) -> dict[str, object]:
    """The config.json of a network as it is published, in the order of the fields."""
    extra = {}
    if isinstance(config, VAEConfig):
        levels = len(config.block_out_channels)
        extra = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    if isinstance(config, UNetConfig | VAEConfig):
        version = "0.35.0"  # below 0.9 diffusers takes a sample_size under 64 for a mistake
        return {"_class_name": class_name, "_diffusers_version": version, **dataclasses.asdict(config), **extra}
    model_type = "clip_text_model" if isinstance(config, CLIPTextConfig) else "clip_vision_model"
    extra = {"bos_token_id": 0, "pad_token_id": 1} if isinstance(config, CLIPTextConfig) else {}
    return {"architectures": [class_name], "model_type": model_type, **dataclasses.asdict(config), **extra}


class _Part(NamedTuple):
    """What the files of a network are called."""

    name: str  # of which the random numbers depend
    component: Component
    class_name: str


_PARTS: Mapping[type, _Part] = {
    UNet: _Part("unet", UNET, "UNet2DConditionModel"),
    VAE: _Part("vae", VAE_COMPONENT, "AutoencoderKL"),
    CLIPText: _Part("text_encoder", TEXT_ENCODER, "CLIPTextModel"),
    CLIPVision: _Part("image_encoder", IMAGE_ENCODER, "CLIPVisionModelWithProjection"),
}


def write_component(folder: Path, module: UNet | VAE | CLIPText | CLIPVision, dtype: DTypeLike = "float16") -> int:
    """Writes config.json and weights of one network to `folder`. Returns the number of its parameters."""
    name, component, class_name = _PARTS[type(module)]
    found = tensors(name, abstract_params(component, module), np.dtype(dtype), renames=component.files.renames)
    write_json(folder / "config.json", public_config(module.config, class_name))
    save_file(found, folder / f"{component.files.torch_stem}.safetensors", metadata={"format": "pt"})
    return sum(array.size for array in found.values())


def write_adapter(path: Path, configs: ModelConfigs, dtype: DTypeLike = "float16") -> int:
    """Writes a base adapter (4 tokens) in the authors' format. Returns the number of its parameters."""
    unet = configs.unet
    config = ImageProjConfig("base", configs.image_encoder.projection_dim, unet.cross_attention_dim, num_tokens=4)
    widths = tuple(site.width for site in cross_attention_layers(unet))
    tokens = jax.ShapeDtypeStruct((1, 4, unet.cross_attention_dim), np.float32)
    parts = {
        "image_proj.": (image_projection(config), example_features(config)),
        "ip_adapter.": (IPAdapter(widths), tokens),
    }
    found = {}
    for prefix, (module, example) in parts.items():
        found |= tensors(
            "ip", jax.eval_shape(module.init, random_keys.key(0), example)["params"], np.dtype(dtype), prefix
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, path, metadata={"format": "pt"})
    return sum(array.size for array in found.values())


def write_model(out: Path, configs: ModelConfigs, dtype: DTypeLike = "float16") -> dict[str, int]:
    """Writes a base model to `out`, an image encoder and a base adapter to `out`/ip_adapter/models. Returns the number
    of parameters of each by its name."""
    modules = {
        out / "unet": UNet(configs.unet),
        out / "vae": VAE(configs.vae),
        out / "text_encoder": CLIPText(configs.text_encoder),
        out / ADAPTER.with_name("image_encoder"): CLIPVision(configs.image_encoder),
    }
    counts = {
        _PARTS[type(module)].component.files.title: write_component(folder, module, dtype)
        for folder, module in modules.items()
    }
    counts["adapter"] = write_adapter(out / ADAPTER, configs, dtype)
    write_tokenizer(out / "tokenizer", configs.text_encoder.vocab_size)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_model_index(out, SCHEDULER)
    return counts


def write_model_index(folder: Path, scheduler: Mapping[str, object]) -> None:
    """Writes the file that tells diffusers the classes of the parts."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": scheduler["_diffusers_version"],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)


def main() -> None:
    """The command: writes a model and prints how many parameters each part has."""
    parser = argparse.ArgumentParser(prog="python -m ipadapter_jax.testing.random_weights", description=_DESCRIPTION)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="small models, or Stable Diffusion 1.5 (tiny)")
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of the files; the numbers are the same (float16)",
    )
    settings = parser.parse_args()
    for title, parameters in write_model(settings.out, SIZES[settings.size], settings.dtype).items():
        print(f"{title}: {parameters:,} parameters")


_DESCRIPTION = "Writes a base model to OUT, with an image encoder and a base adapter under OUT/ip_adapter/models."

if __name__ == "__main__":
    main()
