"""The command line: images that carry their settings, and one line and exit code 2 for every bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ADAPTERS, ORACLES, TORCH_MODEL, forbid_sampling, without_sampling
from PIL import Image
from small_model import small_adapter, small_model

from ipadapter_jax.cli import main
from ipadapter_jax.storage.atomic_files import sha256, write_atomically

CAT = ORACLES / "assets" / "img_a.png"
ADAPTER = ADAPTERS / "ip-adapter_tiny.safetensors"


def arguments(target: Path, **changes) -> list[str]:
    """A small complete command line; None leaves an option out."""
    options = {
        "model": small_model(),
        "adapter": small_adapter("ip-adapter_tiny"),
        "image": CAT,
        "prompt": "a cat",
        "steps": 2,
        "height": 64,
        "width": 64,
        "out": target,
    } | changes
    flat = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return ["generate", *(word for pair in flat for word in pair)]


def settings(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["ipadapter_jax"])  # type: ignore[attr-defined]


def test_generate_writes_a_grid_and_single_images_with_their_settings(tmp_path, capsys):
    out = tmp_path / "new folder" / "cats.png"
    assert main(arguments(out, num_images=3, seed=5, scale=0.6)) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert sorted(p.name for p in out.parent.iterdir()) == ["cats-0.png", "cats-1.png", "cats-2.png", "cats.png"]
    assert [settings(out.with_name(f"cats-{i}.png"))["seed"] for i in range(3)] == [5, 6, 7]
    found, adapter = settings(out), small_adapter("ip-adapter_tiny")
    assert (found["prompt"], found["scale"], found["steps"], found["num_images"]) == ("a cat", 0.6, 2, 3)
    assert found["sha256"]["ip_adapter"] == {adapter.name: sha256(adapter)}
    assert set(found["sha256"]) == {"unet", "vae", "text_encoder", "ip_adapter", "image_encoder"}
    assert {"jax", "flax", "ipadapter-jax"} <= set(found["versions"])
    singles = [np.asarray(Image.open(out.with_name(f"cats-{i}.png"))) for i in range(3)]
    assert all(single.shape == (64, 64, 3) for single in singles)
    assert any((np.asarray(Image.open(out))[:64, :64] == single).all() for single in singles)


def test_several_reference_images_and_no_adapter(tmp_path):
    line = arguments(tmp_path / "both.png", image=None)
    line += ["--image", str(CAT), str(ORACLES / "assets" / "img_rgba.png"), "--reference-resize", "pad"]
    with without_sampling() as handed:
        assert main(line) == 0
        assert main(arguments(tmp_path / "plain.png", adapter=None, image=None)) == 0
    assert settings(tmp_path / "plain.png")["adapter"] is None
    both, plain = handed
    assert [branch.kv[0][0].shape[2] for branch in both.image_branches] == [8]  # the tokens of two images
    assert plain.image_branches == []


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """A folder of things that go wrong."""
    root = tmp_path_factory.mktemp("bad")
    (root / "page.jpg").write_text("<!DOCTYPE html><html>not found</html>")
    (root / "empty.png").write_bytes(b"")
    Image.new("1", (20000, 20000)).save(root / "bomb.png")
    (root / "broken.safetensors").write_bytes(ADAPTER.read_bytes()[:5000])
    (root / "folder.png").mkdir()
    (root / "single-1.png").mkdir()
    (root / "file").write_text("")
    return root


WRONG = [
    ({"model": "{bad}/nowhere"}, "nowhere"),
    ({"model": "{bad}"}, "diffusers' layout"),
    ({"adapter": "{bad}/nowhere.safetensors"}, "nowhere.safetensors"),
    ({"adapter": "{bad}/broken.safetensors"}, "broken.safetensors"),
    ({"adapter": str(ADAPTERS)}, "name one of its files"),
    ({"adapter": str(TORCH_MODEL / "unet" / "diffusion_pytorch_model.safetensors")}, "not an IP-Adapter file"),
    ({"image_encoder": "{bad}/nowhere"}, "nowhere"),
    ({"image_encoder": str(TORCH_MODEL / "text_encoder")}, "text_encoder"),
    ({"image": "{bad}/nowhere.jpg"}, "nowhere.jpg"),
    ({"image": "{bad}/page.jpg"}, "page.jpg"),
    ({"image": "{bad}/empty.png"}, "empty.png"),
    ({"image": "{bad}/bomb.png"}, "bomb.png"),
    ({"image": "{bad}"}, "{bad}"),
    ({"image": None}, "--adapter needs --image"),
    ({"adapter": None}, "--image and --image-encoder need --adapter"),
    ({"width": 65}, "--width 65 is not a multiple of 8; the nearest size is 64"),
    ({"height": -8}, "--height -8"),
    ({"width": 10**8}, "an image of 100000000 x 64 pixels would need at least"),
    ({"scale": "nan"}, "--scale nan is not a finite number"),
    ({"guidance_scale": "inf"}, "--guidance-scale inf"),
    ({"steps": 0}, "--steps 0 must be at least 1"),
    ({"steps": 1001}, "--steps 1001"),
    ({"num_images": 0}, "--num-images 0"),
    ({"eta": 3}, "--eta 3"),
    ({"seed": -3}, "--seed -3"),
    ({"dtype": "int8"}, "int8"),
    ({"reference_resize": "zoom"}, "zoom"),
    ({"steps": "many"}, "many"),
    ({"stpes": 4}, "--steps"),
    ({"out": None}, "--out"),
    ({"out": "{bad}/image.jpg"}, "ends in .png"),
    ({"out": "{bad}/folder.png"}, "is a folder"),
    ({"out": "{bad}/single.png", "num_images": 3}, "single-1.png is a folder"),
    ({"out": "{bad}/file/image.png"}, "cannot write there"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_bad_input_is_one_line_and_exit_code_2(changes, message, bad, tmp_path, capsys, monkeypatch):
    changes = {name: value.format(bad=bad) if isinstance(value, str) else value for name, value in changes.items()}
    before = sorted(bad.rglob("*"))
    forbid_sampling(monkeypatch)
    assert main(arguments(tmp_path / "new folder" / "out.png", **changes)) == 2
    complaint = capsys.readouterr().err
    assert message.format(bad=bad) in complaint
    assert complaint.startswith("ipadapter-jax: ") and complaint.count("\n") == 1
    assert list(tmp_path.iterdir()) == [] and sorted(bad.rglob("*")) == before


def test_a_repeated_option_is_refused(tmp_path, capsys):
    assert main([*arguments(tmp_path / "out.png"), "--image", str(CAT)]) == 2
    assert "--image is given more than once" in capsys.readouterr().err


def test_a_long_file_name_is_no_problem(tmp_path):
    out = tmp_path / ("a" * 250 + ".png")
    write_atomically(out, b"whole")
    assert out.read_bytes() == b"whole"


def test_debug_shows_where(tmp_path):
    with pytest.raises(Exception, match="steps 0"):
        main([*arguments(tmp_path / "out.png", steps=0), "--debug"])


def test_a_failing_write_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(arguments(tmp_path / "out.png")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_error_after_loading_stands_alone_and_a_report_follows_success(tmp_path):
    """The recorded text encoder holds position_ids, which are ignored and reported."""

    def run(name: str, **changes) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "ipadapter_jax.cli", *arguments(tmp_path / name, steps=1, **changes)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})

    wrong, right = run("wrong.png", width=65), run("right.png", adapter=None, image=None)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1) and "--width 65" in wrong.stderr
    assert right.returncode == 0 and "ignored text_model.embeddings.position_ids" in right.stderr


def test_help_and_doctor_as_a_person_runs_them():
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "ipadapter_jax.cli", *words], capture_output=True, text=True)

    helped = run("generate", "--help")
    assert helped.returncode == 0 and "--image-encoder" in helped.stdout and helped.stderr == ""
    report = run("doctor")
    assert report.returncode == 0
    assert "nothing required is missing" in report.stdout and "compiled programs" in report.stdout
    assert "XLA_FLAGS: " in report.stdout and "40 written out" in report.stdout
    assert run("genrate").returncode == 2
