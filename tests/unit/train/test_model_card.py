"""The card beside an exported adapter: what it says, what it keeps to itself, and that its commands run."""

import re
import shlex
import shutil
import sys
import types

import numpy as np
import pytest
from helpers import ADAPTERS, IMAGE_ENCODER, ORACLES, TORCH_MODEL

from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.train.model_card import model_card
from ipadapter_jax.weights.bundled import FOLDER
from ipadapter_jax.weights.ip_adapter_export import adapter_metadata

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
ENCODER = "h94/IP-Adapter/models/image_encoder"
METADATA = adapter_metadata(ImageProjConfig("base", 1024, 768, 4), step=1000)
DATA = {"kind": "tars", "records": 64, "digest": "ab12"}


def card(metadata=METADATA, base=BASE, image_encoder=ENCODER, data=DATA, settings=None, variant=None) -> str:
    settings = settings or {"steps": 1000, "optim": {"learning_rate": 1e-4}}
    places = {"base": base, "image_encoder": image_encoder, "variant": variant}
    return model_card("adapter.safetensors", metadata, **places, data=data, settings=settings)


def blocks(text: str) -> dict[str, str]:
    """The code of a card, by what it is for."""
    found = re.findall(r"```(?:python)?\n(.*?)```", text.split("## Use")[1], re.S)
    return dict(zip(("diffusers", "command", "python"), found, strict=True))


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


def test_no_path_of_this_machine_is_shown(tmp_path, monkeypatch):
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


PLACES = [
    (BASE, ENCODER, None),
    ("mini", "mini/image_encoder", None),
    ("mini", "mini", None),
    (f"{BASE}@v2", "h94/IP-Adapter@refs/pr/3/models/image_encoder", "fp16"),
    ("owner/name@0123abc", "owner/clip@main", None),
]


@pytest.mark.parametrize(("base", "image_encoder", "variant"), PLACES)
def test_our_command_is_one(base, image_encoder, variant):
    from ipadapter_jax.cli import parse

    words = blocks(card(base=base, image_encoder=image_encoder, variant=variant))["command"].replace("\\\n", " ")
    program, job, *arguments = shlex.split(words)
    assert (program, job) == ("ipadapter-jax", "generate")
    found = parse([job, *arguments])
    assert (found.model, found.image_encoder, found.variant, found.scale) == (base, image_encoder, variant, 0.6)
    assert found.adapter == "path/to/adapter.safetensors"


class Recorded:
    """Stands in for everything that a card calls, and keeps the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, *arguments, **named):
        self.calls.append((arguments, named))
        return self

    def __getattr__(self, name):
        return self

    def __getitem__(self, key):
        return self


@pytest.mark.parametrize(
    ("base", "image_encoder", "expected"),
    [
        (BASE, ENCODER, [(("h94/IP-Adapter",), {"subfolder": "models/image_encoder"}), ((BASE,), {})]),
        (
            "owner/name@v2",
            "owner/clip@0123abc",
            [(("owner/clip",), {"revision": "0123abc"}), (("owner/name",), {"revision": "v2"})],
        ),
        (
            "owner/name@refs/pr/1",
            "h94/IP-Adapter@main/models/image_encoder",
            [
                (("h94/IP-Adapter",), {"subfolder": "models/image_encoder", "revision": "main"}),
                (("owner/name",), {"revision": "refs/pr/1"}),
            ],
        ),
        ("mini", "mini", [((FOLDER / "image_encoder",), {}), ((FOLDER,), {})]),
    ],
)
def test_the_places_as_diffusers_takes_them(base, image_encoder, expected, monkeypatch):
    """It knows no @REVISION, and no model inside a package."""
    encoder, pipeline = Recorded(), Recorded()
    for name, contents in {
        "torch": {"float16": "half"},
        "diffusers": {"StableDiffusionPipeline": pipeline},
        "diffusers.utils": {"load_image": Recorded()},
        "transformers": {"CLIPVisionModelWithProjection": encoder},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    text = card(base=base, image_encoder=image_encoder)
    exec(blocks(text)["diffusers"], {})
    found = [encoder.calls[0], pipeline.calls[0]]
    for arguments, named in found:
        assert named.pop("torch_dtype") == "half"
        named.pop("image_encoder", None)
        assert (arguments, named) in expected
    front = text.split("---\n")[1]
    assert ("base_model: " in front) == (base != "mini") and "@" not in front


def test_the_weights_that_were_read_are_named():
    for code in blocks(card(variant="fp16")).values():
        assert 'variant="fp16"' in code or "--variant fp16" in code
    assert "variant=" not in blocks(card())["diffusers"] + blocks(card())["python"]


def test_our_lines_run_on_mini(tmp_path, monkeypatch):
    (tmp_path / "path" / "to").mkdir(parents=True)
    shutil.copy(FOLDER / "ip-adapter_mini.safetensors", tmp_path / "path" / "to" / "adapter.safetensors")
    shutil.copy(FOLDER / "reference.png", tmp_path / "reference.jpg")
    monkeypatch.chdir(tmp_path)
    snippet = blocks(card(base="mini", image_encoder="mini/image_encoder"))["python"]
    assert '"a photo"' in snippet
    names: dict = {}
    exec(snippet.replace('"a photo"', '"a photo", num_inference_steps=2'), names)
    assert np.asarray(names["image"]).std() > 1


@pytest.mark.torch
@pytest.mark.parametrize("base", ["owner/base", "mini"])
def test_the_lines_for_diffusers_run(tmp_path, monkeypatch, base):
    """With folders in the places of the Hub's repositories, and no GPU."""
    image_encoder = "mini" if base == "mini" else "owner/encoders/clip"
    snippet = blocks(card(base=base, image_encoder=image_encoder))["diffusers"]
    shutil.copytree(TORCH_MODEL, tmp_path / "owner" / "base")
    shutil.copytree(IMAGE_ENCODER, tmp_path / "owner" / "encoders" / "clip")
    (tmp_path / "path" / "to").mkdir(parents=True)
    adapter = FOLDER / "ip-adapter_mini.safetensors" if base == "mini" else ADAPTERS / "ip-adapter_tiny.safetensors"
    shutil.copy(adapter, tmp_path / "path" / "to" / "adapter.safetensors")
    shutil.copy(ORACLES / "assets" / "img_a.png", tmp_path / "reference.jpg")
    monkeypatch.chdir(tmp_path)
    for there, here in (('.to("cuda")', ""), ("float16", "float32"), ('"a photo"', '"a", height=64, width=64')):
        assert there in snippet
        snippet = snippet.replace(there, here)
    names: dict = {}
    exec(snippet.replace("height", "num_inference_steps=2, height"), names)
    assert np.asarray(names["image"]).std() > 1
