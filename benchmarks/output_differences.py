"""Compares two folders of what the same jobs wrote, file by file: by pixels, tensors, lines of JSON, or else bytes."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

# What is not compared, and why. Patterns are of paths below the folder of outputs. Of PNGs, the pixels are compared:
# their text chunks hold the names of options and of releases.
IGNORED_FILES = {
    "*/lock": "the process that held the folder",
    "*/README.md": "the model card, a text for people",
    "*/checkpoints/*": "Orbax names its files at random; losses and adapter come from the same state",
    "*/tensorboard/*": "with times of the day; metrics.jsonl has the same numbers",
    "batch/images/job.json*": "names of options, and versions",
}
IGNORED_FIELDS = {  # of a line of JSON, and of the metadata of safetensors
    "images_per_second": "a time",
    "ipadapter_jax": "the version of the package",
}
FIGURES = {"*/maps.png", "*/samples/*.png"}  # their labels are words: the first 48 of every 248 lines of pixels


class Row(NamedTuple):
    """Of the table: how many files a job wrote, and the first difference or ''."""

    job: str
    files: int
    difference: str


def compare(before: Path, after: Path) -> list[Row]:
    """A row for each job, by two folders of outputs."""
    jobs = sorted({path.name for folder in (before, after) for path in folder.iterdir()})
    return [compare_job(job, before, after) for job in jobs]


def compare_job(job: str, before: Path, after: Path) -> Row:
    old, new = files_of(before, job), files_of(after, job)
    for name in sorted(old | new):
        if name not in old & new:
            return Row(job, len(old), f"{name}: only {'before' if name in old else 'after'}")
        if found := difference(parts(before / name, name), parts(after / name, name)):
            return Row(job, len(old), f"{name}: {found}")
    codes = [(folder / job / "exit_code").read_text() for folder in (before, after)]
    return Row(job, len(old), "" if codes == ["0", "0"] else f"in both: exit code {codes[0]}")


def files_of(folder: Path, job: str) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in (folder / job).rglob("*") if path.is_file()}
    return {name for name in names if not any(fnmatch(name, pattern) for pattern in IGNORED_FILES)}


def parts(path: Path, name: str) -> dict[str, bytes]:
    """What is compared of a file, by a label for messages."""
    content = path.read_bytes()
    if path.suffix == ".png":
        with Image.open(path) as image:
            pixels = np.asarray(image)
        if any(fnmatch(name, pattern) for pattern in FIGURES):
            pixels = pixels[np.arange(len(pixels)) % 248 >= 48]
        return {f"pixels {pixels.shape}": pixels.tobytes()}
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        return {f"line {number}": json.dumps(_compared(line)).encode() for number, line in enumerate(lines, 1)}
    if path.suffix == ".safetensors":
        length = 8 + int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8:length]), content[length:]
        header["__metadata__"] = _compared(header.get("__metadata__", {}))
        tensors = {tensor: about["data_offsets"] for tensor, about in header.items() if tensor != "__metadata__"}
        return {"header": json.dumps(header).encode()} | {name: data[a:b] for name, (a, b) in tensors.items()}
    return {"content": content}


def _compared(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name not in IGNORED_FIELDS}


def difference(before: dict[str, bytes], after: dict[str, bytes]) -> str:
    """The first difference in words, '' where there is none."""
    for label in before | after:
        if label not in before or label not in after:
            return f"{label} only {'before' if label in before else 'after'}"
        old, new = before[label], after[label]
        if old != new:
            first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            return f"{label}, byte {first}: {old[first : first + 40]!r} before, {new[first : first + 40]!r} after"
    return ""


def table(rows: list[Row]) -> str:
    """A line for each job, and one for their sum."""
    width = max(len(row.job) for row in rows)
    lines = [f"{row.job:{width}} {row.files:4} files  {row.difference or 'equal'}" for row in rows]
    different = sum(bool(row.difference) for row in rows)
    return "\n".join([*lines, f"{len(rows)} jobs, {sum(row.files for row in rows)} files; {different} jobs differ"])
