"""Writes a Stable Diffusion 1.x folder of random weights in diffusers' layout, with image encoder and base adapter.

    python scripts/make_random_weights.py --size micro --out weights/micro   1 MB: 32 px, compiles in seconds
    python scripts/make_random_weights.py --size tiny --out weights/tiny     2 MB, seconds
    python scripts/make_random_weights.py --size full --out weights/full     SD 1.5 + ViT-H/14, 3.3 GB in float16

For tests of equality and for benchmarks, where trained weights say nothing more: every number is drawn by
numpy's PCG64 seeded with (150015, crc32 of the tensor's name), scaled to keep activations of order 1 and rounded to
float16, so that float16 and float32 files hold the same numbers. The pictures are abstract textures.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from safetensors.numpy import save_file

from ipadapter_jax import draws
from ipadapter_jax.models.adapter import IPAdapter
from ipadapter_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from ipadapter_jax.models.projections import ImageProjConfig, example_features, image_projection
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_sites
from ipadapter_jax.models.vae import VAE, VAEConfig
from ipadapter_jax.weights.components import IMAGE_ENCODER, TEXT_ENCODER, UNET, VAE_COMPONENT, template_of
from ipadapter_jax.weights.names import torch_key, torch_shape
from ipadapter_jax.weights.tree import leaves

SEED = 150015

FULL = (UNetConfig(), VAEConfig(), CLIPTextConfig(eos_token_id=2), CLIPVisionConfig())
TINY = (
    UNetConfig(block_out_channels=(32, 64, 64, 64), layers_per_block=1, cross_attention_dim=64, sample_size=32),
    VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
    CLIPTextConfig(514, 64, 128, 2, 4, eos_token_id=513),
    CLIPVisionConfig(64, 128, 64, 3, 4, patch_size=32),
)
MICRO = (
    UNetConfig(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        sample_size=16,
    ),
    VAEConfig(block_out_channels=(32, 32), layers_per_block=1),
    CLIPTextConfig(514, 32, 64, 1, 2, eos_token_id=513),
    CLIPVisionConfig(32, 64, 32, 2, 2, image_size=32, patch_size=16),
)
NANO = (  # one level: the smallest that has every part
    UNetConfig(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        sample_size=8,
    ),
    VAEConfig(block_out_channels=(32,), layers_per_block=1),
    CLIPTextConfig(514, 32, 64, 1, 2, eos_token_id=513),
    CLIPVisionConfig(32, 64, 32, 2, 2, image_size=32, patch_size=16),
)
SIZES = {"nano": NANO, "micro": MICRO, "tiny": TINY, "full": FULL}

SCHEDULER = {
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


def draw(component: str, name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """One tensor in PyTorch's layout, float32 with float16-exact values; `kind` is the leaf's name in our tree."""
    z = np.random.default_rng([SEED, zlib.crc32(f"{component}.{name}".encode())]).standard_normal(shape, np.float32)
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


def tensors(component: str, template, dtype: np.dtype, prefix: str = "", renames=None) -> dict[str, np.ndarray]:
    """Every leaf of a tree, under its PyTorch name."""
    found = {}
    for path, leaf in leaves(template).items():
        name = torch_key(path, renames or {})
        found[prefix + name] = draw(component, name, torch_shape(path, leaf.shape), path[-1]).astype(dtype)
    return found


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def write_tokenizer(folder: Path, vocab_size: int, merges: Sequence[tuple[str, str]] = (), length: int = 77) -> None:
    """CLIP's byte alphabet and these merges, filled up to the vocabulary's size with tokens that no text produces."""
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


def public_config(config, class_name: str) -> dict:
    """What the published config.json of this network says, in the order of the fields."""
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


def write_component(folder: Path, name: str, component, module, class_name: str, dtype: np.dtype) -> None:
    found = tensors(name, template_of(component, module), dtype, renames=component.renames)
    write_json(folder / "config.json", public_config(module.config, class_name))
    save_file(found, folder / f"{component.torch_stem}.safetensors", metadata={"format": "pt"})
    print(f"{component.title}: {sum(a.size for a in found.values()):,} parameters", flush=True)


def write_adapter(path: Path, unet: UNetConfig, vision: CLIPVisionConfig, dtype: np.dtype) -> None:
    """A base adapter (4 tokens) in the authors' format."""
    config = ImageProjConfig("base", vision.projection_dim, unet.cross_attention_dim, num_tokens=4)
    widths = tuple(site.width for site in cross_attention_sites(unet))
    tokens = jax.ShapeDtypeStruct((1, 4, unet.cross_attention_dim), np.float32)
    parts = {
        "image_proj.": (image_projection(config), example_features(config)),
        "ip_adapter.": (IPAdapter(widths), tokens),
    }
    found = {}
    for prefix, (module, example) in parts.items():
        found |= tensors("ip", jax.eval_shape(module.init, draws.key(0), example)["params"], dtype, prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, path, metadata={"format": "pt"})
    print(f"adapter: {sum(a.size for a in found.values()):,} parameters")


def write_model(out: Path, configs: tuple, kind: np.dtype) -> None:
    """A base model in `out` of the given UNet, VAE, text and vision configs, image encoder and adapter below it."""
    unet, vae, text, vision = configs
    models = out / "ip_adapter" / "models"
    write_component(out / "unet", "unet", UNET, UNet(unet), "UNet2DConditionModel", kind)
    write_component(out / "vae", "vae", VAE_COMPONENT, VAE(vae), "AutoencoderKL", kind)
    write_component(out / "text_encoder", "text_encoder", TEXT_ENCODER, CLIPText(text), "CLIPTextModel", kind)
    encoder = models / "image_encoder"
    write_component(encoder, "image_encoder", IMAGE_ENCODER, CLIPVision(vision), "CLIPVisionModelWithProjection", kind)
    write_adapter(models / "ip-adapter_sd15.safetensors", unet, vision, kind)
    write_tokenizer(out / "tokenizer", text.vocab_size)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_model_index(out, SCHEDULER)


def write_model_index(folder: Path, scheduler: dict) -> None:
    """What tells diffusers the classes of the parts."""
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


def main(
    out: Path,
    size: Annotated[
        Literal["nano", "micro", "tiny", "full"], tyro.conf.arg(help="small models, or Stable Diffusion 1.5")
    ] = "tiny",
    dtype: Annotated[
        Literal["float16", "float32"], tyro.conf.arg(help="of the files; the numbers are the same")
    ] = "float16",
) -> None:
    """Writes a base model to OUT, with an image encoder and a base adapter under OUT/ip_adapter/models."""
    write_model(out, SIZES[size], np.dtype(dtype))


if __name__ == "__main__":
    tyro.cli(main)
