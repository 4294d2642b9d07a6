"""jax's entries on disk: repaired when torn, not used where others could have put them there."""

import logging
import resource
import subprocess
import sys
import warnings
import zlib

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from ipadapter_jax.runtime.compilation_cache import cache_is_on, enable_compilation_cache
from ipadapter_jax.storage import ownership

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture
def folder(tmp_path):
    """A place for jax's entries, as JAX_COMPILATION_CACHE_DIR names it."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    reset_cache()
    yield tmp_path / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def compiled() -> np.ndarray:
    """What a new process does: nothing is compiled in memory."""
    enable_compilation_cache()
    jax.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # jax warns of an entry that it cannot read
        return np.asarray(jax.jit(lambda x: x * 3 + 1)(np.arange(4.0)))


def entries(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*-cache")}


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros at the end", "other bytes", "whole, of something else"])
def test_a_torn_entry_is_repaired(folder, damage, caplog):
    expected = compiled()
    for file in folder.glob("*-cache"):
        content = file.read_bytes()
        torn = {
            "cut": content[: len(content) // 2],
            "empty": b"",
            "zeros at the end": content[:-64] + bytes(64),
            "other bytes": b"entry",
            "whole, of something else": zlib.compress(b"\0\0\0\1no program"),
        }
        file.write_bytes(torn[damage])
    before = entries(folder)
    assert before
    with caplog.at_level(logging.WARNING, "ipadapter_jax"):
        np.testing.assert_array_equal(compiled(), expected)
    lines = [record.getMessage() for record in caplog.records if record.name == "ipadapter_jax"]
    assert len(lines) == 1  # for all of them
    assert lines[0].startswith(f"a compiled program on disk was damaged, removed and compiled again: {folder}/jit_")
    after = entries(folder)
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in after)
    caplog.clear()
    np.testing.assert_array_equal(compiled(), expected)
    assert not caplog.records and entries(folder) == after  # read, not written again


def test_an_entry_that_cannot_be_written_leaves_no_part(folder):
    """A disk that is full in the middle of it."""
    enable_compilation_cache()
    jax.clear_caches()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.warns(UserWarning, match="Error writing persistent compilation cache entry"):
            found = jax.jit(lambda x: x * 3 + 1)(np.arange(4.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    np.testing.assert_array_equal(found, np.arange(4.0) * 3 + 1)
    assert not [*folder.iterdir()]


def test_folders_and_entries_are_private(folder):
    compiled()
    modes = {path.stat().st_mode & 0o777 for path in folder.glob("*-cache")}
    assert folder.stat().st_mode & 0o777 == 0o700 and modes == {0o600}


def test_a_folder_that_others_write_to_is_not_used(folder, caplog):
    expected = compiled()
    before = entries(folder)
    for file in folder.glob("*-cache"):
        file.write_bytes(b"planted")
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING, "ipadapter_jax"):
        np.testing.assert_array_equal(compiled(), expected)
        compiled()
    assert [record.getMessage() for record in caplog.records if record.name == "ipadapter_jax"] == [
        f"compiled programs are neither read nor cached: others can write to {folder} (mode 0777); "
        f"run: chmod 700 {folder}"
    ]
    assert not cache_is_on() and set(entries(folder).values()) == {b"planted"} and before


def test_an_entry_that_others_write_to_is_made_again(folder, caplog):
    expected = compiled()
    (file,) = folder.glob("*-cache")
    file.chmod(0o666)
    with caplog.at_level(logging.WARNING, "ipadapter_jax"):
        np.testing.assert_array_equal(compiled(), expected)
    assert [record.getMessage() for record in caplog.records if record.name == "ipadapter_jax"] == [
        "a compiled program on disk was removed and compiled again: others can write to "
        f"{file} (mode 0666)"  # and nothing is left to do
    ]
    assert file.stat().st_mode & 0o777 == 0o600


def test_entries_written_with_umask_002_are_used(folder, caplog, monkeypatch):
    """By an older release, by jax itself, and by another process that has just written an entry."""
    monkeypatch.setattr(ownership, "_is_own_group", lambda group: True)
    expected = compiled()
    folder.chmod(0o775)
    for file in folder.glob("*-cache"):
        file.chmod(0o664)
    before = {file: file.stat().st_ino for file in folder.glob("*-cache")}
    with caplog.at_level(logging.WARNING, "ipadapter_jax"):
        np.testing.assert_array_equal(compiled(), expected)
    assert cache_is_on() and not caplog.records
    assert before and {file: file.stat().st_ino for file in folder.glob("*-cache")} == before


@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), PermissionError(13, "Permission denied"), RuntimeError("RESOURCE_EXHAUSTED: 1 GiB")],
)
def test_an_entry_that_cannot_be_read_now_stays(folder, error, monkeypatch):
    """It is whole; jax says why and compiles."""
    expected = compiled()
    before = entries(folder)

    def fails(*_):
        raise error

    monkeypatch.setattr("jax._src.compilation_cache.extract_executable_and_time", fails)
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        found = np.asarray(jax.jit(lambda x: x * 3 + 1)(np.arange(4.0)))
    np.testing.assert_array_equal(found, expected)
    assert before and entries(folder) == before


def test_an_entry_that_is_being_written_stays(folder, caplog, monkeypatch):
    """By another process, which has not finished."""
    expected = compiled()
    (file,) = folder.glob("*-cache")
    whole = file.read_bytes()
    file.write_bytes(whole[:100])

    def while_it_is_written(content):
        file.write_bytes(whole)
        raise ValueError(f"ends after {len(content)} bytes")

    monkeypatch.setattr("jax._src.compilation_cache.decompress_executable", while_it_is_written)
    with caplog.at_level(logging.WARNING, "ipadapter_jax"):
        np.testing.assert_array_equal(compiled(), expected)
    assert file.read_bytes() == whole and not caplog.records


def test_without_a_home_folder_nothing_is_cached():
    """And nothing fails."""
    program = """
import logging, os, pwd
def nobody(_): raise KeyError
pwd.getpwuid = nobody
from ipadapter_jax.runtime.compilation_cache import cache_is_on, enable_compilation_cache
enable_compilation_cache()
print(cache_is_on())
"""
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    said = "neither read nor cached: this user has no home folder; name another place with XDG_CACHE_HOME"
    assert said in done.stderr
