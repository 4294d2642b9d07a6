"""The card beside an exported adapter: what it says, what it keeps to itself, and that its commands run."""

import re
import shlex
import shutil

import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, ORACLES, TORCH_MODEL

from ipadapter_jax.models.projections import ImageProjConfig
from ipadapter_jax.train.model_card import model_card
from ipadapter_jax.weights.ip_adapter_export import adapter_metadata

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
ENCODER = "h94/IP-Adapter/models/image_encoder"
METADATA = adapter_metadata(ImageProjConfig("base", 1024, 768, 4), step=1000)
DATA = {"kind": "tars", "records": 64, "digest": "ab12"}


def card(metadata=METADATA, base=BASE, image_encoder=ENCODER, data=DATA, settings=None) -> str:
    settings = settings or {"steps": 1000, "optim": {"learning_rate": 1e-4}}
    return model_card(
        "adapter.safetensors", metadata, base=base, image_encoder=image_encoder, data=data, settings=settings
    )


def block(text: str, language: str) -> str:
    found = re.search(rf"\n\n```{language}\n(.*?)```", text, re.S)
    assert found
    return found[1]


def test_front_matter_and_tables():
    text = card()
    front = text.split("---\n")[1].splitlines()
    assert f"base_model: {BASE}" in front and "base_model_relation: adapter" in front and "- ip-adapter" in front
    for row in (
        "| variant | base |",
        "| image tokens | 4 |",
        f"| base model | {BASE} (SD 1.x) |",
        f"| image encoder | {ENCODER} (ViT-H/14, image_embeds 1024) |",
        "| training steps | 1000 |",
        "| records | 64 |",
        "| digest | ab12 |",
        "| steps | 1000 |",
        "| optim.learning\\_rate | 0.0001 |",
    ):
        assert f"\n{row}\n" in text, row
    assert "`ip-adapter_clip_h`" in text
    assert "{" not in text


@pytest.mark.parametrize("variant", ["plus", "full"])
def test_the_other_variants(variant):
    metadata = adapter_metadata(ImageProjConfig(variant, 48, 32, 16), step=1)
    text = card(metadata)
    assert "all patches" in text and f"| variant | {variant} |" in text
    assert "a preprocessor for this image encoder" in text


def test_no_path_of_this_machine_is_told(tmp_path, monkeypatch):
    """Of a path only the last part; a relative path is known by its being there."""
    secret = tmp_path / "secret"
    (secret / "sd15").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = {"data": {"path": str(secret / "photos"), "image_root": "secret/sd15", "more": [secret / "a", "../b"]}}
    settings |= {"out": "~/secret/run", "none": None, "text": "a | <b>\n"}
    text = card(base=str(secret / "sd15"), image_encoder="secret/sd15", settings=settings)
    assert "secret" not in text and str(tmp_path) not in text and "None" not in text
    assert "base_model:" not in text  # the Hub refuses what it does not have
    assert '"path/to/sd15", image_encoder=encoder' in text
    for row in ("| data.path | photos |", "| data.more | a, b |", "| out | run |", "| text | a \\| \\<b\\> |"):
        assert row in text, row


def test_a_place_inside_the_package_is_none_on_the_hub():
    text = card(base="mini", image_encoder="mini/image_encoder")
    assert "base_model:" not in text
    assert 'from_pretrained("path/to/mini/image_encoder", torch_dtype' in text
    assert '"path/to/mini", image_encoder=encoder' in text


def test_our_command_is_one():
    from ipadapter_jax.cli import parse

    program, job, *arguments = shlex.split(block(card(), "").replace("\\\n", " "))
    assert (program, job) == ("ipadapter-jax", "generate")
    found = parse([job, *arguments])
    assert (found.base, found.image_encoder, found.scale) == (BASE, ENCODER, 0.6)
    assert found.adapter == "path/to/adapter.safetensors"


@pytest.mark.torch
def test_the_lines_for_diffusers_run(tmp_path, monkeypatch):
    """With folders in the places of the Hub's repositories, and no GPU."""
    snippet = block(card(base="owner/base", image_encoder="owner/encoders/clip"), "python")
    shutil.copytree(TORCH_MODEL, tmp_path / "owner" / "base")
    shutil.copytree(IMAGE_ENCODER, tmp_path / "owner" / "encoders" / "clip")
    (tmp_path / "path" / "to").mkdir(parents=True)
    shutil.copy(ADAPTERS / "ip-adapter_tiny.safetensors", tmp_path / "path" / "to" / "adapter.safetensors")
    shutil.copy(ORACLES / "assets" / "img_a.png", tmp_path / "reference.jpg")
    monkeypatch.chdir(tmp_path)
    for there, here in (('.to("cuda")', ""), ("float16", "float32"), ('"a photo"', '"a", height=64, width=64')):
        assert there in snippet
        snippet = snippet.replace(there, here)
    names: dict = {}
    exec(snippet.replace("height", "num_inference_steps=2, height"), names)
    assert np.asarray(names["image"]).std() > 1
