"""What is wrong with a command line is said in one line, exactly this one, and ends with exit code 2."""

import contextlib
import dataclasses
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ADAPTERS, forbid_sampling

from ipadapter_jax.cli import COMMANDS, main, parse
from ipadapter_jax.cli.option_types import options_of
from ipadapter_jax.errors import InputError
from ipadapter_jax.weights.bundled import FOLDER, REFERENCE

ROOT = Path(__file__).resolve().parents[2]

ALL = "generate, batch, train, encode, evaluate, convert, inspect, doctor"
RECIPES = "debug, mini, mini_plus, mini_unet, sd15, sd15_full, sd15_light, sd15_plus"
SAMPLERS = "ddim, ddpm, pndm, dpmsolver++, euler, euler_a, unipc, lcm"

WORDS = {
    # commands
    "generat --image x.png": "there is no command generat; did you mean generate?",
    "genrate": "there is no command genrate; did you mean generate?",
    "Train sd15": "there is no command Train; did you mean train?",
    "eval": "there is no command eval; did you mean evaluate?",
    "paint": f"there is no command paint; choose {ALL}",
    "--image x.png": f"--image stands before the command; name one first: {ALL}",
    "--versoin": "there is no option --versoin; did you mean --version?",
    "--hlep": "there is no option --hlep; did you mean --help?",
    "help": "there is no command help; ipadapter-jax --help shows all, ipadapter-jax COMMAND --help one",
    # options: slips, other spellings, other programs' names, beginnings
    "generate --stesp 4": "generate has no option --stesp; did you mean --steps?",
    "generate --stpes 4": "generate has no option --stpes; did you mean --steps?",
    "generate --imgae x.png": "generate has no option --imgae; did you mean --image?",
    "generate --gudance-scale 3": "generate has no option --gudance-scale; did you mean --guidance-scale?",
    "generate -steps 4": "generate has no option -steps; did you mean --steps?",
    "generate --Steps 4": "generate has no option --Steps; did you mean --steps?",
    "generate --numimages 4": "generate has no option --numimages; did you mean --num-images?",
    "generate --num-inference-steps 4": "generate has no option --num-inference-steps; did you mean --steps?",
    "generate --num_inference_steps=4": "generate has no option --num_inference_steps; did you mean --steps?",
    "generate --ip-adapter-scale 1": "generate has no option --ip-adapter-scale; did you mean --scale?",
    "generate --sampler ddim": "generate has no option --sampler; did you mean --scheduler?",
    "generate --cfg 3": "generate has no option --cfg; did you mean --guidance-scale?",
    "generate -o x.png": "generate has no option -o; did you mean --out?",
    "generate --neg ugly": "generate has no option --neg; did you mean --negative-prompt?",
    "generate --no-karas": "generate has no option --no-karas; did you mean --no-karras?",
    "generate --xyzzy 3": "generate has no option --xyzzy; ipadapter-jax generate --help lists them",
    "train sd15 --optim.lr 1": "train has no option --optim.lr; did you mean --optim.learning-rate?",
    "train sd15 --lr 1": "train has no option --lr; did you mean --optim.learning-rate?",
    "train sd15 --optim.learning-rat 1": (
        "train has no option --optim.learning-rat; did you mean --optim.learning-rate?"
    ),
    "train sd15 --learning-rate 1": "train has no option --learning-rate; did you mean --optim.learning-rate?",
    "train sd15 --model x": "train has no option --model; did you mean --model.base?",
    "train sd15 --data x": "train has no option --data; did you mean --data.path?",
    "train sd15 --log.no-tensorbord": "train has no option --log.no-tensorbord; did you mean --log.no-tensorboard?",
    # options of other commands
    "batch x --masks m.png --out y": "--masks is an option of generate, not of batch",
    "batch x --image m.png --out y": "--image is an option of generate, not of batch",
    "generate --batch-size 3": "--batch-size is an option of batch, encode, evaluate, not of generate",
    "doctor --json": "--json is an option of inspect, not of doctor",
    "encode --num_images 3": "--num-images is an option of generate, batch, evaluate, not of encode",
    "encode --Steps 3": "--steps is an option of generate, batch, train, evaluate, not of encode",
    "encode --NUM_IMAGES=3": "--num-images is an option of generate, batch, evaluate, not of encode",
    "encode --num-imgaes 3": (
        "encode has no option --num-imgaes; --num-images is an option of generate, batch, evaluate"
    ),
    "encode --stesp 3": "encode has no option --stesp; --steps is an option of generate, batch, train, evaluate",
    "encode --cfg 3": "encode has no option --cfg; --guidance-scale is an option of generate, batch, evaluate",
    "doctor --no_karras": "--no-karras is an option of generate, batch, evaluate, not of doctor",
    "generate --lr 1": "generate has no option --lr; --optim.learning-rate is an option of train",
    "generate --Optim.Learning_Rate 1": "--optim.learning-rate is an option of train, not of generate",
    # values
    "generate --scheduler ddmi": "--scheduler ddmi is not known; did you mean ddim?",
    "generate --scheduler DDIMScheduler": "--scheduler DDIMScheduler is not known; did you mean ddim?",
    "generate --scheduler dpmsolver": "--scheduler dpmsolver is not known; did you mean dpmsolver++?",
    "generate --scheduler dpm++": "--scheduler dpm++ is not known; did you mean dpmsolver++?",
    "generate --scheduler euler_ancestral": "--scheduler euler_ancestral is not known; did you mean euler_a?",
    "generate --scheduler heun": f"--scheduler heun is not known; choose {SAMPLERS}",
    "generate --dtype fp16": "--dtype fp16 is not known; did you mean float16?",
    "generate --dtype bf16": "--dtype bf16 is not known; did you mean bfloat16?",
    "generate --dtype Float32": "--dtype Float32 is not known; did you mean float32?",
    "generate --dtype int8": "--dtype int8 is not known; choose float32, bfloat16, float16",
    "train sd15 --model.adapter plos": "--model.adapter plos is not known; did you mean plus?",
    "generate --steps many": "--steps many is not a whole number",
    "generate --steps 4.5": "--steps 4.5 is not a whole number",
    "generate --scale strong": "--scale strong is not a number",
    "generate --prompt": "--prompt needs a value; one that begins with - is written --prompt=-...",
    "generate --prompt -cat": "--prompt needs a value; one that begins with - is written --prompt=-...",
    "generate --scheduler --steps 4": f"--scheduler needs a value, one of {SAMPLERS}",
    "generate --image --steps 4": "--image needs a value; one that begins with - is written --image=-...",
    "evaluate x --out y --fid-features a.npy": "--fid-features needs 2 values",
    "generate --out ''": "--out is empty; give a name, or leave it out",
    "generate --adapter ''": "--adapter is empty; give a name, or leave it out",
    "generate --prompt a cat": (
        "generate: cat belongs to no option; --prompt takes one value, put one of several words into quotes"
    ),
    "generate --karras true": (
        "generate: true belongs to no option; --karras takes no value, --no-karras turns it off"
    ),
    "generate --karras=yes": "--karras takes no value; --karras turns it on, --no-karras off",
    "generate cat.png": "generate: cat.png belongs to no option; ipadapter-jax generate --help lists them",
    "convert a b c": "convert: c belongs to no option; ipadapter-jax convert --help lists them",
    "generate --seed 1 --seed=2": "--seed is given more than once; give it once",
    "generate --karras --no-karras": "--karras is given more than once; give it once",
    # what is missing
    "generate --prompt cat": "generate needs --out; see ipadapter-jax generate --help",
    "convert a": "convert needs OUT; see ipadapter-jax convert --help",
    "batch": "batch needs SOURCE, --out; see ipadapter-jax batch --help",
    "train": (f"train: name a recipe first, one of {RECIPES} or a .py file: ipadapter-jax train sd15 ..."),
    "train sd16": f"recipe sd16: neither a .py file here nor one of {RECIPES}; did you mean sd15?",
    # home folders
    "generate --out ~nobody-here/x.png": (
        "~nobody-here/x.png: there is no home folder of nobody-here; write the path without ~nobody-here"
    ),
}


@pytest.mark.parametrize("line", WORDS)
def test_words(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"ipadapter-jax: {WORDS[line]}\n")
    assert not list(tmp_path.iterdir())


# Options that are right each by itself, and nothing is read: what stands first in the line of causes is said.
NO_MINII = (
    "base model minii: there is no such file or folder here, and it is not a Hub id (owner/name); did you mean mini?"
)
OPTIONS = {
    "--model minii": NO_MINII,
    "--model minii --image gone.png --steps 0": NO_MINII,
    "--model minii --adapter gone.safetensors": NO_MINII,
    f"--image a.png --layer-scales {'[' * 100_000}": (
        "--layer-scales: not JSON (nested more than 100 levels deep: too deep for any use); an example is "
        "'{\"mid\": 1}'"
    ),
    f"--image a.png --layer-scales {'[' * 150}{']' * 150}": (
        "--layer-scales: not JSON (nested more than 100 levels deep: too deep for any use); an example is "
        "'{\"mid\": 1}'"
    ),
    "--layer-scales {mid:1} --image a.png": (
        "--layer-scales: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); an "
        "example is '{\"mid\": 1}'"
    ),
    "--steps 0": "--steps 0 must be at least 1",
    "--num-images 0": "--num-images 0 must be at least 1",
    "--karras": "--karras has no effect with --scheduler ddim; it is for dpmsolver++, euler, unipc",
    "--eta 2": "--eta 2.0 must lie between 0 and 1",
    "--seed -1": "--seed -1: seeds of all images must lie between 0 and 2^32 - 1",
    "--mask-image m.png": "--mask-image needs --init-image",
    "--scale nan --image a.png": "--scale nan is not a finite number",
    "--scale-steps 1 nan --image a.png": "--scale-steps nan is not a finite number",
    # options without effect
    "--scale 0.5": "--scale has no effect without an image prompt: give --image or --image-embeds, or leave it out",
    "--layer-scales style": (
        "--layer-scales has no effect without an image prompt: give --image or --image-embeds, or leave it out"
    ),
    "--reference-resize pad": (
        "--reference-resize has no effect without an image prompt: give --image or --image-embeds, or leave it out"
    ),
    "--scale-start 0.5": (
        "--scale-start has no effect without an image prompt: give --image or --image-embeds, or leave it out"
    ),
    "--scale-steps 1 0": (
        "--scale-steps has no effect without an image prompt: give --image or --image-embeds, or leave it out"
    ),
    "--uncond zeros": "--uncond has no effect without an image prompt: give --image or --image-embeds, or leave it out",
    "--negative-prompt ugly --guidance-scale 1": (
        "--negative-prompt has no effect without guidance: give a --guidance-scale above 1, or leave it out"
    ),
}


@pytest.mark.parametrize("line", OPTIONS, ids=lambda line: line[:60])
def test_options(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--out", "x.png", *line.split()]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"ipadapter-jax: {OPTIONS[line]}\n")
    assert not list(tmp_path.iterdir())


# Paths and numbers that are found wrong with the files at hand, before weights are read: (line, what is said).
FILES = [
    (
        "generate --out x.png --image a.png --adapter runs/mine/adaptr.safetensors",
        "adapter runs/mine/adaptr.safetensors: there is no such file or folder here; runs/mine exists and holds "
        "adapter.safetensors",
    ),
    (
        "inspect runs/mine/adaptr.safetensors",
        "weights runs/mine/adaptr.safetensors: there is no such file or folder here; runs/mine exists and holds "
        "adapter.safetensors",
    ),
    (
        "inspect minii",
        "weights minii: there is no such file or folder here, and it is not a Hub id (owner/name); did you mean mini?",
    ),
    (
        "convert mini rv.safetensor",
        "rv.safetensor: nothing is written as .safetensor (did you mean rv.safetensors?); an adapter is saved as "
        ".safetensors or .bin, a base model as one .safetensors or as a folder, whose name has no such ending",
    ),
    ("convert mini a.png", "a.png exists; choose another name, or remove it first"),
    ("generate --out x.png --width 65", "--width 65 is not a multiple of 8; the nearest size is 64"),
    (
        "generate --out x.png --width 1000000 --height 1000000",
        r"an image of 1000000 x 1000000 pixels would need at least 474,000\.0 GB of memory "
        r"\(474,000,000,000,000 bytes\), and there are [\d.,]+ GB; choose a smaller size",
    ),
    (
        "generate --out x.png --steps 1001",
        "--steps 1001 must be a whole number between 1 and 1000, the training timesteps",
    ),
    (
        "generate --out x.png --scheduler lcm --steps 60",
        "--steps 60: the scheduler lcm makes at most 50",
    ),
    (
        "generate --out x.png --image a.png --clip-skip 99",
        "--clip-skip 99 must be a whole number of layers to leave out, 0 to 2",
    ),
    (
        "generate --out x.png --image a.png --layer-scales stile",
        "--layer-scales: no preset 'stile'; did you mean 'style'?",
    ),
    (
        "generate --out x.png --image a.png --scale-start 0.9 --scale-end 0.1",
        "--scale-start: start=0.9 and end=0.1 must be parts of the run, 0 <= start < end <= 1",
    ),
    (
        "generate --out x.png --init-image a.png --strength 0.001",
        "--strength 0.001 of --steps 50 leaves no step to make: give at most 1, and here at least 0.02",
    ),
    ("generate --out x.png --extract-ema", "--extract-ema is for a checkpoint of one file; mini is a folder"),
    (
        "generate --out x.png --model runs/mine/adapter.safetensors --prompt x",
        ".*runs/mine/adapter.safetensors.*an IP-Adapter.*give it as the adapter \\(--adapter\\).*",
    ),
    (
        "encode --model minii --image-encoder mini --data . --out y",
        NO_MINII,
    ),
    (
        "encode --model mini --image-encoder mini --data nowhere --out y",
        "nowhere: no such file or folder; check the spelling, or give the data's full path",
    ),
    (
        "train mini --data.path nowhere --model.base minii",
        NO_MINII,
    ),
]


@pytest.mark.parametrize(("line", "told"), FILES, ids=[line for line, _ in FILES])
def test_files(line, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    forbid_sampling(monkeypatch)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    shutil.copy(FOLDER / "ip-adapter_mini.safetensors", tmp_path / "runs" / "mine" / "adapter.safetensors")
    shutil.copy(REFERENCE, tmp_path / "a.png")
    before = sorted(tmp_path.rglob("*"))
    assert main(shlex.split(line)) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    said = shown.err.removeprefix("ipadapter-jax: ").removesuffix("\n")
    assert said == told or re.fullmatch(told, said), said
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_advises_options_that_there_are(capsys):
    assert main(["inspect", str(FOLDER / "ip-adapter_mini.safetensors")]) == 0
    assert "give it as the adapter (--adapter)" in capsys.readouterr().out


def test_words_that_are_right():
    line = "generate --out=x.png --num_images 2 --scale -0.5 --image a.png b.png --prompt '- a cat' --vae None"
    found = parse([*shlex.split(line), "--adapter", "a.bin"])
    assert (found.num_images, found.scale, found.image) == (2, -0.5, ("a.png", "b.png"))
    assert (found.prompt, found.vae, found.steps, found.karras) == ("- a cat", None, 50, False)
    found = parse(shlex.split("generate --zero-snr --prompt=--cat --steps 007 --out x.png"))
    assert (found.zero_snr, found.prompt, found.steps) == (True, "--cat", 7)
    found = parse(["convert", "--flax", "--", "-source", "out"])
    assert (found.source, found.out.name, found.flax) == ("-source", "out", True)


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sd15").mkdir()
    found = parse(shlex.split("generate --out ~/x.png --image ~/a.png --model ~/sd15 --prompt '~/x' --adapter ~/a.bin"))
    assert found.out == tmp_path / "x.png" and found.model == f"{tmp_path}/sd15" and found.prompt == "~/x"


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["--version"], ["-V"]])
def test_words_without_a_command(words, capsys):
    assert main(words) == (0 if words else 2)
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.startswith("ipadapter-jax 0." if "V" in "".join(words).upper() else "usage: ")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_shows_every_option_once(name, word, capsys):
    assert main([name, word]) == 0
    shown = capsys.readouterr().out
    entries = [line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line[2:3].strip()]
    names = [o.opposite if o.kind is bool and o.default else o.name for o in options_of(COMMANDS[name].kind())]
    assert sorted(entries) == sorted([*names, "-h,"])
    assert shown.startswith(f"usage: ipadapter-jax {name}")
    assert max(map(len, shown.splitlines())) <= 120


def test_help_of_a_recipe_shows_its_values(capsys):
    assert main(["train", "sd15_light", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: ipadapter-jax train sd15_light" in shown
    assert "(default: runs/sd15_light)" in " ".join(shown.split())


def test_what_needs_no_networks_waits_for_none():
    """In a process of its own: jax alone takes seconds to import."""
    heavy = ("jax", "flax", "transformers", "orbax", "grain", "matplotlib", "tensorboardX", "pyarrow")
    files = ["mini", "mini-plus", str(ADAPTERS / "ip-adapter-plus_tiny.bin")]
    lines = [["inspect", file] for file in files]
    lines += [["--help"], ["--version"], ["generate", "--help"], ["train", "sd15", "--help"], ["generat"]]
    lines += [["batch", "x", "--masks", "m.png"], ["generate", "--out", "x.jpg"]]
    code = f"""if True:
        import sys
        from ipadapter_jax.cli import main
        codes = [main(line) for line in {lines}]
        assert codes == [0, 0, 0, 0, 0, 0, 0, 2, 2, 2], codes
        assert not set({heavy}) & set(sys.modules), set({heavy}) & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_option_has_a_type_that_can_be_read():
    for command in COMMANDS.values():
        for option in options_of(command.kind()):
            assert option.kind in (bool, int, float, str) or dataclasses.is_dataclass(option.kind) or option.is_place


NOBODY = """if True:
    import pwd, sys
    def nobody(*_):
        raise KeyError("no such entry")
    pwd.getpwuid = pwd.getpwnam = nobody
    from ipadapter_jax.cli import main
    for line in LINES:
        print(main(line), flush=True)
"""


def test_a_user_without_a_home_folder(tmp_path):
    """As in a container that runs under a number that nobody has: no HOME, and no entry in passwd."""
    image = tmp_path / "a.png"
    image.write_bytes(REFERENCE.read_bytes())
    lines = [
        ["doctor"],
        ["generate", "--image", str(image), "--out", str(tmp_path / "out.png"), "--steps", "1"],
        ["generate", "--image", "~/a.png", "--out", str(tmp_path / "no.png")],
        ["generate", "--model", "owner/name", "--prompt", "x", "--out", str(tmp_path / "no.png")],
    ]
    apart = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in apart}
    words = [sys.executable, "-c", NOBODY.replace("LINES", repr(lines))]
    environment |= {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}  # one compiles sooner than four
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert [line for line in shown if line in ("0", "1", "2")] == ["0", "0", "2", "2"], done.stderr
    assert f"{tmp_path}/out.png" in shown
    assert [line.strip() for line in shown if "no home folder" in line] == [
        "compiled programs: off, this user has no home folder; name another place with XDG_CACHE_HOME",
        "Hugging Face Hub: off, this user has no home folder; name another place with HF_HOME",
    ]
    errors = [line for line in done.stderr.splitlines() if line.startswith("ipadapter-jax: ")]
    assert errors == [
        "ipadapter-jax: ~/a.png: there is no home folder (HOME is not set, and this user has none); write the path "
        "without ~",
        "ipadapter-jax: base model owner/name: not a path on this machine, and it cannot be downloaded, as this user "
        "has no home folder to store it in; name a folder with HF_HOME",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "out.png"}  # no folder that is called ~


ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C.UTF-8"},
]


@pytest.mark.parametrize("environment", ENCODINGS, ids=lambda environment: next(iter(environment.values())))
def test_a_name_in_any_encoding(environment, tmp_path):
    """The file's own bytes come out, whatever the terminal takes."""
    words = [sys.executable, "-m", "ipadapter_jax.cli", "train", b"b\xff.py"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(words, capture_output=True, cwd=tmp_path, env=settings)
    told = f": neither a .py file here nor one of {RECIPES}\n".encode()
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"ipadapter-jax: recipe b\xff.py" + told)


LONG = {
    "batch": "batch list.csv --out made",
    "evaluate": "evaluate data --adapter mini --out made",
    "encode": "encode --model mini --image-encoder mini --data . --out made",
}


@pytest.mark.parametrize("command", LONG)
@pytest.mark.parametrize(
    ("error", "code", "told"), [(InputError("no"), 2, "no"), (KeyboardInterrupt(), 130, "interrupted")]
)
def test_reports_of_long_jobs_appear_at_once(command, error, code, told, monkeypatch, capsys):
    def job(_) -> int:
        logging.getLogger("ipadapter_jax").info("a report")
        assert capsys.readouterr().err == "a report\n"
        raise error

    monkeypatch.setattr(f"ipadapter_jax.cli.run.{command}.{command}", job)
    assert main(shlex.split(LONG[command])) == code
    assert capsys.readouterr().err == f"ipadapter-jax: {told}\n"


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt(), RuntimeError("broken"), None])
def test_reports_of_short_jobs(error, monkeypatch, capsys):
    """When they are done; of those that fail only what was to warn."""

    def job(_) -> int:
        log = logging.getLogger("ipadapter_jax")
        log.info("a report")
        log.warning("a warning")
        if error is not None:
            raise error
        return 0

    monkeypatch.setattr("ipadapter_jax.cli.run.doctor.doctor", job)
    with pytest.raises(RuntimeError) if isinstance(error, RuntimeError) else contextlib.nullcontext():
        main(["doctor"])
    shown = capsys.readouterr().err.splitlines()
    assert shown[:2] == ["a report", "a warning"] if error is None else shown[0] == "a warning"
    assert ("a report" in shown) == (error is None)
