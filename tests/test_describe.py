"""What `ipadapter-jax inspect` says of files and folders."""

import json

import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, TORCH_MODEL, ldm_file
from safetensors.numpy import load_file, save_file
from weight_files import refused

from ipadapter_jax.cli import main
from ipadapter_jax.convert import convert
from ipadapter_jax.describe import describe
from ipadapter_jax.files import sha256


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("ip-adapter_tiny.safetensors", {"variant": "base", "tokens": 4, "features": "image_embeds 40"}),
        ("ip-adapter-plus_tiny.bin", {"variant": "plus", "tokens": 16, "features": "penultimate_states 48"}),
        ("ip-adapter-full-face_tiny.bin", {"variant": "full", "container": "PyTorch pickle"}),
    ],
)
def test_an_adapter(name, facts):
    path = ADAPTERS / name
    found = describe(path)
    assert found | facts == found
    assert (found["kind"], found["base"]) == ("an IP-Adapter", "a model of text width 32")
    assert found["sha256"] == {name: sha256(path)} and found["bytes"] == path.stat().st_size
    if name.endswith(".safetensors"):
        arrays = load_file(path).values()
        assert (found["parameters"], found["tensors"]) == (sum(a.size for a in arrays), len(arrays))
        assert found["dtype"] == "float16"


def published(path, width: int, projection: dict[str, tuple[int, ...]]):
    shapes = {f"image_proj.{name}": shape for name, shape in projection.items()}
    shapes |= {f"ip_adapter.1.to_{part}_ip.weight": (8, width) for part in "kv"}
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize(
    ("width", "projection", "facts"),
    [
        (768, {"proj.weight": (3072, 1024)}, {"base": "SD 1.x", "image_encoder": "ViT-H/14", "tokens": 4}),
        (768, {"proj.weight": (3072, 1280)}, {"base": "SD 1.x", "image_encoder": "ViT-bigG/14"}),
        (2048, {"proj.weight": (8192, 1280)}, {"base": "SDXL", "image_encoder": "ViT-bigG/14", "tokens": 4}),
        (
            2048,
            {"proj.0.weight": (4, 8), "proj.2.weight": (8192, 4), "norm.weight": (2048,)},
            {"base": "SDXL", "variant": "FaceID (not supported)", "image_encoder": "InsightFace"},
        ),
        (
            768,
            {"proj.0.weight": (4, 8), "proj.2.weight": (12288, 4), "norm.weight": (768,)},
            {"variant": "FaceID portrait (not supported)"},
        ),
        (
            768,
            {"perceiver_resampler.proj_in.weight": (8, 8), "norm.weight": (768,)},
            {"variant": "FaceID Plus (not supported)", "image_encoder": "InsightFace and ViT-H/14"},
        ),
        (768, {"other.weight": (1,)}, {"variant": "not a whole one, or unknown"}),
    ],
)
def test_published_variants_by_their_shapes(tmp_path, width, projection, facts):
    found = describe(published(tmp_path / "a.safetensors", width, projection))
    assert found | facts == found
    sampled = width == 768 and "proj.weight" in projection
    assert ("--adapter" in found["use"]) == (sampled or "other.weight" in projection)


def test_our_file_carries_its_digest(tmp_path):
    convert(ADAPTERS / "ip-adapter_tiny.safetensors", tmp_path / "a.safetensors")
    assert describe(tmp_path / "a.safetensors")["intact"] is True
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(content)
    assert describe(tmp_path / "a.safetensors")["intact"] is False


def test_folders_and_single_files(tmp_path):
    found = describe(TORCH_MODEL)
    assert [*found["parts"]] == ["unet", "vae", "text_encoder"]
    assert found["parts"]["unet"]["kind"] == "a UNet" and found["parts"]["unet"]["tensors"] == 686
    assert describe(IMAGE_ENCODER)["kind"] == "a CLIP image encoder"
    assert describe(ldm_file(tmp_path / "m.ckpt"))["kind"] == "a whole Stable Diffusion checkpoint"
    (tmp_path / "empty").mkdir()
    refused(lambda: describe(tmp_path / "empty"), "no weights here")


def test_the_command(capsys, tmp_path):
    path = ADAPTERS / "ip-adapter_tiny.safetensors"
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(path)
    assert main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out
    assert "variant        base" in table and sha256(path) in table
    assert main(["inspect", str(TORCH_MODEL)]) == 0
    assert "  unet" in capsys.readouterr().out
    (tmp_path / "a.safetensors").write_text("hello")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
