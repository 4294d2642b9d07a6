"""The model inside the package: the folder that ships, its use by name, and equality with PyTorch diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import ORACLES, assert_same, handed_to_sampler, slow
from PIL import Image

from benchmarks.compare_with_diffusers import compare, photograph
from examples import sample_sheet
from experiments.mini.attribute_classifier import judge, truth
from experiments.mini.scenes.render import render
from experiments.mini.scenes.scene import make_scene
from ipadapter_jax import StableDiffusion
from ipadapter_jax.cli import main
from ipadapter_jax.images.preprocess import to_uint8
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.train.frozen_encoders import load_frozen_encoders
from ipadapter_jax.weights.bundled import FOLDER, GUIDANCE_SCALE, REFERENCE

CAT = ORACLES / "assets" / "img_a.png"
STEPPED = {"output_type": "np", "callback": lambda *_: None}  # a program for each step, as `generate` has it
pytestmark = pytest.mark.usefixtures("one_device")
BASE, PLUS = Path("ip-adapter_mini.safetensors"), Path("ip-adapter-plus_mini.safetensors")


@pytest.fixture(scope="module")
def pipe(one_device) -> StableDiffusion:
    return StableDiffusion.from_pretrained("mini")


def test_the_folder_is_small_and_whole():
    files = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert {"README.md", "reference.png", "image_encoder/preprocessor_config.json", str(BASE), str(PLUS)} <= files
    assert sum((FOLDER / name).stat().st_size for name in files if name.endswith(".safetensors")) <= 16_000_000
    digests = json.loads((FOLDER / "digests.json").read_text())
    assert digests == {name: sha256(FOLDER / name) for name in files - {"digests.json"}}


def test_the_reference_is_a_square_that_the_encoder_can_shrink():
    with Image.open(REFERENCE) as image:
        assert image.mode == "RGB" and image.width == image.height and image.width % 64 == 0


@pytest.mark.parametrize(("name", "file", "tokens"), [("mini", BASE, 4), ("mini-plus", PLUS, 16)])
def test_images_by_name(pipe, name, file, tokens):
    own = pipe.with_ip_adapter(name)
    assert own.adapters[0].source == FOLDER / file
    assert own.adapters[0].feature_encoder.source.parent == FOLDER / "image_encoder"
    assert own.adapters[0].projection.config.num_tokens == tokens
    assert own.guidance_scale == GUIDANCE_SCALE
    call = {"ip_adapter_image": REFERENCE, "num_inference_steps": 2}
    assert own(**call, **STEPPED).shape == (1, 64, 64, 3)
    found = handed_to_sampler(own, **call)
    assert_same(found, handed_to_sampler(own, guidance_scale=GUIDANCE_SCALE, **call))
    other = handed_to_sampler(own, guidance_scale=7.5, **call)
    assert (found.guidance.scale, other.guidance.scale) == (np.float32(GUIDANCE_SCALE), 7.5)


def test_image_prompts_are_followed(pipe):
    """Of 16 held-out scenes, without a word. A guess is right for a sixth; docs/results.md has the shares of 500."""
    own, scenes = pipe.with_ip_adapter("mini"), [make_scene("held_out", index, 1) for index in range(16)]
    call = {"num_inference_steps": 20} | STEPPED
    painted = [own(ip_adapter_image=render(scene), seed=index, **call)[0] for index, scene in enumerate(scenes)]
    found, right = judge(to_uint8(np.stack(painted))), truth(scenes)
    for name, least in (("colour", 12), ("background", 12), ("shape", 8)):
        assert (getattr(found, name) == getattr(right, name)).sum() >= least, name


def test_scale_0_is_the_base_model(pipe):
    call = {"prompt": "a red circle", "num_inference_steps": 2} | STEPPED
    adapted = pipe.with_ip_adapter("mini")(**call, ip_adapter_image=REFERENCE, ip_adapter_scale=0.0)
    assert (adapted == pipe(**call)).all()


def test_every_word_of_a_caption_is_known(pipe):
    """Each is one token, between those of begin and end."""
    words = "a large striped red circle on a grey background"
    assert len(pipe.tokenizer(words).input_ids) == len(words.split()) + 2


def test_training_finds_it_by_name():
    found = load_frozen_encoders("mini", None, "mini", "float32", patches=False)
    assert found.vae.source.parent == FOLDER / "vae"
    assert found.image_encoder.source.parent == FOLDER / "image_encoder"


def test_generate_uses_it_by_default(tmp_path):
    def settings(*options: str) -> dict:
        out = tmp_path / "out.png"
        assert main(["generate", "--out", str(out), "--steps", "2", *options]) == 0
        with Image.open(out) as image:
            assert image.size == (64, 64)
            return json.loads(image.text["ipadapter_jax"])  # type: ignore[attr-defined]

    words, image = settings("--prompt", "a red circle"), settings("--image", str(CAT))
    assert (words["model"], words["adapter"], words["guidance_scale"]) == ("mini", None, GUIDANCE_SCALE)
    assert (image["model"], image["adapter"]) == ("mini", "mini")
    assert image["sha256"]["ip_adapter"] == {BASE.name: sha256(FOLDER / BASE)}
    plus = settings("--image", str(CAT), "--adapter", "mini-plus", "--guidance-scale", "3")
    assert (plus["adapter"], plus["guidance_scale"]) == ("mini-plus", 3.0)


def test_a_path_to_the_same_folder_has_no_default_adapter(tmp_path, capsys):
    assert main(["generate", "--model", str(FOLDER), "--image", str(CAT), "--out", str(tmp_path / "out.png")]) == 2
    assert "--image and --image-encoder need --adapter" in capsys.readouterr().err


def test_the_sample_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample_sheet, "STEPS", 3)  # as the images that are compared with diffusers': one program
    above, below = sample_sheet.sample(Image.open(CAT).convert("RGB"), "", seed=3)
    assert [label for label, _ in above] == ["reference", "seed 3", "seed 4", "seed 5", "seed 6"]
    assert [label for label, _ in below] == ["scale 0", "scale 0.25", "scale 0.5", "scale 0.75", "scale 1"]
    assert above[1][1] == below[-1][1] and len({image.tobytes() for _, image in above + below}) == 9
    out = tmp_path / "new folder" / "sheet.png"
    assert sample_sheet.main(image=CAT, prompt="a red circle", out=out) == 0
    assert capsys.readouterr().out.startswith(f"{out}\n")
    with Image.open(out) as sheet:
        assert sheet.width > 5 * 256 and sheet.height > 2 * 256


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"image": "nowhere.jpg"}, "nowhere.jpg"), ({"out": "sheet.jpg"}, "ends in .png"), ({"seed": -1}, "seed")],
)
def test_a_sheet_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, wrong, message):
    monkeypatch.chdir(tmp_path)
    paths = {name: Path(value) if isinstance(value, str) else value for name, value in wrong.items()}
    assert sample_sheet.main(**paths) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.torch
@pytest.mark.parametrize("adapter", [BASE, *slow(None, PLUS)], ids=["base", "text", "plus"])
def test_diffusers_reads_the_folder_and_gives_the_same_image(adapter):
    """Each in its own size, from the same noise. Measured: 7e-6 at most, with random weights 9e-6."""
    result = compare(
        FOLDER,
        photograph(REFERENCE),
        adapter=adapter,
        prompt="a red circle",
        scale=0.8,
        guidance_scale=GUIDANCE_SCALE,
        height=None,
        width=None,
    )
    assert result.our_pixels.shape == result.their_pixels.shape == (64, 64, 3)
    assert result.latents_error < 4e-5
    assert result.pixel_differences.max() <= 1
    assert np.std(result.our_pixels) > 1
