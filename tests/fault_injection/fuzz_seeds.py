"""Good files of weights for the fuzzer to damage, as small as a network of their kind can be."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ipadapter_jax.models.clip import CLIPVision
from ipadapter_jax.models.clip_config import CLIPVisionConfig
from ipadapter_jax.testing.random_weights import write_component, write_model
from ipadapter_jax.testing.sizes import MICRO
from ipadapter_jax.weights.component_export import convert_component
from ipadapter_jax.weights.components import IMAGE_ENCODER
from ipadapter_jax.weights.convert import convert
from ipadapter_jax.weights.formats.safetensors_writer import safetensors_chunks
from ipadapter_jax.weights.formats.torch_writer import pickled, torch_bytes
from ipadapter_jax.weights.ip_adapter_export import save_adapter_tensors
from ipadapter_jax.weights.lazy import Tensor, in_memory
from ipadapter_jax.weights.open_component import open_component

FLOAT16 = np.dtype("float16")


def adapters(folder: Path) -> dict[str, bytes]:
    """Adapters of all variants as safetensors with and without a digest, and as both containers of torch.save."""
    files: dict[str, bytes] = {}
    for number, (variant, shapes) in enumerate(_SHAPES.items()):
        draw, dtype = np.random.default_rng(number), ("float16", "float32", "bfloat16")[number]
        adapter = {f"ip_adapter.{key}": shape for key, shape in _ADAPTER.items()}
        shapes = {f"image_proj.{key}": shape for key, shape in shapes.items()} | adapter
        tensors = {key: in_memory(draw.standard_normal(shape).astype(np.dtype(dtype))) for key, shape in shapes.items()}
        tree: dict[str, dict] = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in tensors.items():
            tree[key.split(".")[0]][key.split(".", 1)[1]] = tensor
        save_adapter_tensors(folder / "proved.safetensors", tensors, None, {})
        files |= {
            f"{variant}.safetensors": b"".join(safetensors_chunks(tensors, {})),
            f"{variant}-digest.safetensors": (folder / "proved.safetensors").read_bytes(),
            f"{variant}-zip.bin": torch_bytes(tree),
            f"{variant}-sequence.bin": _sequence(tree),
        }
    return files


def safetensors(folder: Path) -> list[Path]:
    return _adapters(folder, ".safetensors")


def pickles(folder: Path) -> list[Path]:
    return _adapters(folder, ".bin")


def _adapters(folder: Path, ending: str) -> list[Path]:
    chosen = {name: content for name, content in adapters(folder).items() if name.endswith(ending)}
    for name, content in chosen.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in chosen]


def openclip(folder: Path) -> list[Path]:
    """A small vision encoder, with the settings that lie beside any file in this folder."""
    vision = {"image_size": 8, "layers": 1, "width": 8, "head_width": 4, "patch_size": 4, "mlp_ratio": 2}
    settings = {"model_cfg": {"embed_dim": 4, "vision_cfg": vision}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    block, draw = "transformer.resblocks.0", np.random.default_rng(9)
    shapes: dict[str, tuple[int, ...]] = {
        **{"class_embedding": (8,), "positional_embedding": (5, 8), "conv1.weight": (8, 3, 4, 4), "proj": (8, 4)},
        **{f"{block}.attn.in_proj_weight": (24, 8), f"{block}.attn.in_proj_bias": (24,)},
        **{f"{block}.attn.out_proj.weight": (8, 8), f"{block}.attn.out_proj.bias": (8,)},
        **{f"{block}.mlp.c_fc.weight": (16, 8), f"{block}.mlp.c_fc.bias": (16,)},
        **{f"{block}.mlp.c_proj.weight": (8, 16), f"{block}.mlp.c_proj.bias": (8,)},
        **{
            f"{norm}.{end}": (8,)
            for norm in ("ln_pre", "ln_post", f"{block}.ln_1", f"{block}.ln_2")
            for end in ("weight", "bias")
        },
    }
    tensors = {
        f"visual.{key}": in_memory(draw.standard_normal(shape).astype(np.float16)) for key, shape in shapes.items()
    }
    (folder / "encoder.openclip").write_bytes(b"".join(safetensors_chunks(tensors, {})))
    return [folder / "encoder.openclip"]


def msgpack(folder: Path) -> list[Path]:
    """A small vision encoder as Flax stored it, with config.json beside."""
    _encoder(folder / "torch")
    convert_component(open_component(IMAGE_ENCODER, folder / "torch"), folder, None, flax=True)
    return [folder / "flax_model.msgpack"]


def index(folder: Path) -> list[Path]:
    """The same in two shards of safetensors."""
    _encoder(folder)
    tensors = load_file(folder / "model.safetensors")
    shards = {name: f"model-{1 + number % 2:05d}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensor for name, tensor in tensors.items() if shards[name] == shard}, folder / shard)
    content = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": shards}
    (folder / "index.json").write_text(json.dumps(content))
    return [folder / "index.json"]


def _encoder(folder: Path) -> None:
    config = CLIPVisionConfig(8, 16, 4, 1, 2, image_size=8, patch_size=4)
    write_component(folder, CLIPVision(config))


def single_file(folder: Path) -> list[Path]:
    """A whole base model, with the folder of its settings beside."""
    write_model(folder / "config", MICRO)
    convert(folder / "config", folder / "model.safetensors")
    return [folder / "model.safetensors"]


_ADAPTER = {f"{site}.to_{part}_ip.weight": (2 + site, 4) for site in (1, 3) for part in "kv"}
_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "base": {"proj.weight": (16, 6), "proj.bias": (16,), "norm.weight": (4,), "norm.bias": (4,)},
    "full": {
        **{"proj.0.weight": (6, 6), "proj.0.bias": (6,), "proj.2.weight": (4, 6), "proj.2.bias": (4,)},
        **{"proj.3.weight": (4,), "proj.3.bias": (4,)},
    },
    "plus": {
        **{"latents": (1, 2, 8), "proj_in.weight": (8, 6), "proj_in.bias": (8,), "proj_out.weight": (4, 8)},
        **{"proj_out.bias": (4,), "norm_out.weight": (4,), "norm_out.bias": (4,)},
        **{f"layers.0.{place}.{end}": (8,) for place in ("0.norm1", "0.norm2", "1.0") for end in ("weight", "bias")},
        **{"layers.0.0.to_q.weight": (64, 8), "layers.0.0.to_kv.weight": (128, 8), "layers.0.0.to_out.weight": (8, 64)},
        **{"layers.0.1.1.weight": (32, 8), "layers.0.1.3.weight": (8, 32)},
    },
}


def _sequence(tree: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """The older container of torch.save: a sequence of pickles, then the storages."""
    tensors: list[Tensor] = []
    magic, protocol = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02M\xe9\x03."
    body = pickled(tree, tensors)
    keys = b"".join(b"X" + struct.pack("<I", len(str(i))) + str(i).encode() for i in range(len(tensors)))
    arrays = [tensor.read() for tensor in tensors]
    storages = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in arrays)
    return magic + protocol + b"\x80\x02}." + body + b"\x80\x02](" + keys + b"e." + storages
