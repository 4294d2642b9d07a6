"""Digests of the image prompts of a row, so that a file that was replaced under the same name is noticed."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.batch.rows import BatchRow
from ipadapter_jax.storage.atomic_files import sha256

_SHA256, _STATES = "images_sha256", "images_state"  # keys of a line of job.jsonl; older releases lack one or both
_SETTLED_NS = 10_000_000_000  # clocks of file systems are coarse, those of servers differ


class FileState(NamedTuple):
    """Changes whenever the content under a name changes: writing and renaming set the time of the last change,
    `ctime_ns`, and no program can set it back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class ImageDigest(NamedTuple):
    """The digest of an image prompt, and the state of its file when it was read.

    sha256: None if the file cannot be read. state: None if it proves nothing, as the file has just changed, or if the
    image prompt is not a file.
    """

    sha256: str | None
    state: FileState | None = None


Digests = tuple[ImageDigest, ...]
"""One for each image prompt of a row, in order."""

DigestImages = Callable[[BatchRow, Digests], Digests]
"""Digests the image prompts of a row, given the digests recorded before, which may be empty: a file whose state is the
same is not read again."""


def digest_files() -> DigestImages:
    """Returns a function that digests the files of rows. Each file is read once while it does not change, or more often
    if several threads need it at the same moment. Safe in threads."""

    @functools.cache
    def digest(path: Path, state: FileState) -> str:
        return sha256(path)

    def digest_images(row: BatchRow, before: Digests) -> Digests:
        known = before if len(before) == len(row.images) else (None,) * len(row.images)
        return tuple(_of_file(path, digest, then) for path, then in zip(row.images, known, strict=True))

    return digest_images


def digests_as_json(digests: Digests) -> dict[str, object]:
    """What a line of job.jsonl records of them; empty if no digest is known."""
    if not any(digest.sha256 for digest in digests):
        return {}
    return {_SHA256: [digest.sha256 for digest in digests], _STATES: [digest.state for digest in digests]}


def read_digests(line: Mapping[str, object]) -> Digests:
    """The digests that a line records; empty if it records none."""
    digests = [digest if isinstance(digest, str) else None for digest in _list(line.get(_SHA256))]
    states = _list(line.get(_STATES))
    if len(states) != len(digests):
        return tuple(map(ImageDigest, digests))
    return tuple(ImageDigest(digest, _state(state)) for digest, state in zip(digests, states, strict=True))


def without_digests(line: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in line.items() if name not in (_SHA256, _STATES)}


def replaced_images(names: Sequence[str], before: Digests, now: Digests) -> list[str]:
    """The names of images whose digest has changed, as far as both digests are known."""
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


def _state(value: object) -> FileState | None:
    return FileState(*value) if isinstance(value, list) and len(value) == len(FileState._fields) else None


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
