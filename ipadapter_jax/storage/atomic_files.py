"""Files and folders that appear under their name only when they are whole, and digests that identify files.

What is being written lies beside its place as .part-NAME-KERNEL-RANDOM and is locked by its writer. The kernel lets go
of the lock when that process ends, however it ends, so that what a kill has left is known and removed by the next run.
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

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)
_ABANDONED = 24 * 3600  # seconds without a change after which nobody can be writing any more
_LEFTOVER = re.compile(r"\.part-(?P<name>.+)-(?P<kernel>[0-9a-f]{8})-[a-z0-9_]{8}", re.DOTALL)
# As earlier versions of this package called them; a person's own hidden file may be called so too.
_OLDER_LEFTOVER = re.compile(r"\.part-(?:(?P<name>.*)-)?[a-z0-9_]{8}|(?P<proved>\.unproven-\d+-.+)", re.DOTALL)
_UNPROVEN = re.compile(r"\.unproven-(?P<process>\d+)-(?P<name>.+)", re.DOTALL)  # what the name was to be before
# File systems that one kernel alone writes to, so that its locks tell of all writers.
_LOCAL = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})

Which = Callable[[str], bool]  # of names of files


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes through a temporary file beside `path`, making its folder: a reader sees the old file or the new one,
    never a part. `content` may come in pieces.

    Raises InputError naming the file when it cannot be written.
    """
    with atomic_replace(path) as temporary, open(temporary, "wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)


@contextlib.contextmanager
def atomic_replace(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file, or with `folder` a new folder, beside `path`, whose own folder is made. It is renamed to `path` when
    the block ends, and removed when the block fails or the process is told to end meanwhile.

    Raises InputError naming `path` when it cannot be written. Other errors of the block, such as of a file that it
    reads, pass as they are.
    """
    with cleanup_on_signal(lambda: _begun(path, folder), _discard) as part:
        with _said_of(path, part.path):
            yield part.path
        with _said_of(path):
            os.chmod(part.path, (0o777 if folder else 0o666) & ~_UMASK)  # it was made private
            if not folder:
                os.fsync(part.lock)
            os.replace(part.path, path)


@contextlib.contextmanager
def _said_of(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Has errors of the system say that `path` was not written: all, or those about `temporary` and what lies in it."""
    try:
        yield
    except OSError as error:
        if temporary is not None and not _is_about(error, temporary):
            raise
        reason = error.strerror or error
        raise InputError(f"{path}: not written ({reason}); make room or choose another place") from None


def _is_about(error: OSError, temporary: Path) -> bool:
    """Whether an error is of writing the file or the folder, or what lies in it; some do not name the file."""
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
    if named:
        return any(Path(os.fsdecode(name)).is_relative_to(temporary) for name in named)
    return error.errno in _OF_WRITING


def remove_partial_files(folder: Path, mine: Which = lambda name: False, *, older: Which = lambda name: True) -> None:
    """Removes from `folder`, which is this package's own, what processes that were killed have left half written, never
    what one is writing.

    A lock that is free tells that nobody writes, where the name is of this machine's kernel or the disk is this
    machine's own, or where `mine` says of the name that it was to get (the first 200 bytes of it) that only the caller
    writes it. Elsewhere it takes a day without a change as well: not every network file system shows the locks of other
    machines, and earlier versions held none. `older` says of the name whether what an earlier version has left of it is
    meant too, which is not known from a person's files for certain.
    """
    with contextlib.suppress(OSError):  # there is no such folder yet, or it is not ours to clean
        for entry in list(os.scandir(folder)):
            found = _LEFTOVER.fullmatch(entry.name) or _OLDER_LEFTOVER.fullmatch(entry.name)
            if found and not entry.is_symlink():
                parts = found.groupdict()
                name, kernel = parts["name"] or parts.get("proved") or "", parts.get("kernel")
                unproven = _UNPROVEN.fullmatch(name)
                name = unproven["name"] if unproven else name
                if not (kernel or older(name)):
                    continue
                ended = unproven is not None and not _is_running(int(unproven["process"]))
                settled = mine(name) or kernel == _KERNEL or ((kernel or ended) and _is_local(folder))
                _remove_if_nobody_writes(Path(entry.path), bool(settled) and (unproven is None or ended))


def remove_partial_files_of(path: Path) -> None:
    """The same in the folder of a file that is about to be written, which is a person's: what an earlier version has
    left there is removed only where it was to be this file."""

    def is_it(name: str) -> bool:
        return name in (path.name, _fitting(path.name))

    remove_partial_files(path.parent, mine=is_it, older=is_it)


def check_writable(path: Path) -> None:
    """Raises InputError unless a file of this name can be made; leaves no trace, and removes those of killed runs."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    remove_partial_files_of(path)
    try:
        with tempfile.TemporaryFile(dir=folder):  # permission bits alone do not tell: read-only mounts, quotas
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}); choose another place") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Part:
    """What is being written, and the descriptor that holds its lock until it is closed."""

    path: Path
    lock: int


def _begun(path: Path, folder: bool) -> _Part:
    """The same, also in a folder that is not there yet. Raises InputError naming `path`."""
    with _said_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return _locked(path, folder)


def _locked(path: Path, folder: bool) -> _Part:
    """A new temporary file or folder for `path`."""
    prefix = f".part-{_fitting(path.name)}-{_KERNEL}-"
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
        os.close(descriptor)  # somebody who cleans has found it before it was locked


def _discard(part: _Part) -> None:
    """Also once it has its name, and is no longer there under this one."""
    with contextlib.suppress(OSError):
        _remove(part.path)
    os.close(part.lock)


def _remove_if_nobody_writes(path: Path, ours: bool) -> None:
    with contextlib.suppress(OSError):  # gone meanwhile, or of another user
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
    """Whether nobody has locked it; None where the file system has no locks."""
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
    """Whether a folder is known to lie on a disk that no other machine writes to."""
    try:
        lines = Path("/proc/self/mounts").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return False
    kinds: dict[str, str] = {}  # by place; of several mounts at one place the last is seen
    for _, place, kind, *_ in map(str.split, lines):
        kinds[re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)] = kind
    real = Path(os.path.realpath(folder))
    return next((kinds[str(place)] for place in (real, *real.parents) if str(place) in kinds), "") in _LOCAL


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fitting(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:200])  # file systems allow names of 255 bytes


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _kernel() -> str:
    """What tells this machine, since it was started, from all others: locks are seen by all who share a kernel."""
    try:
        running = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        running = socket.gethostname()
    return hashlib.sha256(running.encode()).hexdigest()[:8]


_UMASK = _umask()  # once: to ask is to change it for all threads
_KERNEL = _kernel()
