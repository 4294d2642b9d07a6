"""Recipes and settings: what is shipped loads and is right, what cannot be is refused by name."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from training import changed

from ipadapter_jax.cli import main, parse
from ipadapter_jax.cli.recipes import load_recipe, recipes
from ipadapter_jax.errors import InputError
from ipadapter_jax.train.config import Data, Train, check, identity
from ipadapter_jax.train.optim import trainable_mask

ROOT = Path(__file__).resolve().parents[3]
GOOD = Train(data=Data(path="somewhere"))


def test_the_papers_run() -> None:
    config, about = load_recipe("sd15")
    data, optim = config.data, config.optim
    assert (config.steps, data.batch_size, data.resolution) == (1_000_000, 64, 512)
    assert (data.drop_image, data.drop_text, data.drop_both) == (0.05, 0.05, 0.05)
    assert (optim.learning_rate, optim.weight_decay, optim.beta1, optim.beta2) == (1e-4, 0.01, 0.9, 0.999)
    assert trainable_mask(config.model) == {"unet": False, "image_proj": True, "ip_adapter": True}
    assert "ipadapter-jax train sd15" in about


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_states_its_command(name) -> None:
    config, about = load_recipe(name)
    assert f"ipadapter-jax train {name} " in about
    check(dataclasses.replace(config, data=dataclasses.replace(config.data, path="somewhere")))


def test_recipes_and_all_packages_are_installed() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "ipadapter_jax").rglob("*.py")}
    assert set(packages) == folders | {"ipadapter_jax.configs"}


def test_the_command_line_changes_a_recipe(tmp_path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text("from ipadapter_jax.train.config import Train\nconfig = Train(steps=7)\n")
    config = parse(["train", str(recipe), "--optim.learning-rate", "2e-4", "--data.path", "x", "--optim.ema", "0.99"])
    assert (config.steps, config.optim.learning_rate, config.data.path, config.optim.ema) == (7, 2e-4, "x", 0.99)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("config = 1\n", "config = Train"),
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError"),
        ("1 +\n", "SyntaxError"),
        ("from ipadapter_jax.train.config import Train\nconfig = Train(step=1)\n", "line 2: TypeError"),
    ],
)
def test_a_broken_recipe(content, named, tmp_path, capsys) -> None:
    recipe = tmp_path / "broken.py"
    recipe.write_text(content)
    assert main(["train", str(recipe)]) == 2
    output = capsys.readouterr().err
    assert named in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "name a recipe"),
        (["sd16"], "did you mean sd15"),
        (["sd15"], "--data.path is missing"),
        (["sd15", "--optim.learning-rat", "1"], "--optim.learning-rate"),
        (["sd15", "--optim.learning-rate", "fast"], "fast"),
        (["sd15", "--model.adapter", "plos"], "plus"),
        (["sd15", "--data.path", "nowhere"], "nowhere"),
        (["sd15", "--data.path", "x", "--mesh.process", "1"], "--mesh.coordinator"),
        (["sd15", "--data.path", "x", "--mesh.fsdp", "3"], "--mesh.fsdp 3"),
        (["sd15", "--data.path", "x", "--data.batch-size", "6"], "multiple of 4"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, named, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    output = capsys.readouterr().err
    assert named in output and output.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"out": "gs://bucket/run"},
        {"seed": -1},
        {"data__path": ""},
        {"data__batch_size": 0},
        {"data__drop_text": -0.1},
        {"data__drop_both": 0.95},
        {"data__max_unreadable_fraction": 2.0},
        {"optim__learning_rate": 0.0},
        {"optim__learning_rate": float("nan")},
        {"optim__beta2": 1.0},
        {"optim__ema": 1.5},
        {"optim__epsilon": 0.0},
        {"optim__clip_norm": 0.0},
        {"optim__accumulate": 3},
        {"optim__warmup_steps": -1},
        {"log__every": 0},
        {"checkpoint__keep_last": 0},
        {"checkpoint__keep_every": 0},
        {"model__train": ()},
        {"model__train": ("unet", "unet")},
        {"model__adapter": "none"},
        {"model__num_tokens": 0},
    ],
)
def test_settings_that_cannot_be(change) -> None:
    check(GOOD)
    with pytest.raises(InputError):
        check(changed(GOOD, **change))


def test_only_settings_that_affect_the_weights_identify_a_run() -> None:
    free = {"out": "elsewhere", "steps": 5, "data__workers": 3, "log__every": 7, "mesh__fsdp": 2, "data__path": "moved"}
    assert identity(changed(GOOD, **free)) == identity(GOOD)
    for change in ({"seed": 1}, {"optim__ema": 0.9}, {"data__batch_size": 8}, {"model__dtype": "float32"}):
        assert identity(changed(GOOD, **change)) != identity(GOOD)


def test_a_dry_run_says_what_each_process_runs(capsys) -> None:
    words = ["sd15", "--data.path", "x", "--mesh.coordinator", "h:1", "--mesh.processes", "2", "--dry-run"]
    assert main(["train", *words]) == 0
    output = capsys.readouterr().out
    assert "mesh: 8 (data) x 1 (fsdp)" in output and "batch: 64 samples, 8 on every device" in output
    assert "process 1, samples 32 to 63" in output and "--mesh.process 1" in output
