"""Options, fields of recipes and recorded settings are accepted under the names that they had in older releases."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from helpers import ORACLES
from PIL import Image

from ipadapter_jax.batch.job_settings import read_settings
from ipadapter_jax.cli import COMMANDS, main, parse
from ipadapter_jax.cli.batch_options import BatchOptions
from ipadapter_jax.cli.help import help_of
from ipadapter_jax.cli.option_types import options_of
from ipadapter_jax.cli.parsing import unknown_option
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.former_names import former_names
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train.config import Data, Optim, Train, identity

CAT = ORACLES / "assets" / "img_a.png"

ENCODE = "encode --image-encoder e --data d --out o"
# An old spelling, the new one, and what the warning says of the old one.
ALIASES = [
    ("generate --out x.png --base mini", "generate --out x.png --model mini", "--base is now called --model"),
    ("batch x --out y --base=mini", "batch x --out y --model=mini", "--base is now called --model"),
    ("evaluate x --out y --base mini", "evaluate x --out y --model mini", "--base is now called --model"),
    (f"{ENCODE} --base mini", f"{ENCODE} --model mini", "--base is now called --model"),
    (
        "generate --out x.png --fit pad",
        "generate --out x.png --reference-resize pad",
        "--fit is now called --reference-resize",
    ),
    (
        "generate --out x.png --exact-outside-mask",
        "generate --out x.png --preserve-unmasked",
        "--exact-outside-mask is now called --preserve-unmasked",
    ),
    (
        "generate --out x.png --no-exact_outside_mask",
        "generate --out x.png --no-preserve-unmasked",
        "--no-exact-outside-mask is now called --no-preserve-unmasked",
    ),
    (
        "batch x --out y --layers 'ease out'",
        "batch x --out y --layer-scales 'ease out'",
        "--layers is now called --layer-scales",
    ),
    ("generate --out x.png --explore scales", "generate --out x.png --grid scales", "--explore is now called --grid"),
    (
        "generate --out x.png --save_embeds=e.safetensors",
        "generate --out x.png --save-image-embeds=e.safetensors",
        "--save-embeds is now called --save-image-embeds",
    ),
    ("generate --out x.png --embeds e", "generate --out x.png --image-embeds e", "--embeds is now called"),
    (
        "generate --out x.png --uncond 'zero pixels'",
        "generate --out x.png --uncond zero-pixels",
        "--uncond 'zero pixels' is now called zero-pixels",
    ),
    (
        "train sd15 --data.max-bad-share 0.5",
        "train sd15 --data.max-unreadable-fraction 0.5",
        "--data.max-bad-share is now called --data.max-unreadable-fraction",
    ),
    (
        f"{ENCODE} --model mini --max-bad-share 0.5",
        f"{ENCODE} --model mini --max-unreadable-fraction 0.5",
        "--max-bad-share is now called --max-unreadable-fraction",
    ),
    (
        "train sd15 --optim.max_bad_steps=7",
        "train sd15 --optim.max-nonfinite-steps=7",
        "--optim.max-bad-steps is now called --optim.max-nonfinite-steps",
    ),
]


@pytest.mark.parametrize(("old", "new", "said"), ALIASES, ids=[said.partition(" is")[0] for *_, said in ALIASES])
def test_a_former_spelling_means_the_same_and_warns_once(old, new, said):
    with pytest.warns(FutureWarning) as found:
        former = parse(shlex.split(old))
    assert len(found) == 1 and str(found[0].message).startswith(said)
    assert former == parse(shlex.split(new))


def test_every_former_name_is_tested_here():
    declared = {
        names.former for options in map(options, COMMANDS) for option in options for names in option.former_names()
    }
    tested = {said.partition(" ")[0] for *_, said in ALIASES} - {"--uncond"}
    assert tested == declared


def options(command: str):
    return options_of(COMMANDS[command].kind())


@pytest.mark.parametrize("command", COMMANDS)
def test_former_names_are_not_in_the_help(command):
    words = help_of(command, COMMANDS[command].kind()).replace(",", " ").split()
    assert not {names.former for option in options(command) for names in option.former_names()} & {*words}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate --base mini --model mini", "--model and --base are the same option; give --model alone"),
        ("generate --fit=pad --reference-resize=crop", "--reference-resize and --fit are the same option; give "),
        ("generate --no-exact-outside-mask --preserve-unmasked", "--preserve-unmasked and --no-exact-outside-mask are"),
        ("generate --base a --base b", "--model and --base are the same option; give --model alone"),
    ],
)
def test_a_former_name_next_to_the_present_one_is_an_error(line, said, capsys):
    assert main(shlex.split(line)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "name", "meant"),
    [
        ("generate", "--exlore", "did you mean --grid?"),
        ("generate", "--layer", "did you mean --layer-scales?"),
        ("generate", "--pretrained-model-name-or-path", "did you mean --model?"),
        ("generate", "--ip-adapter-image-embeds", "did you mean --image-embeds?"),
        ("train", "--data.max-bad-shar", "did you mean --data.max-unreadable-fraction?"),
        ("batch", "--explore", "--grid is an option of generate"),
        ("convert", "--base", "--model is an option of generate, batch, encode, evaluate"),
    ],
)
def test_suggestions_are_present_names(command, name, meant):
    assert unknown_option(command, name, options(command)).endswith(meant)


def test_the_command_line_says_so_in_one_line(tmp_path, capsys):
    assert main(["generate", "--base", str(tmp_path), "--prompt", "x", "--out", str(tmp_path / "x.png")]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == "warning: --base is now called --model"
    assert error.startswith(f"ipadapter-jax: base model {tmp_path}: ")


def test_errors_name_present_options(tmp_path, capsys):
    line = ["generate", "--fit", "pad", "--prompt", "x", "--out", str(tmp_path / "x.png")]
    assert main(line) == 2
    assert "--reference-resize has no effect without an image prompt" in capsys.readouterr().err


OLD_RECIPE = """
import dataclasses
from ipadapter_jax.train.config import Data, Optim, Train

config = Train(data=Data(max_bad_share=0.5), optim=Optim(max_bad_steps=7))
config = dataclasses.replace(config, data=dataclasses.replace(config.data, resolution=64))
"""


def test_a_recipe_with_former_names_works_and_warns(tmp_path):
    recipe = tmp_path / "old.py"
    recipe.write_text(OLD_RECIPE)
    with pytest.warns(FutureWarning) as found:
        config = parse(["train", str(recipe)])
    assert [str(warning.message) for warning in found] == [
        "max_bad_share is now called max_unreadable_fraction",
        "max_bad_steps is now called max_nonfinite_steps",
    ]
    data = Data(max_unreadable_fraction=0.5, resolution=64)
    assert config == Train(data=data, optim=Optim(max_nonfinite_steps=7))


def test_a_field_of_a_recipe_is_replaced_by_its_former_name():
    with pytest.warns(FutureWarning, match="max_bad_share is now called max_unreadable_fraction"):
        data = dataclasses.replace(Data(resolution=64), max_bad_share=0.5)
    assert data == Data(max_unreadable_fraction=0.5, resolution=64)
    with pytest.raises(InputError, match="max_bad_share and max_unreadable_fraction are the same setting"):
        Data(max_bad_share=0.5, max_unreadable_fraction=0.5)


def test_renamed_settings_are_not_compared_when_a_run_is_resumed():
    """An old run's folder records them under no name."""
    recorded = json.dumps(identity(Train()))
    for name in {*former_names(Data).values(), *former_names(Optim).values()}:
        assert name not in recorded


def test_settings_of_an_older_folder_are_read_under_present_names(tmp_path):
    recorded = {"base": "mini", "fit": "pad", "layers": "style", "uncond": "zero pixels", "steps": 4}
    (tmp_path / "job.json").write_text(json.dumps(recorded))
    assert read_settings(LocalStore(tmp_path)) == {
        "model": "mini",
        "reference_resize": "pad",
        "layer_scales": "style",
        "uncond": "zero-pixels",
        "steps": 4,
    }


def test_every_renamed_setting_of_a_job_is_read(tmp_path):
    renamed = former_names(BatchOptions)
    (tmp_path / "job.json").write_text(json.dumps(dict.fromkeys(renamed, 1)))
    assert set(read_settings(LocalStore(tmp_path))) == {*renamed.values()}


@pytest.mark.usefixtures("single_device")
def test_a_folder_of_an_older_release_is_resumed(tmp_path, capsys):
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "b.png"):
        Image.open(CAT).save(source / name)
    line = ["batch", str(source), "--out", str(out), "--steps", "1", "--uncond", "zero-pixels"]
    assert main(line) == 0
    before = (out / "a.png").read_bytes()
    _write_as_before(out / "job.json")
    (out / "b.png").unlink()
    assert main(line) == 0
    assert (out / "a.png").read_bytes() == before and (out / "b.png").exists()
    capsys.readouterr()
    assert main([*line, "--layer-scales", "ease out"]) == 2
    assert 'layer_scales: "linear" -> "ease out"' in capsys.readouterr().err


def _write_as_before(job: Path) -> None:
    settings = json.loads(job.read_text())
    for former, name in former_names(BatchOptions).items():
        settings[former] = settings.pop(name)
    job.write_text(json.dumps(settings | {"uncond": "zero pixels"}))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_options_and_its_function(command):
    assert dataclasses.is_dataclass(COMMANDS[command].kind())
    assert callable(COMMANDS[command].run())
