"""A store: the named files of a run, a job or a feature cache, wherever they lie.

What a store promises: a file appears under its name only when it is whole, one process at a time holds a lock, and
files that a killed process has left partly written can be removed. A folder of this machine keeps these promises by
renaming and by the kernel's locks.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ipadapter_jax.storage.atomic_files import atomic_replace, remove_partial_files, sha256, write_atomically
from ipadapter_jax.storage.file_lock import shard_lock
from ipadapter_jax.storage.jsonl import JsonlAppender
from ipadapter_jax.storage.text_files import read_bytes, read_json_object


def _nobody(name: str) -> bool:
    return False


class Store(Protocol):
    """Files by name. All methods raise InputError that names the file, the reason and the remedy."""

    def path(self, name: str) -> Path:
        """Where a file lies: for messages, and for libraries that open a file by its path."""
        ...

    def names(self) -> set[str]:
        """The names of all files that are there."""
        ...

    def inside(self, name: str) -> "Store":
        """The files in a folder of this store."""
        ...

    def size(self, name: str) -> int | None:
        """The bytes of a file; None when it is not there."""
        ...

    def sha256(self, name: str) -> str:
        """The digest of a file's content, in hexadecimal."""
        ...

    def read(self, name: str, remedy: str = "check the file") -> bytes:
        """The content of a small file."""
        ...

    def read_json_object(self, name: str) -> dict[str, object]:
        """The JSON object in a file of settings."""
        ...

    def write(self, name: str, content: bytes | Iterable[bytes | memoryview]) -> None:
        """Writes a file: a reader sees the old content or the new content, never a part."""
        ...

    def replace(self, name: str) -> AbstractContextManager[Path]:
        """A temporary file for the block to fill. It gets its name when the block ends, and is removed when the block
        fails."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        ...

    def append_jsonl(self, name: str, keep: Callable[[dict], bool]) -> JsonlAppender:
        """Opens a JSON Lines file to append to it, with those of its lines that `keep` accepts."""
        ...

    def lock(self, shard: tuple[int, int]) -> AbstractContextManager[None]:
        """Holds the work of process p of P, shard (p, P), and makes the store's folder."""
        ...

    def remove_partial_files(self, mine: Callable[[str], bool] = _nobody) -> None:
        """Removes what killed processes have left partly written. `mine`: whether only the caller, who holds the lock,
        writes files of a name."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A folder of this machine, or one that it has mounted. Its text is the folder's path."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def path(self, name: str) -> Path:
        return self.folder / name

    def names(self) -> set[str]:
        return set(os.listdir(self.folder))

    def inside(self, name: str) -> "LocalStore":
        return LocalStore(self.path(name))

    def size(self, name: str) -> int | None:
        path = self.path(name)
        return path.stat().st_size if path.is_file() else None

    def sha256(self, name: str) -> str:
        return sha256(self.path(name))

    def read(self, name: str, remedy: str = "check the file") -> bytes:
        return read_bytes(self.path(name), remedy=remedy)

    def read_json_object(self, name: str) -> dict[str, object]:
        return read_json_object(self.path(name))

    def write(self, name: str, content: bytes | Iterable[bytes | memoryview]) -> None:
        write_atomically(self.path(name), content)

    def replace(self, name: str) -> AbstractContextManager[Path]:
        return atomic_replace(self.path(name))

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def append_jsonl(self, name: str, keep: Callable[[dict], bool]) -> JsonlAppender:
        return JsonlAppender(self.path(name), keep)

    def lock(self, shard: tuple[int, int]) -> AbstractContextManager[None]:
        return shard_lock(self.folder, shard)

    def remove_partial_files(self, mine: Callable[[str], bool] = _nobody) -> None:
        remove_partial_files(self.folder, mine)
