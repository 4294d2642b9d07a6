"""What the image prompts of a row hold, so that one that was replaced under its name is noticed."""

import functools
from collections.abc import Callable
from pathlib import Path

from ipadapter_jax.files import sha256
from ipadapter_jax.jobs.rows import Row

Digests = tuple[str | None, ...]
"""A digest of each image prompt of a row, in their order; None for one that cannot be read."""

Identify = Callable[[Row], Digests]


def of_files() -> Identify:
    """Digests of the rows' files, each read once while it does not change. Safe in threads."""

    @functools.cache
    def digest(path: Path, size: int, mtime_ns: int) -> str:
        return sha256(path)

    def identify(row: Row) -> Digests:
        return tuple(_of_file(path, digest) for path in row.images)

    return identify


def _of_file(path: Path, digest: Callable[[Path, int, int], str]) -> str | None:
    try:
        found = path.stat()
        return digest(path, found.st_size, found.st_mtime_ns)
    except OSError:
        return None
