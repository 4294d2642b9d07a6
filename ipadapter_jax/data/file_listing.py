"""The files of a data set: finds, sorts, reads and identifies them."""

import glob
import hashlib
import os
import re
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.data.packed_strings import PackedStrings
from ipadapter_jax.data.types import DataIdentity
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.strings import replace_surrogates
from ipadapter_jax.storage.nearby_paths import nearby_hint
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.storage.text_files import read_bytes

MAX_TEXT = 16 << 20  # bytes of a caption
MAX_BYTES = 256 << 20  # no encoded image is larger; a wrong file must not fill the memory of every worker


class FileSize(NamedTuple):
    """The name of a file in a data set, and its bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class FileListing:
    """Files below a folder: `names` are relative to `root`, with forward slashes."""

    root: Path
    names: PackedStrings

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def matching(self, pattern: re.Pattern[str]) -> "FileListing":
        return FileListing(self.root, PackedStrings(name for name in self.names if pattern.search(name)))

    def identity(self, kind: str, records: int) -> DataIdentity:
        """The identity of a source, as `RecordSource.identity` describes it."""
        return {"kind": kind, "records": records, "files": len(self), "digest": digest(self._sizes())}

    def _sizes(self) -> Iterator[FileSize]:
        return (FileSize(name, size(os.path.join(self.root, name))) for name in self.names)


def find_files(path: str) -> FileListing:
    """All files of a folder and its folders, one file, or those that a pattern such as "train/*.tar" matches; sorted.

    Hidden files are left out, links are followed. Raises InputError: a URL, nothing there, an empty folder.
    """
    if re.match(r"[A-Za-z][\w+.-]*://", path):
        raise InputError(f"{path} is a URL; download the data first and give the local path")
    path = expand_home(path)
    if os.path.isdir(path):
        root, names = path, _scan(path)
    elif os.path.exists(path):
        root, names = os.path.split(path)
        names = [names]
    elif glob.has_magic(path):
        # The folders before the first wildcard, so that "*/a.tar" and "b/a.tar" keep their names apart.
        root = re.split(r"[^/]*[*?[]", path, maxsplit=1)[0]
        names = [os.path.relpath(name, root or ".") for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
    else:
        raise InputError(
            f"{path}: no such file or folder; check the spelling, or give the data's full path{nearby_hint(path)}"
        )
    if not names:
        raise InputError(f"{path}: no files here; give a folder of images or shards")
    return FileListing(Path(root), PackedStrings(sorted(names)))


def check_exists(path: str) -> None:
    """Raises InputError, as `find_files` does, if nothing exists at a path. Does not list what exists."""
    place = expand_home(path)
    if not os.path.exists(place) and not glob.has_magic(place):
        find_files(path)


def read_file(path: str, key: str, is_text: bool = False) -> bytes:
    """The whole file of an image or a caption. Raises InputError naming the key when it cannot be read, is not a
    regular file or is far too large."""
    check_size(size(path), key, is_text)
    shown = f"{key}: {replace_surrogates(path)}"
    return read_bytes(path, MAX_TEXT if is_text else MAX_BYTES, "check that it is there", shown=shown)


def check_size(size: int, key: str, is_text: bool = False) -> None:
    most, what = (MAX_TEXT, "caption") if is_text else (MAX_BYTES, "image")
    if size > most:
        raise InputError(f"{key}: {size >> 20} MiB are far too many for a {what}; at most {most >> 20}")


def size(path: str) -> int:
    """Bytes of a file; -1 if it does not exist."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def allow_open_files(count: int) -> None:
    """Allows this process to open `count` more files: a soft limit of 1024 is usual."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024 if hard == resource.RLIM_INFINITY else min(count + 1024, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def digest(sizes: Iterable[FileSize]) -> str:
    """sha256 over sorted names and sizes."""
    lines = (f"{name}\0{size}\n".encode("utf-8", "surrogatepass") for name, size in sorted(sizes))
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _scan(folder: str) -> list[str]:
    names, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above would be an endless loop
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(place, folder)
        inside = "" if inside == "." else inside.replace(os.sep, "/") + "/"
        names += [inside + name for name in files if not name.startswith(".")]
    return names
