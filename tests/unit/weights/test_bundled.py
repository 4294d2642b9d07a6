"""Names of the model inside the package, before paths and the Hub. The model itself is tested in test_mini.py."""

from pathlib import Path

import pytest

from ipadapter_jax.errors import InputError
from ipadapter_jax.pipelines.ip_adapter import adapter_file
from ipadapter_jax.weights import bundled as module
from ipadapter_jax.weights.bundled import bundled_path
from ipadapter_jax.weights.hub import local_path

FILES = ("unet/config.json", "image_encoder/config.json", "ip-adapter_mini.safetensors")
ADAPTER = "ip-adapter_mini.safetensors"


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the one in the package; the test runs in another one."""
    folder = tmp_path / "package" / "mini"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(module, "FOLDER", folder)
    monkeypatch.chdir(tmp_path / "here")
    return folder


@pytest.mark.parametrize(
    ("what", "name", "place"),
    [
        ("base model", "mini", "."),
        ("adapter", "mini", ADAPTER),
        ("adapter", f"mini/{ADAPTER}", ADAPTER),
        ("image encoder", "mini", "image_encoder"),
        ("image encoder", "mini/image_encoder/", "image_encoder"),
    ],
)
def test_names(inside, what, name, place):
    assert bundled_path(name, what) == inside / place
    assert local_path(name, list, what=what) == inside / place


@pytest.mark.parametrize(
    "name", ["./mini", "/mini", "~/mini", "mini2", "mini/", "", "mini/../mini", "mini/unet2", "owner/mini", "mini-plus"]
)
def test_other_names(inside, name):
    assert bundled_path(name, "base model") == (inside if name == "mini/" else None)


def test_the_name_comes_before_a_folder_and_a_path_after_it(inside):
    (own := Path("mini/image_encoder")).mkdir(parents=True)
    (own / "config.json").write_text("{}")

    def place(reference) -> Path:
        return local_path(reference, list, what="image encoder")

    assert place("mini") == place("mini/image_encoder") == inside / "image_encoder"
    assert place("./mini/image_encoder") == place(own) == own


def test_an_adapter_inside_the_package_without_the_hub(inside):
    assert adapter_file("mini") == inside / ADAPTER


@pytest.mark.parametrize(("what", "name"), [("adapter", "mini-plus"), ("base model", "mini")])
def test_a_package_without_its_model(inside, monkeypatch, what, name):
    if name == "mini":
        monkeypatch.setattr(module, "FOLDER", inside / "nowhere")
    with pytest.raises(InputError, match=f"^{what} {name}: the package was installed without it .*; install it again$"):
        local_path(name, list, what=what)
