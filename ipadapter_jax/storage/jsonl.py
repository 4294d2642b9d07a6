"""JSON Lines: lists that a user gives, and files that grow while a program runs and outlive a kill."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.atomic_files import write_atomically
from ipadapter_jax.storage.text_files import parse_json


class JsonLine(NamedTuple):
    """The number of a line, from 1, and its value, or what is wrong with it."""

    line: int
    value: object | InputError


def parse_json_lines(text: str, remedy: str, path: Path | None = None) -> Iterator[JsonLine]:
    """The values of all lines that are not empty, read when it is their turn. Errors name the line where `path` is
    given, which they name too, and end with the remedy."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = "the line" if path is None else f"{path}, line {number}"
        try:
            yield JsonLine(number, parse_json(line, place, remedy))
        except InputError as error:
            yield JsonLine(number, error)


class JsonlAppender:
    """A JSON Lines file that is appended to; each line is flushed immediately.

    `found` holds the values of the lines that were there already and that `keep` accepts. All other lines, also a
    partial last line of a killed run, are removed from the file. Raises InputError when it cannot be written.
    """

    def __init__(self, path: Path, keep: Callable[[dict], bool]):
        self._path = path
        with errors_naming(path):
            content = path.read_bytes() if path.exists() else b""
            lines = [line for line in _objects(content) if keep(line.value)]
            self.found = [line.value for line in lines]
            accepted = b"".join(line.content + b"\n" for line in lines)
            if accepted != content:
                write_atomically(path, accepted)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 closed by close()

    def add(self, value: Mapping[str, object]) -> None:
        with errors_naming(self._path):
            self._file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Waits until all lines are on the disk, so that they survive a crash of the machine."""
        with errors_naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with errors_naming(self._path):  # closing writes what is still in the buffer
            self._file.close()


def read_appended(path: Path) -> list[dict]:
    """The objects in a file of `JsonlAppender`. Another process may be writing it: a partial line is left out."""
    return [value for _, value in _objects(path.read_bytes())]


class _StoredLine(NamedTuple):
    content: bytes
    value: dict[str, object]


def _objects(content: bytes) -> Iterator[_StoredLine]:
    for line in content.splitlines():
        try:
            value = parse_json(line, "the line")
        except InputError:
            continue
        if isinstance(value, dict):
            yield _StoredLine(line, value)


@contextlib.contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: not written ({error.strerror}); make room or choose another folder") from None
