"""The right file in the wrong place: one line says what was found, what is needed and the option that mends it, in less
than five seconds, before any weights are read and anything is compiled."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, TORCH_MODEL, forbid_sampling, ldm_file, within
from integration.test_cli import ADAPTER, arguments
from safetensors.numpy import load_file, save_file
from training import tiny

from ipadapter_jax.cli import main
from ipadapter_jax.errors import InputError
from ipadapter_jax.train.trainer import train
from ipadapter_jax.weights.load_tree import CheckedTensors

UNET = TORCH_MODEL / "unet" / "diffusion_pytorch_model.safetensors"
SDXL_LDM = ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.x"]


def named(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)
    return path


def widened(path: Path, width: int) -> Path:
    """The tiny adapter as one for another width of tokens."""
    tensors = load_file(ADAPTER)
    for name, array in tensors.items():
        if "_ip." in name:
            tensors[name] = np.zeros((array.shape[0], width), np.float16)
    tensors["image_proj.proj.weight"] = np.zeros((4 * width, 40), np.float16)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    (root / "page.safetensors").write_text("<!DOCTYPE html><html>Sign in</html>")
    (root / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (root / "cut.safetensors").write_bytes(ADAPTER.read_bytes()[:-7])
    (root / "cut.bin").write_bytes(ADAPTER.with_suffix(".bin").read_bytes()[:-700])
    found = {path.stem if path.stem != "cut" else path.name: path for path in root.iterdir()}
    found["sdxl adapter"] = widened(root / "sdxl.safetensors", 2048)
    found["sd2 adapter"] = widened(root / "sd2.safetensors", 1024)
    found["lora"] = named(root / "lora.safetensors", {"lora_unet_mid_block.lora_down.weight": (4, 4)})
    found["controlnet"] = named(root / "cn.safetensors", {"controlnet_cond_embedding.conv_in.weight": (4, 4)})
    found["t2i"] = named(root / "t2i.safetensors", {"adapter.body.0.resnets.0.block1.weight": (4, 4)})
    found["inversion"] = named(root / "ti.safetensors", {"emb_params": (2, 32)})
    found["motion"] = named(root / "mm.safetensors", {"down_blocks.0.motion_modules.0.x": (4,)})
    found["sdxl base"] = named(root / "xl.safetensors", dict.fromkeys(SDXL_LDM, (320, 4, 3, 3)))
    found["faceid"] = named(
        root / "face.safetensors",
        {
            **{"image_proj.proj.0.weight": (8, 4), "image_proj.proj.2.weight": (128, 8)},
            **{"image_proj.norm.weight": (32,), "ip_adapter.1.to_k_ip.weight": (32, 32)},
        },
    )
    found["one file"] = ldm_file(root / "ldm.safetensors")
    found["vit-l"] = root / "vit-l"
    shutil.copytree(IMAGE_ENCODER, found["vit-l"])
    config = json.loads((IMAGE_ENCODER / "config.json").read_text()) | {"projection_dim": 24}
    (found["vit-l"] / "config.json").write_text(json.dumps(config))
    tensors = load_file(IMAGE_ENCODER / "model.safetensors")
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"][:24].copy()
    save_file(tensors, found["vit-l"] / "model.safetensors")
    found["sd2 text"] = root / "sd2"
    shutil.copytree(TORCH_MODEL, found["sd2 text"])
    place = found["sd2 text"] / "text_encoder" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"hidden_size": 64}))
    return found


# What is given where; what was found, what is needed or wrong, and the remedy.
CASES = {
    "SDXL adapter": ({"adapter": "sdxl adapter"}, ["2048 (SDXL)", "this base has 32", "--adapter"]),
    "SD 2 adapter": ({"adapter": "sd2 adapter"}, ["1024 (SD 2.x)", "this base has 32", "--adapter"]),
    "FaceID adapter": ({"adapter": "faceid"}, ["a FaceID adapter", "InsightFace", "base, plus or full-face"]),
    "LoRA as adapter": ({"adapter": "lora"}, ["not an IP-Adapter", "a LoRA", "merge it"]),
    "ControlNet as adapter": ({"adapter": "controlnet"}, ["not an IP-Adapter", "a ControlNet", "no place"]),
    "T2I-Adapter as adapter": ({"adapter": "t2i"}, ["not an IP-Adapter", "a T2I-Adapter", "no place"]),
    "inversion as adapter": ({"adapter": "inversion"}, ["not an IP-Adapter", "a textual inversion"]),
    "motion module as adapter": ({"adapter": "motion"}, ["not an IP-Adapter", "AnimateDiff"]),
    "UNet as adapter": ({"adapter": str(UNET)}, ["not an IP-Adapter", "a UNet", "--model"]),
    "checkpoint as adapter": ({"adapter": "one file"}, ["not an IP-Adapter", "a whole Stable Diffusion", "--model"]),
    "encoder as adapter": (
        {"adapter": str(IMAGE_ENCODER / "model.safetensors")},
        ["not an IP-Adapter", "a CLIP image encoder", "--image-encoder"],
    ),
    "truncated adapter": ({"adapter": "cut.safetensors"}, ["not a whole safetensors file", "download it again"]),
    "truncated pickle": ({"adapter": "cut.bin"}, ["cut short or damaged", "download the file again"]),
    "web page": ({"adapter": "page"}, ["a web page", "/resolve/"]),
    "git-lfs pointer": ({"adapter": "pointer"}, ["a git-lfs pointer", "git lfs pull"]),
    "adapter as base": ({"model": str(ADAPTER)}, ["an IP-Adapter", "not a base model", "--adapter"]),
    "SDXL as base": ({"model": "sdxl base"}, ["SDXL", "as a single file", "folder"]),
    "UNet as base": ({"model": str(UNET)}, ["a UNet", "not a base model", "the folder that holds it"]),
    "pointer as base": ({"model": "pointer"}, ["a git-lfs pointer", "git lfs pull"]),
    "text encoder of SD 2": ({"model": "sd2 text"}, ["gives width 64", "reads 32", "--text-encoder"]),
    "another image encoder": (
        {"image_encoder": "vit-l"},
        ["needs image embeddings of width 40", "gives 24", "--image-encoder"],
    ),
    "text encoder as image encoder": (
        {"image_encoder": str(TORCH_MODEL / "text_encoder" / "model.safetensors")},
        ["a text encoder", "not a CLIP image encoder", "--text-encoder"],
    ),
    "adapter as image encoder": ({"image_encoder": str(ADAPTER)}, ["an IP-Adapter", "--adapter"]),
    "UNet as VAE": ({"vae": str(UNET)}, ["lacks", "It looks like a UNet"]),
}


def forbid_reading(monkeypatch) -> None:
    def reached(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(CheckedTensors, "load", reached)


@pytest.mark.parametrize("case", CASES)
def test_refused_at_once(case, files, tmp_path, capsys, monkeypatch):
    options, words = CASES[case]
    forbid_sampling(monkeypatch)
    forbid_reading(monkeypatch)
    given = {name: str(files.get(value, value)) for name, value in options.items()}
    with within(5):
        assert main(arguments(tmp_path / "out.png", **{"model": TORCH_MODEL, "adapter": ADAPTER} | given)) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("ipadapter-jax: ") and complaint.count("\n") == 1 and len(complaint) < 700
    for word in words:
        assert word in complaint, complaint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__init_from": str(ADAPTERS / "ip-adapter-plus_tiny.safetensors")}, ["variant=plus (this run: base)"]),
        ({"model__init_from": str(UNET)}, ["not an IP-Adapter", "a UNet"]),
        ({"model__base": str(ADAPTER)}, ["an IP-Adapter", "not a base model"]),
        ({"model__image_encoder": str(UNET)}, ["a UNet", "not a CLIP image encoder"]),
    ],
    ids=["plus where base is expected", "UNet", "base", "encoder"],
)
def test_refused_by_training(changes, words, tmp_path):
    from training import photographs

    run = tiny(data__path=str(photographs(tmp_path / "photos")), out=str(tmp_path / "run"), **changes)
    with pytest.raises(InputError) as caught:
        train(run)
    for word in words:
        assert word in str(caught.value)
