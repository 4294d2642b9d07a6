"""Files that appear under their name only when they are whole, and digests that identify them."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ipadapter_jax.errors import InputError


def write_whole(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes through a temporary file beside `path`, making its folder: a reader sees the old file or the new one,
    never a part. `content` may come in pieces.

    Raises InputError naming the file when it cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".part-{_fitting(path.name)}-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes private files
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InputError(f"{path}: not written ({error.strerror}); make room or choose another place") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises InputError unless a file of this name can be made; leaves no trace."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):  # permission bits alone do not tell: read-only mounts, quotas
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}); choose another place") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unfinished(folder: Path) -> Iterator[tuple[Path, str]]:
    """Temporary files in this folder that `write_whole` is at, or was when its process was killed, each with the name
    that it was to get (the first 200 bytes of it)."""
    for path in folder.glob(".part-*"):
        if found := re.fullmatch(r"\.part-(.+)-[a-z0-9_]{8}", path.name, re.DOTALL):
            yield path, found[1]


def _fitting(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:200])  # file systems allow names of 255 bytes


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # once: to ask is to change it for all threads
