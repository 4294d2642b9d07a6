"""Who could have put something at a path: owners, modes and links, of all that leads there."""

import grp
import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest

from ipadapter_jax.storage import ownership
from ipadapter_jax.storage.ownership import make_private_folder, ownership_problem

ROOT = os.geteuid() == 0


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder that is nobody else's, as is all above it, although others may enter it, and are in every group."""
    monkeypatch.setattr(ownership, "_is_own_group", lambda group: False)
    tmp_path.chmod(0o755)
    assert ownership_problem(tmp_path) is None
    return tmp_path


def made(path: Path, mode: int) -> Path:
    path.mkdir()
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755, 0o500])
def test_paths_of_this_user_only(home, mode):
    file = made(home / "cache", 0o700) / "a"
    file.write_bytes(b"")
    file.chmod(mode & 0o666)
    (home / "cache").chmod(mode)
    assert ownership_problem(home / "cache") is None and ownership_problem(file) is None
    assert ownership_problem(home / "cache" / "not made yet" / "b") is None


@pytest.mark.parametrize("mode", [0o777, 0o707, 0o770, 0o775, 0o1777, 0o722])
def test_a_folder_that_others_write_to(home, mode):
    """Also where they cannot replace what is ours: they can put there what is not there yet."""
    folder = made(home / "cache", mode)
    expected = f"others can write to {folder} (mode {mode:04o}); run: chmod 700 {folder}"
    assert str(ownership_problem(folder)) == expected
    (folder / "a").write_bytes(b"")
    if mode == 0o1777:  # as below /tmp
        assert ownership_problem(folder / "a") is None
        made(folder / "own", 0o700)
        assert ownership_problem(folder / "own") is None


@pytest.mark.parametrize("mode", [0o666, 0o660, 0o602])
def test_a_file_that_others_write_to(home, mode):
    file = home / "a"
    file.write_bytes(b"")
    file.chmod(mode)
    assert str(ownership_problem(file)) == f"others can write to {file} (mode {mode:04o}); run: chmod 600 {file}"


def test_a_folder_above_that_others_write_to(home):
    """They can put another folder in place of ours."""
    above = made(home / "open", 0o777)
    made(above / "cache", 0o700)
    expected = f"others can write to {above} (mode 0777); run: chmod go-w {above}"
    assert str(ownership_problem(above / "cache")) == expected == str(ownership_problem(above / "new" / "cache"))


def test_paths_writable_by_the_users_own_group(home, monkeypatch):
    """As all is where every user has a group, and files are made with a mask of 002."""
    above = made(home / "open", 0o775)
    folder = made(above / "cache", 0o775)
    file = folder / "a"
    file.write_bytes(b"")
    file.chmod(0o664)
    monkeypatch.setattr(ownership, "_is_own_group", lambda group: True)
    assert (
        ownership_problem(above)
        is ownership_problem(folder)
        is ownership_problem(file)
        is ownership_problem(folder / "new")
        is None
    )
    folder.chmod(0o777)  # but not to everyone
    assert "chmod 700" in str(ownership_problem(folder))
    folder.chmod(0o775)
    file.chmod(0o666)
    assert "chmod 600" in str(ownership_problem(file))
    monkeypatch.setattr(ownership, "_is_own_group", lambda group: False)
    assert str(ownership_problem(file)) == f"others can write to {above} (mode 0775); run: chmod go-w {above}"


@pytest.mark.parametrize("mode", [0o700, 0o744])
def test_paths_in_a_folder_that_others_cannot_enter(home, mode):
    folder = made(home / "cache", 0o700)
    file = folder / "a"
    file.write_bytes(b"")
    file.chmod(0o664)
    made(folder / "below", 0o775)
    folder.chmod(mode)
    assert ownership_problem(file) is ownership_problem(folder / "below") is None
    folder.chmod(0o710)
    assert "chmod 600" in str(ownership_problem(file)) and "chmod 700" in str(ownership_problem(folder / "below"))
    folder.chmod(mode)
    file.chmod(0o666)  # nobody means that
    assert "chmod 600" in str(ownership_problem(file))


@pytest.mark.parametrize(
    ("name", "members", "group", "own"),
    [
        *(("me", [], 7, True), ("me", ["me"], 7, True)),
        *(("me", ["me", "you"], 7, False), ("users", [], 7, False), ("me", [], 8, False)),
    ],
)
def test_a_group_of_one(name, members, group, own, monkeypatch):
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name="me", pw_gid=7))
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=name, gr_mem=members))
    assert ownership._is_own_group(group) is own


def test_links_are_followed(home):
    safe, unsafe = made(home / "safe", 0o700), made(home / "unsafe", 0o777)
    made(unsafe / "cache", 0o700)
    (home / "good").symlink_to("safe")
    (home / "bad").symlink_to(unsafe)
    (safe / "up").symlink_to("../unsafe/cache")
    (home / "round").symlink_to("round")
    assert ownership_problem(home / "good") is None and ownership_problem(home / "good" / "a") is None
    for path in (home / "bad", home / "bad" / "cache", home / "good" / "up", home / "safe" / ".." / "unsafe"):
        assert f"others can write to {unsafe}" in str(ownership_problem(path))
    (unsafe / "link").symlink_to(safe)  # which others could lead elsewhere
    assert f"others can write to {unsafe}" in str(ownership_problem(unsafe / "link"))
    assert ownership_problem(home / "round") is None  # nobody can open it


@pytest.mark.skipif(not ROOT, reason="only root can give files away")
def test_paths_of_other_users(home):
    folder = made(home / "cache", 0o700)
    (folder / "a").write_bytes(b"")
    os.chown(folder / "a", 12345, -1)
    assert ownership_problem(folder) is None
    assert str(ownership_problem(folder / "a")) == f"{folder / 'a'} belongs to user 12345; choose a folder of your own"
    everyone = made(home / "tmp", 0o1777)
    (everyone / "link").symlink_to(folder)
    os.chown(everyone / "link", 12345, -1, follow_symlinks=False)
    assert (
        str(ownership_problem(everyone / "link"))
        == f"{everyone / 'link'} belongs to user 12345; choose a folder of your own"
    )
    os.chown(folder, 12345, -1)
    assert "belongs to user 12345" in str(ownership_problem(folder))
    assert "belongs to user 12345" in str(ownership_problem(folder / "new"))


def test_paths_after_a_change_of_user(home, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    found = ownership_problem(home)
    assert (found is None) == ROOT  # the administrator's are trusted by all


def test_new_folders_are_private(home):
    before = os.umask(0)
    try:
        make_private_folder(home / "a" / "b")
    finally:
        os.umask(before)
    assert [(home / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [0o700, 0o700]
    make_private_folder(home / "a" / "b")
    assert ownership_problem(home / "a" / "b" / "c") is None
