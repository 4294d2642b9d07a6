"""Whether what lies at a path can come from this user alone: programs that are found on disk are run."""

import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

_MOST_STEPS = 1000  # a chain of links ends before
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def distrust(path: Path) -> str | None:
    """Why somebody else may have put there what lies at `path`, a file or a folder, in words that end with the remedy;
    None where only this user or the administrator can have. What does not exist yet is judged by where it would lie.

    All that leads there counts: folders above it and links. Belonging to others, or open to their changes, they may
    lead elsewhere tomorrow. A folder like /tmp, in which everyone changes only what is theirs, may lie above.
    """
    path = path.absolute()
    end, trusted = os.path.realpath(path), {0, os.geteuid(), os.stat("/").st_uid}
    for step in _steps(path):
        try:
            found = os.lstat(step)
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{step} cannot be read ({error.strerror}); choose another folder"
        if found.st_uid not in trusted:
            return f"{step} belongs to {_user(found.st_uid)}; choose a folder of your own"
        if stat.S_ISLNK(found.st_mode):
            continue
        last = os.fspath(step) == end
        open_to = found.st_mode & _OTHERS
        if open_to and not last and (found.st_mode & stat.S_ISVTX or _is_own_group(open_to, found.st_gid)):
            continue
        if open_to:
            change = "600" if stat.S_ISREG(found.st_mode) else "700" if last else "go-w"
            remedy = f"run: chmod {change} {shlex.quote(str(step))}"
            return f"others can write to {step} (mode {stat.S_IMODE(found.st_mode):04o}); {remedy}"
    return None


def make_private_folder(folder: Path) -> None:
    """Makes a folder, and those above that are missing, for this user alone. Raises OSError."""
    missing = [step for step in (folder, *folder.parents) if not step.exists()]
    for step in reversed(missing):
        step.mkdir(mode=0o700, exist_ok=True)


def _steps(path: Path) -> Iterator[Path]:
    """The root, and every folder, link and file after it that decides where an absolute path leads."""
    here, waiting = Path(path.anchor), list(reversed(path.parts[1:]))
    yield here
    for _ in range(_MOST_STEPS):
        if not waiting:
            return
        part = waiting.pop()
        if part == "..":
            here = here.parent
            continue
        yield here / part
        if os.path.islink(here / part):
            target = Path(os.readlink(here / part))
            waiting.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
            here = Path(target.anchor) if target.is_absolute() else here
        else:
            here = here / part


def _is_own_group(open_to: int, group: int) -> bool:
    """Whether nobody but this user is in the group that a folder is open to, as where each user has a group."""
    if open_to & stat.S_IWOTH:
        return False
    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and found.gr_name == user.pw_name and not {*found.gr_mem} - {user.pw_name}


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"
