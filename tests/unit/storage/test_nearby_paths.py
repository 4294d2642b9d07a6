"""What is said of a path that leads nowhere: what lies there, the likeliest first, in one line."""

import os
from pathlib import Path

import huggingface_hub
import pytest
from helpers import TORCH_MODEL
from hub import Hub
from PIL import Image
from weight_files import refused

from ipadapter_jax.batch.readers import open_records
from ipadapter_jax.cli import main
from ipadapter_jax.data.open_dataset import open_dataset
from ipadapter_jax.evaluate.clip_scorer import open_scorer
from ipadapter_jax.evaluate.frechet import moments_of_file
from ipadapter_jax.images.preprocess import load_image
from ipadapter_jax.inputs.suggestions import close_matches, sort_by_similarity
from ipadapter_jax.storage.nearby_paths import nearby_hint
from ipadapter_jax.weights import bundled
from ipadapter_jax.weights.convert import convert
from ipadapter_jax.weights.image_embeds import load_image_embeds
from ipadapter_jax.weights.image_encoder import open_image_encoder
from ipadapter_jax.weights.ip_adapter_file import adapter_file
from ipadapter_jax.weights.model_source import ModelSource
from ipadapter_jax.weights.open_base_model import open_base


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """A working folder with runs/mine in it, and a network that nobody may ask."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("README.md", "adapter.safetensors", "lock", "metrics.jsonl", ".part-a-abcd1234"):
        (tmp_path / "runs" / "mine" / name).touch()

    def asked(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    return tmp_path / "runs"


def test_nearby(runs):
    holds = "; runs/mine exists and holds adapter.safetensors, metrics.jsonl, README.md and 1 more"
    assert nearby_hint("runs/mine/adaptr.safetensors") == holds
    assert nearby_hint(runs / "mine" / "adaptr.safetensors") == holds.replace("runs", str(runs))
    assert nearby_hint("runs/mien/adapter.safetensors") == "; runs exists and holds mine"
    assert nearby_hint("run/mine/adapter.safetensors") == "; runs is here"
    assert nearby_hint("runs/mine/lock/adapter.safetensors") == "; runs/mine/lock is a file, not a folder"
    assert nearby_hint("else/where") == nearby_hint("/nothing/like/it") == nearby_hint("a\0b") == ""
    (runs / "empty").mkdir()
    assert nearby_hint("runs/empty/a") == "; runs/empty exists and is empty"
    os.mkdir(b"runs/odd")
    with open(b"runs/odd/\xff\n.bin", "w"):
        pass
    assert nearby_hint("runs/odd/a.bin").isprintable() and nearby_hint("runs/odd/a.bin").isascii()


def test_a_folder_of_many_files(tmp_path, recwarn):
    for number in range(3000):
        (tmp_path / f"{number}.png").touch()
    (tmp_path / "train-000.tar").touch()
    assert len(nearby_hint(tmp_path / "3001.png")) < 300
    assert f"{tmp_path} exists and holds train-000.tar, " in nearby_hint(tmp_path / "train-00.tar")
    assert nearby_hint(tmp_path / "train-00.tar").endswith(" and 2998 more")
    assert not recwarn.list  # of a scan that nobody closed


def test_order():
    assert sort_by_similarity("b", ["c", "a", "bb"]) == ["bb", "a", "c"]
    assert close_matches("fp61", ["fp16", "non_ema"]) == ["fp16"] and close_matches("x", ["fp16"]) == []


SLIPS = {
    "adapter": lambda path: adapter_file(path),
    "base": lambda path: open_base(path),
    "image encoder": lambda path: open_image_encoder(path),
    "vae": lambda path: open_base(ModelSource(TORCH_MODEL, vae=path)).part("vae"),
    "text encoder": lambda path: open_base(ModelSource(TORCH_MODEL, text_encoder=path)).part("text_encoder"),
    "converted": lambda path: convert(path, Path("out.safetensors")),
    "clip": lambda path: open_scorer(path),
    "embeds": lambda path: load_image_embeds(Path(path)),
    "features": lambda path: moments_of_file(Path(path).with_suffix(".npy")),
    "list": lambda path: open_records(Path(path)),
    "image": lambda path: load_image(path),
    "data": lambda path: open_dataset(path),
}


@pytest.mark.parametrize("kind", SLIPS)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("runs/mine/adaptr.safetensors", "runs/mine exists and holds adapter.safetensors, "),
        ("runs/mien", "runs exists and holds mine"),
        ("runs/mien/adapter.safetensors", "runs exists and holds mine"),
    ],
)
def test_a_misspelled_path_names_existing_files(runs, kind, path, words):
    message = refused(lambda: SLIPS[kind](path), path.removesuffix(".safetensors"), words)
    assert "download" not in message
    refused(lambda: SLIPS[kind](str(runs.parent / path)), words.split(" exists")[1])


def test_the_config_of_a_single_file(runs, tmp_path):
    from helpers import ldm_file

    file = ldm_file(tmp_path / "model.safetensors")
    refused(lambda: open_base(ModelSource(file, config="runs/mien")), "config runs/mien", "runs exists and holds mine")


def test_a_repository_can_be_meant_all_the_same(runs, monkeypatch):
    refused(lambda: open_base("runs/mien"), "; the Hub's repository is runs/mien@main")
    assert "Hub" not in refused(lambda: open_base("runs/mine/other"), "runs/mine exists")
    for on_the_hub in ("runs/mien@main", "owner/name", "runs/other", "runs/other/adapter.safetensors"):
        with pytest.raises(AssertionError, match="the network was asked"):
            open_base(on_the_hub)


def test_a_folder_that_has_an_owners_name(runs, monkeypatch, tmp_path):
    """As a download into `owner/` or the unpacked base model leaves one."""
    for folder in ("stable-diffusion-v1-5/unet", "h94/IP-Adapter-FaceID"):
        (runs.parent / folder).mkdir(parents=True)
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for ask in (lambda: open_base(base), lambda: adapter_file("h94/IP-Adapter/models/ip-adapter_sd15.bin")):
        with pytest.raises(AssertionError, match="the network was asked"):
            ask()
    (runs.parent / "h94" / "IP-Adapter").mkdir()
    refused(lambda: adapter_file("h94/IP-Adapter/models/ip-adapter_sd15.bin"), "h94/IP-Adapter exists and is empty")
    unreachable(monkeypatch)
    refused(lambda: open_base(base), "no network; stable-diffusion-v1-5 exists and holds unet")
    refused(lambda: adapter_file("runs/else/adapter.bin"), "no network; runs exists and holds mine")
    Hub(monkeypatch, tmp_path, tmp_path, ["model_index.json"])
    refused(lambda: adapter_file("runs/else/adapter.bin"), "has no adapter.bin; runs exists and holds mine")


def test_a_file_of_weights_is_no_repository(runs):
    refused(lambda: adapter_file("run/adapter.safetensors"), "there is no such file or folder", "runs is here")
    refused(lambda: adapter_file("owner/adapter.bin"), "there is no such file or folder")
    refused(lambda: adapter_file("adapter.safetensors"), "and it is not a Hub id")


def unreachable(monkeypatch) -> None:
    def asked(*_, **__):
        raise OSError("no network.")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)


def test_offline_a_like_folder_is_named(runs, monkeypatch):
    unreachable(monkeypatch)
    refused(lambda: open_base("rusn/mine"), "not a path on this machine", "no network; runs is here")


@pytest.mark.parametrize(
    ("what", "call", "name", "meant"),
    [
        ("base model", open_base, "minii", "mini"),
        ("base model", open_base, "mini-plus", "mini"),
        ("adapter", adapter_file, "mini_plus", "mini-plus or mini"),
        ("adapter", adapter_file, "Mini", "mini or mini-plus"),
        ("image encoder", open_image_encoder, "mni", "mini"),
    ],
)
def test_names_of_the_model_inside(runs, what, call, name, meant):
    refused(lambda: call(name), f"{what} {name}: there is no such file", f"did you mean {meant}?")


def test_a_slip_inside_mini(runs):
    message = refused(
        lambda: adapter_file("mini/ip-adaptr_mini.safetensors"), "mini exists and holds ip-adapter_mini.s"
    )
    assert str(bundled.FOLDER) not in message


def test_on_the_command_line(runs, capsys):
    Image.new("RGB", (8, 8)).save("a.png")
    for command in (
        ["generate", "--adapter", "runs/mine/adaptr.safetensors", "--image", "a.png", "--out", "b.png"],
        ["convert", "runs/mine/adaptr.safetensors", "b.bin"],
        ["inspect", "runs/mine/adaptr.safetensors"],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "runs/mine exists and holds adapter.safetensors" in error, error
