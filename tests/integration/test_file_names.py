"""File names as people have them: ~ is a home folder wherever a path is given, and a name need not be UTF-8."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from helpers import ADAPTERS, TORCH_MODEL
from PIL import Image
from safetensors import safe_open

from ipadapter_jax.batch.rows import read_rows
from ipadapter_jax.cli import main
from ipadapter_jax.cli.recipes import load_recipe
from ipadapter_jax.data.open_dataset import open_dataset
from ipadapter_jax.errors import InputError
from ipadapter_jax.evaluate.results import _as_text
from ipadapter_jax.images.preprocess import load_image
from ipadapter_jax.storage.jsonl import JsonlAppender
from ipadapter_jax.storage.paths import check_utf8, expand_home
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.storage.text_files import encode_utf8
from ipadapter_jax.train.metrics_log import RunLog
from ipadapter_jax.weights.image_embeds import load_image_embeds, save_image_embeds
from ipadapter_jax.weights.inspect import inspect_weights
from ipadapter_jax.weights.open_base_model import open_base

ADAPTER = ADAPTERS / "ip-adapter_tiny.safetensors"
ODD = "b\udcff\u00e9"  # a byte that is not UTF-8, and a letter that is


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder with an image and its caption in ~/photos, a model and a recipe."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a wall")
    (tmp_path / "sd").symlink_to(TORCH_MODEL)
    (tmp_path / "adapter.safetensors").symlink_to(ADAPTER)
    (tmp_path / "mine.py").write_text(
        "from ipadapter_jax.train.config import Data, Train\nconfig = Train(data=Data(path='~/x'))"
    )
    return tmp_path


def test_expanded(home, monkeypatch):
    assert (
        expand_home("~/a") == f"{home}/a" and expand_home(Path("~/a")) == home / "a" and expand_home("~") == str(home)
    )
    assert expand_home("a~") == "a~" and expand_home("owner/~") == "owner/~"
    with pytest.raises(InputError, match="~nobody-here/a: there is no home folder of nobody-here; write the path"):
        expand_home("~nobody-here/a")
    monkeypatch.chdir(home)
    (home / "~draft.png").touch()
    assert expand_home("~draft.png") == "~draft.png"  # a name, where there is a file of it


def test_without_a_home_folder(monkeypatch):
    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(InputError, match=r"~/a: there is no home folder \(HOME is not set, and this user has none\)"):
        expand_home("~/a")


def test_home_folders_in_python(home):
    assert load_image("~/photos/a.png").size == load_image(Path("~/photos/a.png")).size == (8, 8)
    assert open_base("~/sd").folder == home / "sd"
    assert inspect_weights(Path("~/adapter.safetensors"))["kind"] == "an IP-Adapter"
    assert len(open_dataset("~/photos")) == 1
    assert read_rows(Path("~/photos"))[0][0].images == (home / "photos" / "a.png",)
    config, _ = load_recipe("~/mine.py")
    assert config.data.path == "~/x"  # expanded where it is opened
    save_image_embeds(Path("~/e.safetensors"), [[[0.5, 1.0]]], {})
    assert len(load_image_embeds(Path("~/e.safetensors"))) == 1 and (home / "e.safetensors").exists()


def test_home_folders_in_lists(home):
    (home / "list.json").write_text(json.dumps([{"image_file": "~/photos/a.png", "text": "a wall"}]))
    assert open_dataset(str(home / "list.json"))[0].image == (home / "photos" / "a.png").read_bytes()
    (home / "rows.csv").write_text("image\n~/photos/a.png\n~nobody-here/a.png\n")
    [row], [bad], _ = read_rows(home / "rows.csv")
    assert row.images == (home / "photos" / "a.png",) and "no home folder of nobody-here" in bad.reason


def in_bytes(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", b"b\xff\xc3\xa9"), ("ascii", b"b\xff\\xe9"), ("latin-1", b"b\xff\xe9")]
)
def test_every_name_is_printed(encoding, shown, tmp_path, monkeypatch):
    """As PYTHONIOENCODING and LANG make the streams."""
    out, err = in_bytes(encoding), in_bytes(encoding)
    for name, stream in {"stdout": out, "__stdout__": out, "stderr": err, "__stderr__": err}.items():
        monkeypatch.setattr(sys, name, stream)
    source, target = (tmp_path / f"{ODD}{ending}" for ending in (".safetensors", ".bin"))
    source.write_bytes(ADAPTER.read_bytes())
    assert main(["convert", str(source), str(target)]) == 0
    assert out.buffer.getvalue().endswith(shown + b".bin\n") and target.exists()
    assert main(["convert", str(source), str(target)]) == 2
    assert shown + b".bin exists; choose another name" in err.buffer.getvalue()
    assert main(["inspect", str(target)]) == main(["inspect", "--json", str(target)]) == 0


def test_file_names_in_written_files(tmp_path):
    """JSON gives the same name back; what has to be text has the byte spelled out."""
    assert json.loads(encode_utf8(json.dumps([ODD, "\u00e9"], ensure_ascii=False))) == [ODD, "\u00e9"]
    lines = JsonlAppender(tmp_path / "a.jsonl", keep=bool)
    lines.add({"picture": ODD})
    lines.close()
    assert JsonlAppender(tmp_path / "a.jsonl", keep=bool).found == [{"picture": ODD}]
    assert _as_text([ODD]) == ["b\\udcff\u00e9"]
    log = RunLog(LocalStore(tmp_path / ODD), tensorboard=True, wandb=None, config={"out": ODD}, first_step=0)
    log.close()
    [events] = (tmp_path / ODD / "tensorboard").glob("events*")
    assert b'"out": "b\\udcff\xc3\xa9"' in events.read_bytes()
    save_image_embeds(tmp_path / "e.safetensors", [[[0.5, 1.0]]], {"image_encoder": ODD})
    with safe_open(tmp_path / "e.safetensors", "numpy") as file:
        assert file.metadata()["image_encoder"] == "b\\udcff\u00e9"


def test_images_and_models_of_such_names(tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a\udcfe.png")
    (folder / "a\udcfe.txt").write_text("a wall")
    [row], bad, _ = read_rows(folder)
    assert (row.name, row.images, bad) == ("a\udcfe", (folder / "a\udcfe.png",), [])
    assert open_dataset(str(folder))[0].text == "a wall"
    (tmp_path / f"sd{ODD}").symlink_to(TORCH_MODEL)
    assert len(open_base(tmp_path / f"sd{ODD}").tokenizer) > 0


def test_paths_that_libraries_cannot_open_are_refused(tmp_path, monkeypatch, capsys):
    """Their paths are text: nothing is begun that could not be kept."""
    monkeypatch.chdir(tmp_path)
    check_utf8(tmp_path / "\u00e9", "nobody")
    with pytest.raises(InputError, match="the reader of Parquet needs a name in UTF-8"):
        (tmp_path / f"{ODD}.parquet").write_bytes(b"PAR1PAR1")
        open_dataset(str(tmp_path / f"{ODD}.parquet"))
    for line in (["train", "sd15", "--data.path", "x"], ["encode", "--model", "mini", "--image-encoder", "mini"]):
        more = [] if line[0] == "train" else ["--data", "."]
        assert main([*line, *more, "--out", ODD]) == 2
        [shown] = capsys.readouterr().err.splitlines()
        assert "needs a name in UTF-8; choose another place or rename the folder" in shown
    assert os.listdir(tmp_path) == [f"{ODD}.parquet"]
