"""Files and folders that appear under their name only when they are whole, and digests that identify files.

While it is written, a file is called .part-NAME-KERNEL-RANDOM in the same folder, and its writer holds a lock on it.
The kernel releases the lock when the process ends, however it ends: the next run finds partial files that nobody has
locked, and removes them.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.cleanup import cleanup_on_signal

log = logging.getLogger("ipadapter_jax")

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)
_ABANDONED = 24 * 3600  # seconds without a change, after which no process can still be writing
_PARTIAL = re.compile(r"\.part-(?P<name>.+)-(?P<kernel>[0-9a-f]{8})-[a-z0-9_]{8}", re.DOTALL)
# The names that earlier versions of this package gave; a user's own hidden file may match as well.
_OLDER_PARTIAL = re.compile(r"\.part-(?:(?P<name>.*)-)?[a-z0-9_]{8}|(?P<proved>\.unproven-\d+-.+)", re.DOTALL)
_UNPROVEN = re.compile(r"\.unproven-(?P<process>\d+)-(?P<name>.+)", re.DOTALL)  # of earlier versions
# File systems that only one kernel writes to, so that its locks are those of all writers.
_LOCAL = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})

NameFilter = Callable[[str], bool]


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes a file through a temporary file in the same folder, which is created: a reader sees the old file or the
    new one, never a part. `content` may come in pieces.

    Raises InputError naming the file when it cannot be written.
    """
    with atomic_replace(path) as temporary, open(temporary, "wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)


@contextlib.contextmanager
def atomic_replace(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new temporary file, or with `folder` a new folder, next to `path`, whose own folder is created. It is renamed
    to `path` when the block ends, and removed when the block fails or a signal ends the process.

    Raises InputError naming `path` when it cannot be written. Other errors of the block, such as of a file that it
    reads, are raised unchanged.
    """
    with cleanup_on_signal(lambda: _create_partial(path, folder), _discard) as part:
        with _errors_naming(path, part.path):
            yield part.path
        with _errors_naming(path):
            os.chmod(part.path, (0o777 if folder else 0o666) & ~_UMASK)  # temporary files are created private
            if not folder:
                os.fsync(part.lock)
            os.replace(part.path, path)


@contextlib.contextmanager
def _errors_naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turns an OSError into an InputError that `path` was not written: any OSError, or with `temporary` only one about
    that file or about files in that folder."""
    try:
        yield
    except OSError as error:
        if temporary is not None and not _is_about(error, temporary):
            raise
        reason = error.strerror or error
        raise InputError(f"{path}: not written ({reason}); make room or choose another place") from None


def _is_about(error: OSError, temporary: Path) -> bool:
    """Whether an error came from writing the file, the folder or a file in it. Some errors name no file."""
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
    if named:
        return any(Path(os.fsdecode(name)).is_relative_to(temporary) for name in named)
    return error.errno in _WRITE_ERRORS


def remove_partial_files(
    folder: Path, mine: NameFilter = lambda name: False, *, older: NameFilter = lambda name: True
) -> None:
    """Removes the partial files of killed processes from `folder`, which belongs to this package; never a file that a
    process is writing.

    A partial file that nobody has locked is removed at once if its name has this machine's kernel, if the disk belongs
    to this machine, or if `mine` says that only the caller writes files of the final name (its first 200 bytes). Any
    other is removed after a day without a change: not every network file system shows the locks of other machines, and
    earlier versions held none. `older` says by the final name whether partial files of earlier versions are included:
    their names may also be those of a user's files.
    """
    with contextlib.suppress(OSError):  # the folder does not exist yet, or may not be changed
        for entry in list(os.scandir(folder)):
            found = _PARTIAL.fullmatch(entry.name) or _OLDER_PARTIAL.fullmatch(entry.name)
            if found and not entry.is_symlink():
                parts = found.groupdict()
                name, kernel = parts["name"] or parts.get("proved") or "", parts.get("kernel")
                unproven = _UNPROVEN.fullmatch(name)
                name = unproven["name"] if unproven else name
                if not (kernel or older(name)):
                    continue
                ended = unproven is not None and not _is_running(int(unproven["process"]))
                settled = mine(name) or kernel == _KERNEL or ((kernel or ended) and _is_local(folder))
                _remove_if_unlocked(Path(entry.path), bool(settled) and (unproven is None or ended))


def remove_partial_files_of(path: Path) -> None:
    """`remove_partial_files` in the folder of a file that is about to be written. The folder is a user's: partial files
    of earlier versions are removed only if they were to become this file."""

    def is_this_file(name: str) -> bool:
        return name in (path.name, _truncated(path.name))

    remove_partial_files(path.parent, mine=is_this_file, older=is_this_file)


def check_writable(path: Path) -> None:
    """Raises InputError unless a file of this name can be created. Leaves no file, and removes partial files of killed
    runs."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    remove_partial_files_of(path)
    try:
        with tempfile.TemporaryFile(dir=folder):  # permission bits say nothing about read-only mounts and quotas
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}); choose another place") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Part:
    """A partial file or folder, and the open descriptor that holds its lock."""

    path: Path
    lock: int


def _create_partial(path: Path, folder: bool) -> _Part:
    """A new partial file or folder for `path`, whose folder is created. Raises InputError naming `path`."""
    with _errors_naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return _create_locked(path, folder)


def _create_locked(path: Path, folder: bool) -> _Part:
    """A new partial file or folder for `path`, locked."""
    prefix = f".part-{_truncated(path.name)}-{_KERNEL}-"
    while True:
        if folder:
            temporary = tempfile.mkdtemp(prefix=prefix, dir=path.parent)
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor, temporary = tempfile.mkstemp(prefix=prefix, dir=path.parent)
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(temporary):
            return _Part(Path(temporary), descriptor)
        os.close(descriptor)  # another process has removed it before it was locked


def _discard(part: _Part) -> None:
    """Removes it, unless it has been renamed, and releases the lock."""
    with contextlib.suppress(OSError):
        _remove(part.path)
    os.close(part.lock)


def _remove_if_unlocked(path: Path, ours: bool) -> None:
    with contextlib.suppress(OSError):  # removed meanwhile, or of another user
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_NONBLOCK)
        try:
            free = _is_free(descriptor)
            old = time.time() - os.fstat(descriptor).st_mtime > _ABANDONED
            if free is not False and (old or (free and ours)):
                _remove(path)
                log.info("removed %s, which a run that was killed has left", path)
        finally:
            os.close(descriptor)


def _is_free(descriptor: int) -> bool | None:
    """Whether no process has locked a file; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def _is_local(folder: Path) -> bool:
    """Whether a folder is known to be on a disk that no other machine writes to."""
    try:
        lines = Path("/proc/self/mounts").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return False
    kinds: dict[str, str] = {}  # by mount point; of several mounts at one point the last is visible
    for _, place, kind, *_ in map(str.split, lines):
        kinds[re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)] = kind
    real = Path(os.path.realpath(folder))
    return next((kinds[str(place)] for place in (real, *real.parents) if str(place) in kinds), "") in _LOCAL


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _truncated(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:200])  # file systems allow names of 255 bytes


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _kernel() -> str:
    """Identifies this machine since its last boot: locks are visible to all processes of one kernel."""
    try:
        running = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        running = socket.gethostname()
    return hashlib.sha256(running.encode()).hexdigest()[:8]


_UMASK = _umask()  # once: reading it changes it for all threads
_KERNEL = _kernel()
