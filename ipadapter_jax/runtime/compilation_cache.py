"""The compilation cache: compiled programs on disk, so that a second start does not compile again.

Programs in the cache are executed, so a folder or an entry is used only if no other user can write it
(`storage/ownership.py`).
"""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.ownership import make_private_folder, ownership_problem

log = logging.getLogger("ipadapter_jax")
_config: Any = jax.config  # its settings are made at run time, unknown to type checkers


def cache_folder() -> Path:
    """The folder of compiled programs: jax's own setting (JAX_COMPILATION_CACHE_DIR), else this project's folder.
    Raises InputError when there is no home folder."""
    if _config.jax_compilation_cache_dir:
        return Path(_config.jax_compilation_cache_dir)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ipadapter_jax" / "compiled"
    except RuntimeError:
        raise InputError("this user has no home folder; name another place with XDG_CACHE_HOME") from None


def cache_is_on() -> bool:
    """False if JAX_ENABLE_COMPILATION_CACHE=0 or, for an unsafe folder, `enable_compilation_cache` turned it off."""
    return bool(_config.jax_enable_compilation_cache)


def cache_is_local() -> bool:
    """False if jax keeps its entries in an object store."""
    return "://" not in (_config.jax_compilation_cache_dir or "")


def enable_compilation_cache() -> None:
    """Turns jax's persistent cache on, in this project's folder unless it has one already.

    If other users could have put programs there, it is turned off for this process, with a warning that says the
    remedy.
    """
    if not cache_is_on():
        return
    if cache_is_local():
        try:
            folder = cache_folder()
            make_private_folder(folder)
            problem = ownership_problem(folder)
        except (InputError, OSError) as error:
            problem = error.strerror if isinstance(error, OSError) else str(error)
        if problem is not None:
            log.warning("compiled programs are neither read nor cached: %s", problem)
            _turn_off()
            return
    if _config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs add up
    _wrap_entry_access()


def _turn_off() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    with contextlib.suppress(ImportError, AttributeError):  # jax may have opened it before
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()


def _wrap_entry_access() -> None:
    """Replaces jax's functions that read and write an entry by ours, once. A release of jax without these functions
    warns of a damaged entry and compiles."""
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import compilation_cache as entries

        if isinstance(entries.get_executable_and_time, _EntryReader):
            entries.get_executable_and_time.has_warned = False
        else:
            read, write = entries.get_executable_and_time, entries.put_executable_and_time
            entries.get_executable_and_time, entries.put_executable_and_time = _EntryReader(read), _EntryWriter(write)


class _EntryReader:
    """jax's reader of an entry. An entry that is damaged (full disk, power loss) or that another user could have
    written
    is removed: jax would never write it again. Only the first removal is a warning, as they come in dozens."""

    def __init__(self, read: Callable[..., object]):
        self._read, self.has_warned = read, False

    def __call__(self, cache_key: str, *arguments: object, **named: object) -> object:
        file = _entry(cache_key)
        if file is not None and (problem := ownership_problem(file)) is not None:
            removed = _remove(file)
            self._report(f"removed and compiled again: {problem.why}" if removed else f"not used: {problem}")
            return None, None
        before = _state(file)
        try:
            return self._read(cache_key, *arguments, **named)
        except Exception as error:
            if file is None or before is None or _is_of_this_process(error):
                raise
            if _state(file) == before:  # else another process is writing it
                if not _remove(file):
                    raise
                self._report(f"damaged, removed and compiled again: {file} ({' '.join(str(error).split())[:200]})")
            return None, None

    def _report(self, what: str) -> None:
        log.log(logging.DEBUG if self.has_warned else logging.WARNING, "a compiled program on disk was %s", what)
        self.has_warned = True


class _EntryWriter:
    """jax's writer of an entry: a partial entry is removed, and only this user may write to it."""

    def __init__(self, write: Callable[..., object]):
        self._write = write

    def __call__(self, cache_key: str, *arguments: object, **named: object) -> None:
        before = _entry(cache_key)
        try:
            self._write(cache_key, *arguments, **named)
        except Exception:
            if before is None and (file := _entry(cache_key)) is not None:
                _remove(file)
            raise
        if before is None and (file := _entry(cache_key)) is not None:
            with contextlib.suppress(OSError):
                file.chmod(0o600)


def _entry(cache_key: str) -> Path | None:
    """The file of an entry, under the name that jax gives it; None if it does not exist."""
    if not cache_is_local():
        return None
    file = cache_folder() / f"{cache_key}-cache"
    return file if os.path.lexists(file) else None


class _FileState(NamedTuple):
    size: int
    modified: int  # nanoseconds


def _state(file: Path | None) -> _FileState | None:
    """Size and time of the last change, which show whether an entry has changed."""
    try:
        found = os.stat(file) if file is not None else None
    except OSError:
        return None
    return None if found is None else _FileState(found.st_size, found.st_mtime_ns)


def _is_of_this_process(error: Exception) -> bool:
    """Whether an error says nothing about the entry: an intact entry causes it too, without memory or access rights."""
    return isinstance(error, MemoryError | OSError) or "RESOURCE_EXHAUSTED" in str(error)


def _remove(file: Path) -> bool:
    """Removes an entry. Returns whether it is gone."""
    try:
        file.unlink(missing_ok=True)
    except OSError:  # in a folder of the administrator
        return False
    with contextlib.suppress(OSError):
        file.with_name(file.name.removesuffix("cache") + "atime").unlink(missing_ok=True)
    return True
