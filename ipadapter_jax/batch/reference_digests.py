"""What the image prompts of a row hold, so that one that was replaced under its name is noticed."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ipadapter_jax.batch.rows import Row
from ipadapter_jax.storage.atomic_files import sha256

_SHA256, _STATES = "images_sha256", "images_state"  # of a job's line; those of older releases lack one or both
_SETTLED_NS = 10_000_000_000  # clocks of file systems are coarse, those of servers are not ours


class FileState(NamedTuple):
    """Another content under the same name has another state: writing and renaming set the time of the last change,
    `ctime_ns`, and no program can set it back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class ImageDigest(NamedTuple):
    """The digest of an image prompt, None for one that cannot be read, and the state of its file then; None where it
    proves nothing, since it has just changed, or there is no file."""

    sha256: str | None
    state: FileState | None = None


Digests = tuple[ImageDigest, ...]
"""Of each image prompt of a row, in their order."""

Identify = Callable[[Row, Digests], Digests]
"""What the image prompts of a row hold now, given what they held before as far as that is known: a file whose state is
the same need not be read again."""


def of_files() -> Identify:
    """Digests of the rows' files, each read once while it does not change, or by several threads that need it in the
    same moment. Safe in threads."""

    @functools.cache
    def digest(path: Path, state: FileState) -> str:
        return sha256(path)

    def identify(row: Row, before: Digests) -> Digests:
        known = before if len(before) == len(row.images) else (None,) * len(row.images)
        return tuple(_of_file(path, digest, then) for path, then in zip(row.images, known, strict=True))

    return identify


def to_line(digests: Digests) -> dict[str, Any]:
    """What a job's line says of them; nothing where nothing is known."""
    if not any(digest.sha256 for digest in digests):
        return {}
    return {_SHA256: [digest.sha256 for digest in digests], _STATES: [digest.state for digest in digests]}


def of_line(line: Mapping[str, Any]) -> Digests:
    """What a line says of them; empty where that is nothing."""
    digests, states = _list(line.get(_SHA256)), _list(line.get(_STATES))
    if len(states) != len(digests):
        return tuple(map(ImageDigest, digests))
    return tuple(ImageDigest(digest, _state(state)) for digest, state in zip(digests, states, strict=True))


def without_digests(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in (_SHA256, _STATES)}


def replaced(names: Sequence[str], before: Digests, now: Digests) -> list[str]:
    """Those of the names that hold something else than they did, as far as both are known."""
    known = ((name, a.sha256, b.sha256) for name, a, b in zip(names, before, now, strict=False))
    return [name for name, a, b in known if a and b and a != b]


def _of_file(path: Path, digest: Callable[[Path, FileState], str], before: ImageDigest | None) -> ImageDigest:
    try:
        found = path.stat()
        state = FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        if before is not None and before.sha256 and before.state == state:
            return before
        is_settled = time.time_ns() - state.ctime_ns > _SETTLED_NS
        return ImageDigest(digest(path, state), state if is_settled else None)
    except OSError:
        return ImageDigest(None)


def _state(value: Any) -> FileState | None:
    return FileState(*value) if isinstance(value, list) and len(value) == len(FileState._fields) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
