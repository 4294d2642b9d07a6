"""What `ipadapter-jax inspect` says of files and folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, TORCH_MODEL, ldm_file
from hub import Hub
from safetensors.numpy import load_file, save_file
from weight_files import refused

from ipadapter_jax.cli import main
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.weights.convert import convert
from ipadapter_jax.weights.inspect import inspect_weights
from ipadapter_jax.weights.model_source import ModelSource
from ipadapter_jax.weights.open_base_model import open_base


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
    found = inspect_weights(path)
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
    found = inspect_weights(published(tmp_path / "a.safetensors", width, projection))
    assert found | facts == found
    sampled = "proj.weight" in projection
    assert ("give it as the adapter" in found["use"]) == (sampled or "other.weight" in projection)


def test_our_file_carries_its_digest(tmp_path):
    convert(ADAPTERS / "ip-adapter_tiny.safetensors", tmp_path / "a.safetensors")
    assert inspect_weights(tmp_path / "a.safetensors")["intact"] is True
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(content)
    assert inspect_weights(tmp_path / "a.safetensors")["intact"] is False


def test_folders_and_single_files(tmp_path):
    found = inspect_weights(TORCH_MODEL)
    assert [*found["parts"]] == ["unet", "vae", "text_encoder"]
    assert found["parts"]["unet"]["kind"] == "a UNet" and found["parts"]["unet"]["tensors"] == 686
    assert inspect_weights(IMAGE_ENCODER)["kind"] == "a CLIP image encoder"
    assert inspect_weights(ldm_file(tmp_path / "m.ckpt"))["kind"] == "a whole Stable Diffusion checkpoint"
    (tmp_path / "empty").mkdir()
    refused(lambda: inspect_weights(tmp_path / "empty"), "no weights here")


def test_the_command(capsys, tmp_path):
    path = ADAPTERS / "ip-adapter_tiny.safetensors"
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect_weights(path)
    assert main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out
    assert "variant        base" in table and sha256(path) in table
    assert main(["inspect", str(TORCH_MODEL)]) == 0
    assert "  unet" in capsys.readouterr().out
    (tmp_path / "a.safetensors").write_text("hello")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- what is not supported is named, and never advised -------------------------------------------------------------


def settings(folder: Path, part: str, **changes) -> None:
    path = folder / part / "config.json" if part else folder / "model_index.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


XL = {"addition_embed_type": "text_time", "cross_attention_dim": 2048, "use_linear_projection": True}
FAMILIES = {
    "an SDXL refiner": {"unet": XL | {"cross_attention_dim": 1280}},
    "an SDXL model of another kind": {"unet": XL | {"in_channels": 8}},
    "a depth-to-image base model": {"unet": {"in_channels": 5, "use_linear_projection": True}},
    "an unCLIP base model": {"unet": {"class_embed_type": "projection", "use_linear_projection": True}},
    "an instruct-pix2pix base model": {"unet": {"in_channels": 8}},
    "an SD 3 base model": {"": {"_class_name": "StableDiffusion3Pipeline"}},
    "a Flux base model": {"": {"_class_name": "FluxPipeline"}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_other_families(tmp_path, family):
    folder = tmp_path / "model"
    shutil.copytree(TORCH_MODEL, folder)
    for part, changes in FAMILIES[family].items():
        settings(folder, part, **changes)
    found = inspect_weights(folder)
    assert found["kind"] == f"{family} in diffusers' layout"
    assert found["use"] == f"{family} is not supported here yet"
    for refuse in (
        lambda: open_base(folder),
        lambda: convert(folder, tmp_path / "out"),
        lambda: open_base(ModelSource(ldm_file(tmp_path / "m.safetensors"), config=folder)),
    ):
        refused(refuse, str(folder), f"{family}, which is not supported here yet")


def test_a_base_model_is_advised_as_one(tmp_path):
    settings(tmp_path, "", _class_name="StableDiffusion3Pipeline")
    assert inspect_weights(TORCH_MODEL)["use"] == "give it as the base model"
    assert inspect_weights(TORCH_MODEL)["base"] == "SD 1.x"
    assert inspect_weights(TORCH_MODEL.parent / "sdxl_torch")["base"] == "SDXL"
    refused(lambda: open_base(tmp_path), "an SD 3 base model, which is not supported here yet")


def of_shapes(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)
    return inspect_weights(path)


UNET = {"time_embedding.linear_1.weight": (8, 8), "conv_in.weight": (8, 4, 3, 3), "conv_out.weight": (4, 8, 3, 3)}
CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
KINDS = [
    (UNET | {CROSS: (8, 2048)}, "a UNet", "give the folder that holds it as unet/"),
    (UNET | {CROSS: (8, 1024)}, "a UNet", "give the folder that holds it as unet/"),
    (UNET | {CROSS: (8, 768)}, "a UNet", "give the folder that holds it as unet/"),
    (UNET | {"conv_in.weight": (8, 8, 3, 3)}, "a UNet", "instruct-pix2pix, which is not supported here yet"),
    ({"text_model.embeddings.token_embedding.weight": (9, 1024)}, "a text encoder", "give it as the text encoder"),
    ({"text_model.embeddings.token_embedding.weight": (9, 1280)}, "a text encoder", "SDXL's second text encoder"),
    ({"text_model.embeddings.token_embedding.weight": (9, 768)}, "a text encoder", "give it as the text encoder"),
    ({f"model.diffusion_model.{CROSS}": (8, 2048)}, "a whole Stable Diffusion checkpoint", "not supported here yet"),
    ({"ip_adapter.1.to_k_ip.weight": (8, 2048)}, "an IP-Adapter", "give it as the adapter"),
    ({"ip_adapter.0.to_q_lora.down.weight": (8, 8)}, "an IP-Adapter", "the face embedding of InsightFace"),
    ({"image_proj.proj.2.weight": (8, 8), "image_proj.norm.weight": (2,)}, "an IP-Adapter", "InsightFace"),
    ({"<cat-toy>": (768,)}, "a textual inversion", "no place"),
    ({"cat": (3, 1024)}, "a textual inversion", "no place"),
    ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "a textual inversion", "no place"),
    ({"encoder.layers.0.weight": (8, 3, 3, 3), "decoder.layers.3.conv.0.weight": (8, 8, 3, 3)}, "a TAESD", "whole VAE"),
    ({"1.weight": (8, 4, 3, 3), "3.conv.0.weight": (8, 8, 3, 3)}, "a TAESD", "whole VAE"),
    ({"encoder.layers.0.self_attn.q_proj.weight": (8, 8)}, "a text encoder", "give it as the text encoder"),
    ({"controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3)}, "a ControlNet", "no place"),
    ({"unet.mid_block.attentions.0.lora_A.weight": (4, 8)}, "a LoRA", "merge it"),
]


@pytest.mark.parametrize(("shapes", "kind", "use"), KINDS)
def test_kinds_and_what_they_are_good_for(tmp_path, shapes, kind, use):
    found = of_shapes(tmp_path / "a.safetensors", shapes)
    assert found["kind"].startswith(kind)
    assert use in found["use"] or (found["use"] == "none here yet" and "InsightFace" in found["image_encoder"])


def test_another_network_by_its_class(tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(TORCH_MODEL / "vae", folder)
    settings(tmp_path, "vae", _class_name="AutoencoderTiny")
    words = ["this is a TAESD (AutoencoderTiny)", "give a VAE (AutoencoderKL)"]
    refused(lambda: open_base(ModelSource(TORCH_MODEL, vae=folder)).part("vae"), str(folder), *words)
    taesd = tmp_path / "taesd.safetensors"
    of_shapes(taesd, {"encoder.layers.0.weight": (8, 3, 3, 3), "decoder.layers.3.conv.0.weight": (8, 8, 3, 3)})
    refused(lambda: open_base(ModelSource(TORCH_MODEL, vae=taesd)).part("vae"), str(taesd), "It looks like a TAESD")


# --- names other than paths ----------------------------------------------------------------------------------------


def test_the_model_inside_the_package(capsys):
    assert [*inspect_weights("mini")["parts"]] == ["unet", "vae", "text_encoder", "image_encoder"]
    assert inspect_weights("mini-plus")["variant"] == "plus" and inspect_weights("mini/image_encoder")[
        "kind"
    ].startswith("a CLIP")
    assert main(["inspect", "mini"]) == 0 and "give it as the base model" in capsys.readouterr().out
    assert main(["inspect", "minii"]) == 2
    assert "did you mean mini" in capsys.readouterr().err


def names_in(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def test_places_on_the_hub(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, TORCH_MODEL, tmp_path / "model", [*names_in(TORCH_MODEL), "v1-5-pruned.safetensors"])
    assert [*inspect_weights("owner/name")["parts"]] == ["unet", "vae", "text_encoder"]
    assert not any(name.startswith(("tokenizer", "v1-5")) for name in hub.downloaded)
    Hub(monkeypatch, ADAPTERS, tmp_path / "adapters", names_in(ADAPTERS))
    assert inspect_weights("owner/name/ip-adapter_tiny.bin")["variant"] == "base"
    assert inspect_weights("owner/name/image_encoder")["kind"] == "a CLIP image encoder"


def test_a_repository_of_several_files(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, tmp_path, tmp_path, ["README.md", "models/a.safetensors", "models/b.bin"])
    refused(
        lambda: inspect_weights("owner/name"),
        "several files of weights; name one of models/a.safetensors, models/b.bin",
    )
    hub.names = ["README.md"]
    refused(lambda: inspect_weights("owner/name"), "no weights here (it holds README.md)")
    assert not hub.downloaded
