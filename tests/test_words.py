"""Identifiers and documents use the field's terms: docs/glossary.md defines our own, and these words are not used.

A word belongs here only if it has no legitimate use. Keys of files on disk and quotations are in EXCEPTIONS.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("ipadapter_jax", "benchmarks", "examples", "scripts")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "Makefile", "docs/*.md", "configs/*.py")

# What to write instead. Identifiers are compared word by word: `bad_pictures` and `BadPictures` hold "pictures".
IN_IDENTIFIERS = {
    "picture": "image",
    "pictures": "images",
    "learnt": "trainable, learned",
    "colour": "color",
    "colours": "colors",
    "grey": "gray",
    "centre": "center",
    "optimiser": "optimizer",
    "licence": "license",
    "floors": "layers",
    "torture": "fault_injection",
    "kept program": "cached program",
    "own row": "batch sharding",
    "own rows": "batch sharding",
}
IN_PROSE = {
    r"pictures?": "image",
    r"learnt": "learned, trained",
    r"colours?": "color",
    r"grey": "gray",
    r"centres?|centred": "center",
    r"\w*(?:optimis|normalis|generalis|initialis|recognis|materialis)\w*": "-ize",
    r"licences?": "license",
    r"neighbours?|behaviours?": "-or",
    r"(?<!there )(?:is|are|was|were) no(?! longer| more)": "is not a",
    r"not to be had": "could not be downloaded, is not available",
    r"kept programs?": "cached programs",
    r"own rows?": "own samples",
    r"floors": "layers",
    r"to the bit": "bit-exact",
    r"the same command goes on": "rerun the same command to resume",
    r"paint(?:s|ed|ing)?": "generate, inpainting",
    r"in one go": "fused, in one call",
    r"by itself": "independently, automatically",
    r"torture\w*": "fault injection",
}
# (file, text): why it stays. The text is removed before the words are looked for.
EXCEPTIONS = {
    ("docs/evaluation.md", "pictures.csv"): "a file's name on disk",
    ("docs/architecture.md", "pictures.csv"): "a file's name on disk",
    ("docs/architecture.md", "`picture`"): "a key of a file on disk",
    ("docs/mini.md", "`centre`"): "a value in the data set",
    ("docs/mini.md", "`grey`"): "a value in the data set",
    ("docs/mini.md", "things` (shape, colour"): "a key of the data set",
    ("docs/results.md", "colour"): "the name of an attribute of the data set in tables",
}


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    """Names that a file defines: modules, classes, functions, arguments, variables and attributes."""
    yield 1, path.stem
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def words_of(identifier: str) -> str:
    """BadPictures, bad_pictures -> "bad pictures"."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)).lower()


def test_identifiers() -> None:
    found = set()
    for path in (path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))):
        name = str(path.relative_to(ROOT))
        for line, identifier in identifiers(path):
            for word, instead in IN_IDENTIFIERS.items():
                used = f" {word} " in f" {words_of(identifier)} "
                if used:
                    found.add(f"{name}:{line}: {identifier}: say {instead}")
    assert not found, "\n".join(sorted(found))


def test_documents() -> None:
    found = []
    for path in (path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))):
        name = str(path.relative_to(ROOT))
        text = path.read_text(encoding="utf-8")
        for file, exception in EXCEPTIONS:
            text = text.replace(exception, "") if file == name else text
        for pattern, instead in IN_PROSE.items():
            for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
                line = text[: match.start()].count("\n") + 1
                found.append(f"{name}:{line}: {match[0].strip()!r}: say {instead}")
    assert not found, "\n".join(found)


def test_exceptions_are_needed() -> None:
    for file, exception in EXCEPTIONS:
        assert exception in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {exception!r} any more"
