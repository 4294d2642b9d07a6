"""README.md and the documents name only files, modules, commands and options that exist."""

import importlib
import importlib.util
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ipadapter_jax.cli.commands import COMMANDS
from ipadapter_jax.cli.option_types import options_of

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
MODULES = ("benchmarks", "examples", "experiments", "ipadapter_jax", "scripts", "tests")
FOLDERS = (*MODULES, "assets", "configs", "docs")
# A document about the package leaves out `ipadapter_jax/`, one about the tests `tests/`.
PLACES = (ROOT, ROOT / "ipadapter_jax", ROOT / "tests", ROOT / "tests" / "data" / "oracles")
SHORT = {path.name for place in PLACES[1:] for path in place.iterdir() if path.is_dir()}
# Files of the authors' code and of OpenAI's CLIP, and an example below.
FOREIGN_FILES = {"tutorial_train.py", "tutorial_train_plus.py", "simple_tokenizer.py", "file.py"}
# What commands of the guide write.
WRITTEN = {"docs/guide/seen.png", "docs/guide/star.safetensors"}
SCRIPTS = ("benchmarks.sample", "experiments.mini.build", "tests.fault_injection.all")  # one of each folder
# Options of SLURM and XLA.
EXTERNAL = {"--nodes", "--gpus-per-node", "--xla_gpu_deterministic_ops", "--xla_gpu_dot_merger_threshold_mb"}


@cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@cache
def code_of(document: str) -> tuple[str, ...]:
    """The lines of code blocks, those that end in a backslash joined, and the code spans of a document."""
    fenced = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
    text = text_of(document).replace("\\\n", " ")
    lines = [line for block in fenced.findall(text) for line in block.splitlines()]
    spans = re.findall(r"`([^`]+)`", fenced.sub("", text))
    return (*lines, *(" ".join(span.split()) for span in spans))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_images_lead_to_files(document: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)|src=\"([^\"]+)\"", text_of(document))
    here = [target for pair in links for target in pair if target and not target.startswith("http")]
    missing = [target for target in here if not ((ROOT / document).parent / target).exists()]
    assert not missing, f"{document} links to {missing}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    """Paths in code that begin with a folder of the repository, of the package or of the tests."""
    missing = []
    for line in code_of(document):
        for path in re.findall(r"(?<![\w./~<-])([\w-]+/[\w./-]*[\w/])(?![\w*<])", line):
            first = path.split("/")[0]
            named = first in FOLDERS or (first in SHORT and path.endswith((".py", "/")))
            if named and path not in WRITTEN and not any((place / path).exists() for place in PLACES):
                missing.append(path)
    assert not missing, f"{document} names {missing}"


def test_architecture_names_files_of_each_folder() -> None:
    """Under the heading of a folder of the package, `file.py` lies in that folder or below it."""
    sections = re.split(r"^### (\w+)/$", text_of("docs/architecture.md"), flags=re.MULTILINE)[1:]
    folders = {path.name: path for path in PLACES[1].iterdir() if (path / "__init__.py").exists()}
    described = dict(zip(sections[::2], sections[1::2], strict=True))
    assert set(described) | {"testing"} == set(folders)
    missing = []
    for name, text in described.items():
        there = {str(path.relative_to(folders[name])) for path in folders[name].rglob("*.py")}
        there |= {path.rpartition("/")[2] for path in there}
        text = text.split("\n## ")[0]
        missing += [
            f"{name}/{file}" for file in re.findall(r"`([\w/]+\.py)`", text) if file not in there and "/" not in file
        ]
    assert not missing, f"docs/architecture.md names {missing}"


def test_changes_name_what_the_files_have() -> None:
    """In each row of "Where to make a change", a file that the row names has each function, class or field it names."""
    table = text_of("docs/architecture.md").split("## Where to make a change")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!change |-)([^|]+) \| ([^|]+) \|", table, flags=re.MULTILINE)
    missing, looked_up = [], 0
    for change, steps in rows:
        spans = re.findall(r"`([^`]+)`", steps)
        paths = [PLACES[1] / span for span in spans if "/" in span]
        sources = "".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
        names = [span for span in spans if re.fullmatch(r"[A-Za-z_]+", span)]
        looked_up += len(names)
        missing += [f"{change}: {name}" for name in names if not re.search(rf"\b{name}\b", sources)]
    assert not missing, f"docs/architecture.md names {missing}"
    assert looked_up > 30


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_modules_exist(document: str) -> None:
    """`python -m a.b`, `from a.b import c` and `a.b.c` of this repository."""
    missing = []
    for line in code_of(document):
        names = re.findall(r"python(?:3\.\d+|3)? -m ([\w.]+)", line)
        for module, imported in re.findall(r"^\s*from ([\w.]+) import ([\w, ]+)", line):
            names += [f"{module}.{name}" for name in re.findall(r"\w+", imported)]
        names += re.findall(r"^(ipadapter_jax(?:\.\w+)+)", line)
        missing += [name for name in names if name.split(".")[0] in MODULES and not is_importable(name)]
    assert not missing, f"{document} names {missing}"


def is_importable(name: str) -> bool:
    """Whether a.b.c is a module, or something inside the module a.b."""
    try:
        if importlib.util.find_spec(name):
            return True
    except ModuleNotFoundError:
        pass
    parent, _, attribute = name.rpartition(".")
    return bool(parent) and is_importable(parent) and hasattr(importlib.import_module(parent), attribute)


@cache
def options_by_command() -> dict[str, set[str]]:
    """Every option of every command, except the hidden old names."""
    options = {name: options_of(command.kind()) for name, command in COMMANDS.items()}
    return {
        name: {word for option in found for word in (option.name, option.opposite)} for name, found in options.items()
    }


def named_options(document: str) -> Iterator[tuple[str, set[str]]]:
    """Each option in the code of a document, with the options that may stand in its place."""
    known = options_by_command()
    anywhere = {"--help", "--version", "--debug"} | EXTERNAL
    every = set().union(*known.values(), *(options_of_script(script) for script in SCRIPTS)) | anywhere
    for line in code_of(document):
        line = line.split("#")[0]
        programs = re.split(r"(?=ipadapter-jax |python[\d.]* |pip |make |train_\w+\.sh )", line)
        for words in programs:
            found = re.findall(r"(?<![\w-])--[a-z][\w.-]*", words)
            allowed = every
            if command := re.match(r"ipadapter-jax (\w+)", words):
                allowed = known[command[1]] | anywhere if command[1] in known else set()
            elif script := re.match(r"python[\d.]* -m ([\w.]+)", words):
                if script[1].split(".")[0] not in MODULES:
                    continue
                allowed = options_of_script(script[1])
            elif re.match(r"pip |make |python", words):
                continue
            yield from ((option, allowed) for option in found)


@cache
def options_of_script(module: str) -> set[str]:
    """The arguments and fields with a type in the sources of a script's folder: those that tyro makes options of, and
    others."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    sources = [path.read_text(encoding="utf-8") for path in Path(spec.origin).parent.glob("*.py")]
    words = {word for source in sources for word in re.findall(r"\b(\w+): ", source)}
    spelled_out = {option for source in sources for option in re.findall(r'"(--[\w-]+)"', source)}
    return {f"--{word.replace('_', '-')}" for word in words} | spelled_out | {"--help"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_options_exist(document: str) -> None:
    missing = sorted({option for option, allowed in named_options(document) if option not in allowed})
    assert not missing, f"{document} names {missing}"


def test_options_are_looked_up() -> None:
    """The tests above find something, and would notice an option that does not exist."""
    assert len(list(named_options("README.md"))) > 60
    assert "--scale" in options_by_command()["generate"]
    assert "--no-such-option" not in set().union(*options_by_command().values())
    assert is_importable("ipadapter_jax.StableDiffusion") and not is_importable("benchmarks.no_such_module")


def comments_and_docstrings(path: Path) -> Iterator[str]:
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string.endswith('"""')):
                yield token.string


def test_comments_name_files_that_exist() -> None:
    """`unet.py` and `models/unet.py` in a comment or docstring: a file of the repository ends in these parts."""
    sources = [path for folder in (*MODULES, "configs") for path in sorted((ROOT / folder).rglob("*.py"))]
    parts = [path.relative_to(ROOT).parts for path in sources]
    known = {"/".join(names[first:]) for names in parts for first in range(len(names))} | FOREIGN_FILES
    missing = []
    for path in sources:
        for text in comments_and_docstrings(path):
            found = re.findall(r"(?<![\w/.*-])([\w/]*\w\.py)\b", text)
            missing += [f"{path.relative_to(ROOT)}: {name}" for name in found if name not in known]
    assert not missing, "\n".join(missing)
